"""Print the functions that are long or take many arguments, the longest first.

    python tools/long_functions.py [--lines 50] [--arguments 8] [PATH …]

Only lines of code count; with `--whole` docstrings, comments and blank lines do too. `self` and `cls` do not
count as arguments. The exit status is 1 if there are such functions. Kernels, operator schemas, constructors
that mirror timm's contract and commands (whose parameters are their options) may exceed the limits, with a
comment that says why.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Size:
    """How large a function is.

    Attributes:
        place: path:line.
        name: Its name, with those of the classes and functions around it.
        lines: Lines of code, or all lines.
        arguments: Number without `self` and `cls`; *args and **kwargs count one each.
    """

    place: str
    name: str
    lines: int
    arguments: int


def sizes(source: str, path: str, *, whole: bool = False) -> Iterator[Size]:
    """The size of every function in a module's text."""
    code = [bool(line.strip()) and not line.strip().startswith("#") for line in source.splitlines()]

    def visit(node: ast.AST, around: str) -> Iterator[Size]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                lines = child.end_lineno - child.lineno + 1 if whole else _lines_of_code(child, code)
                yield Size(f"{path}:{child.lineno}", around + child.name, lines, _arguments(child))
            named = isinstance(child, Function | ast.ClassDef)
            yield from visit(child, f"{around}{child.name}." if named else around)

    yield from visit(ast.parse(source), "")


def _lines_of_code(function: Function, code: list[bool]) -> int:
    numbers = set(range(function.lineno, function.end_lineno + 1))
    for node in ast.walk(function):
        # A docstring, of a function or of the assignment above it.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            numbers -= set(range(node.lineno, node.end_lineno + 1))
    return sum(code[number - 1] for number in numbers)


def _arguments(function: Function) -> int:
    a = function.args
    named = [argument.arg for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    if named[:1] in (["self"], ["cls"]):
        named = named[1:]
    return len(named) + (a.vararg is not None) + (a.kwarg is not None)


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each; returns 1 if there are any."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", type=Path, default=[ROOT / "src"], help="default: src")
    parser.add_argument("--lines", type=int, default=50)
    parser.add_argument("--arguments", type=int, default=8)
    parser.add_argument("--whole", action="store_true", help="count docstrings, comments and blank lines too")
    options = parser.parse_args(arguments)
    functions: list[Size] = []
    for path in options.paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            shown = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file
            functions += sizes(file.read_text(encoding="utf-8"), str(shown), whole=options.whole)
    large = [f for f in functions if f.lines > options.lines or f.arguments > options.arguments]
    for f in sorted(large, key=lambda f: (-f.lines, f.place)):
        print(f"{f.lines:4} lines {f.arguments:3} arguments  {f.place}  {f.name}")
    return 1 if large else 0


if __name__ == "__main__":
    sys.exit(main())
