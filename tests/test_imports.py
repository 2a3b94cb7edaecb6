"""Imports point one way, and importing the library or the command is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"
LAYERS = [
    {"vmamba_cli"},
    {"vmamba.studies"},
    {"vmamba.train", "vmamba.analysis", "vmamba.export"},
    {"vmamba.heads", "vmamba.data"},
    {"vmamba.models"},
    {"vmamba.nn"},
    {"vmamba.ops"},
    {"vmamba.errors"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def part(module: str) -> str | None:
    """The layer's part that a module belongs to."""
    return next((name for name in RANK if module == name or module.startswith(f"{name}.")), None)


def arrows() -> list[tuple[str, str, str]]:
    found = []
    for path in sorted(SRC.rglob("*.py")):
        source = part(".".join(path.relative_to(SRC).with_suffix("").parts))
        if source is None:  # vmamba/__init__.py gathers the public names
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            targets = {part(name) for name in names} - {None, source}
            found += [(str(path.relative_to(SRC)), source, target) for target in targets]
    return found


def test_arrows_point_down() -> None:
    assert arrows(), "no import was found: the test looks in the wrong place"
    wrong = [a for a in arrows() if RANK[a[2]] <= RANK[a[1]]]
    assert not wrong, "\n".join(f"{path}: {source} imports {target}" for path, source, target in wrong)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        # torchvision, which timm imports, imports Triton itself where it is installed.
        (
            "import torch, timm; before = set(sys.modules); import vmamba; "
            "[sys.modules.pop(m) for m in before if m.split('.')[0] == 'triton']",
            ["triton", "lightning", "torchmetrics", "matplotlib", "mlxtend", "onnx"],
        ),
        ("import vmamba_cli.__main__", ["torch", "timm", "vmamba"]),
    ],
)
def test_import_is_light(statement: str, absent: list[str]) -> None:
    code = f"import sys; {statement}; print([m for m in {absent} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_import_touches_no_device() -> None:
    code = "import vmamba, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True)
