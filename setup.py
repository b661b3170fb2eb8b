"""Installs the `llama` package. Ranges of what it needs are in requirements.txt, tested versions in constraints.txt.

A wheel brings the kernels, compiled for each level of the processors of its architecture, where there is a compiler.
"""

import platform
import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
KERNELS = "llama/accelerate/kernels"
LEVELS = runpy.run_path(str(HERE / KERNELS / "levels.py"))  # on its own: what the package needs isn't here yet
COMPILER = LEVELS["find_compiler"]()
BRINGS_KERNELS = sys.platform == "linux" and platform.machine() == "x86_64" and COMPILER is not None
REQUIREMENTS = [
    line.partition("#")[0].strip() for line in (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
]


class Package(Distribution):
    """One that differs between architectures, where it brings kernels."""

    def has_ext_modules(self) -> bool:
        return BRINGS_KERNELS or super().has_ext_modules()


class Build(build_py):
    """Copies the package, and compiles its kernels."""

    def run(self) -> None:
        super().run()
        if BRINGS_KERNELS and not self.editable_mode:  # else they are compiled at the first use
            for level in LEVELS["LEVELS"]:
                self.compile_level(level)

    def compile_level(self, level) -> None:
        """Compile the library of a level. A compiler that is too old for it makes none."""
        objects = Path(self.get_finalized_command("build").build_temp).absolute() / level.name
        library = Path(self.build_lib).absolute() / KERNELS / "built" / f"{level.name}.so"
        for directory in (objects, library.parent):
            directory.mkdir(parents=True, exist_ok=True)
        try:
            for command in LEVELS["compile_commands"](COMPILER, level, HERE / KERNELS / "csrc"):
                subprocess.run(command, cwd=objects, check=True)
            subprocess.run(LEVELS["link_command"](COMPILER, library), cwd=objects, check=True)
            library.write_bytes(LEVELS["seal"](library.read_bytes()))
        except (OSError, subprocess.CalledProcessError) as e:
            print(f"no kernels for {level.name}: {e}", file=sys.stderr)


class Wheel(bdist_wheel):
    """A wheel for this architecture, and for any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(
    distclass=Package,
    cmdclass={"build_py": Build, "bdist_wheel": Wheel},
    name="llama-reference",
    version="0.1.0",
    description="A readable Llama inference reference, with the same commands on a laptop's CPU and on several GPUs",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["llama", "llama.*"]), "llama.demo_model"],
    package_dir={"llama.demo_model": "demo/model"},  # it lies there in the source, and in the package once installed
    package_data={"llama.accelerate.kernels": ["csrc/*"], "llama.demo_model": ["*"], "llama.server": ["page.html"]},
    python_requires=">=3.11",
    install_requires=[requirement for requirement in REQUIREMENTS if requirement],
    extras_require={
        "serve": [
            "fastapi>=0.115",
            "uvicorn>=0.30",
            "httptools>=0.6",  # what uvicorn reads and writes HTTP with, and its loop: faster than those in Python
            "uvloop>=0.19; sys_platform != 'win32'",
            "prometheus-client>=0.20",
            "httpx2>=2.16",  # passes requests on to other copies of the model
        ],
        "finetune": [
            "torchmetrics>=1.4",  # how good answers are
            "matplotlib>=3.7",  # draws the curves of a training
        ],
        "grammar": ["llguidance>=1.9"],  # answers in the form that a JSON schema, a regex or a grammar describes
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.5",  # several tests at a time
            "hypothesis>=6.100",
            "transformers>=4.44",  # the independent implementation that logits are compared with
            "peft>=0.17",  # the independent implementation of low-rank adapters
            "matplotlib>=3.7",  # draws what `bench --plot` draws
            "torchmetrics>=1.4",
            "gguf>=0.10",  # reads the file that is written for llama.cpp
            "fastapi>=0.115",
            "uvicorn>=0.30",
            "httptools>=0.6",
            "uvloop>=0.19; sys_platform != 'win32'",
            "prometheus-client>=0.20",
            "httpx2>=2.16",
            "openai>=1.50",  # the official clients of the server's protocols
            "anthropic>=0.40",
            "langchain-openai>=1.0",  # clients of other projects, which are to work as they are
            "litellm>=1.80",
            "llm>=0.27",
            "llguidance>=1.9",
            "jsonschema>=4.20",  # says whether answers are what a schema describes
            "selenium>=4.20",  # drives a browser, for the chat page
            "schemathesis>=4.10",  # makes requests from the server's OpenAPI document
            "import-linter>=2.1",  # which module may import which
            "ruff>=0.6",
            "mypy>=1.11",
        ],
    },
)
