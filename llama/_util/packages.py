"""Packages that only a part of the work needs, so that they may be missing: which are, and the command that gets them.

Knows pip; imports none of the packages.
"""

import importlib.util
import shlex
import shutil
import sys
from importlib.machinery import PathFinder

from ..errors import LlamaError


def find_missing(*modules: str) -> list[str]:
    """Those of the modules that can't be imported here."""
    return [module for module in modules if importlib.util.find_spec(module) is None]


def missing_error(who: str, *packages: str) -> LlamaError:
    """The error of something that needs packages that aren't here. who: what needs them."""
    needs = f"needs {' and '.join(packages)}, which {'is' if len(packages) == 1 else 'are'} not installed"
    return LlamaError(f"{who} {needs}: run {install_command(*packages)}")


def install_command(*packages: str) -> str:
    """A shell's command that installs packages for the Python that runs this, whatever `pip` on its PATH belongs to."""
    python = "python" if shutil.which("python") == sys.executable else shlex.quote(sys.executable or "python")
    # Not importlib.util.find_spec, which asks setuptools' hook. Before Python 3.12 that hook leaves `distutils` to the
    # standard library once anybody has looked for pip; then `import setuptools` fails, which torch.compile needs.
    has_pip = PathFinder.find_spec("pip") is not None
    tool = f"{python} -m pip install" if has_pip else f"uv pip install --python {python}"
    return f"{tool} {' '.join(packages)}"
