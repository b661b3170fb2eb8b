"""Draws docs/architecture.svg: the rooms of `llama/` and the order in which they may import each other.

    python docs/floor_plan.py

The order is that of import-linter's contract in pyproject.toml. What each room is for is the first line of its
docstring. Knows no room by its name.
"""

import ast
import re
import textwrap
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "architecture.svg"
WIDTH, LEFT, RIGHT, TOP = 940, 44, 16, 76  # of the picture, and its margins, in pixels
GAP, PADDING = 8, 10  # between rooms, and between a room's frame and its text
NAME_HEIGHT, LINE_HEIGHT = 18, 16
CHARACTER = 6.5  # the width of one, on average, in the text's font

STYLE = """
    .paper { fill: #ffffff }
    text { font: 12px system-ui, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #3d444d }
    .name { font: 600 14px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace; fill: #1f2328 }
    .title { font-size: 17px; font-weight: 600; fill: #1f2328 }
    .wing { fill: #ddf4ff; stroke: #54aeff }
    .file { fill: #f6f8fa; stroke: #8c959f }
    .arrow { stroke: #57606a; fill: #57606a; stroke-width: 2 }
    @media (prefers-color-scheme: dark) {
      .paper { fill: #0d1117 }
      text { fill: #b7bdc8 }
      .name, .title { fill: #f0f6fc }
      .wing { fill: #0c2d4d; stroke: #388bfd }
      .file { fill: #1c2128; stroke: #6e7681 }
      .arrow { stroke: #9198a1; fill: #9198a1 }
    }
"""


def read_contracts() -> tuple[list[list[str]], list[str]]:
    """The layers of the first contract, from the top, each a list of modules; the names of the other contracts."""
    with (ROOT / "pyproject.toml").open("rb") as f:
        first, *others = tomllib.load(f)["tool"]["importlinter"]["contracts"]
    layers = [[module.strip() for module in re.split("[:|]", layer)] for layer in first["layers"]]
    return layers, [contract["name"] for contract in others]


def find_source(module: str) -> Path:
    """The file that has the module's docstring."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def describe(module: str) -> str:
    """The first line of the module's docstring."""
    source = find_source(module).read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0].replace("`", "")


def draw_room(module: str, x: float, y: float, width: float, height: float, lines: list[str]) -> list[str]:
    is_wing = find_source(module).name == "__init__.py"
    name = module.partition(".")[2].replace(".", "/") + ("/" if is_wing else ".py")
    kind, left = "wing" if is_wing else "file", x + PADDING
    first = y + PADDING + NAME_HEIGHT - 4
    return [
        f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>',
        f'<text class="name" x="{left:g}" y="{first:g}">{escape(name)}</text>',
        *(
            f'<text x="{left:g}" y="{first + LINE_HEIGHT * (i + 1):g}">{escape(line)}</text>'
            for i, line in enumerate(lines)
        ),
    ]


def draw() -> str:
    """The picture, as SVG."""
    layers, rules = read_contracts()
    body, y = [], TOP
    for modules in layers:
        width = (WIDTH - LEFT - RIGHT - GAP * (len(modules) - 1)) / len(modules)
        texts = [textwrap.wrap(describe(module), int((width - 2 * PADDING) / CHARACTER)) for module in modules]
        height = 2 * PADDING + NAME_HEIGHT + LINE_HEIGHT * max(map(len, texts))
        for i, (module, lines) in enumerate(zip(modules, texts, strict=True)):
            body += draw_room(module, LEFT + i * (width + GAP), y, width, height, lines)
        y += height + GAP
    bottom = y - GAP
    body += [
        f'<path class="arrow" d="M 22 {TOP} V {bottom - 10}"/>',
        f'<path class="arrow" d="M 22 {bottom} l -6 -12 h 12 z"/>',
    ]
    for rule in rules:
        y += LINE_HEIGHT
        body.append(f'<text x="{LEFT}" y="{y}">Also: {escape(rule[0].lower() + rule[1:])}.</text>')
    height = y + LINE_HEIGHT
    notes = (
        '<text class="title" x="16" y="30">llama/: imports run downwards</text>',
        '<text x="16" y="52">A room may import the rooms below it and beside it, and none above it. Blue: a wing, '
        "a package of its own. Grey: a file of the ground floor.</text>",
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
            f'height="{height}">',
            f"  <style>{STYLE}  </style>",
            f'  <rect class="paper" width="{WIDTH}" height="{height}"/>',
            *(f"  {element}" for element in (*notes, *body)),
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
