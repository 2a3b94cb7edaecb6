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
    {"vmamba.environment"},
    {"vmamba"},  # vmamba/__init__.py, which gathers the public names of the layers below
    {"vmamba.inference"},
    {"vmamba.heads", "vmamba.data"},
    {"vmamba.models"},
    {"vmamba.nn"},
    {"vmamba.ops"},
    {"vmamba.files"},
    {"vmamba.errors"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def part(module: str) -> str | None:
    """The part that a module belongs to; None outside of the library."""
    names = module.split(".")
    known = (".".join(names[:length]) for length in (2, 1))
    return next((name for name in known if name in RANK), None)


def imported(source: str, package: str) -> set[str]:
    """The parts that a module's text imports, wherever in it; `package` is what relative imports start at."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {part(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            found |= {part(f"{module}.{alias.name}") for alias in node.names}
    return {name for name in found if name is not None}


def wrong_arrows(path: str, source: str) -> list[str]:
    """The imports of a file, at a path under src/, that do not point down."""
    names = [*Path(path).with_suffix("").parts]
    package = ".".join(names[:-1])
    own = part(package if names[-1] == "__init__" else ".".join(names))
    assert own is not None, f"{path} is in no layer"
    targets = imported(source, package) - {own}
    return [f"{path}: {own} imports {target}" for target in sorted(targets) if RANK[target] <= RANK[own]]


def test_arrows_point_down() -> None:
    paths = sorted(SRC.rglob("*.py"))
    assert len(paths) > 20, "the test looks in the wrong place"
    wrong = []
    for path in paths:
        wrong += wrong_arrows(str(path.relative_to(SRC)), path.read_text(encoding="utf-8"))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "source", "target"),
    [
        ("vmamba/ops/a.py", "from vmamba.nn import SS2D", "vmamba.nn"),
        ("vmamba/ops/a.py", "from vmamba import SS2D", "vmamba"),
        ("vmamba/ops/a.py", "from ..models import VMamba", "vmamba.models"),
        ("vmamba/nn/a.py", "def f():\n    import vmamba.models.vmamba as m", "vmamba.models"),
        ("vmamba/train/a.py", "from vmamba import analysis", "vmamba.analysis"),
        ("vmamba/__init__.py", "from . import train", "vmamba.train"),
        ("vmamba/studies/a.py", "import vmamba_cli", "vmamba_cli"),
    ],
)
def test_an_arrow_up_is_found(path: str, source: str, target: str) -> None:
    (found,) = wrong_arrows(path, source)
    assert found.endswith(f" imports {target}")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("vmamba/nn/a.py", "from vmamba.ops import selective_scan_2d\nfrom .block import VSSBlock"),
        ("vmamba/train/a.py", "import vmamba\nimport timm\nfrom vmamba.errors import UserError"),
        ("vmamba/__init__.py", "from . import ops"),
    ],
)
def test_an_arrow_down_is_not(path: str, source: str) -> None:
    assert wrong_arrows(path, source) == []


def run(code: str) -> str:
    """What a new Python prints."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_imports_without_the_extras_packages() -> None:
    """Triton among them, which torch and torchvision import by themselves where it is installed."""
    run("""
import sys
absent = ["triton", "lightning", "torchmetrics", "matplotlib", "mlxtend", "onnx"]
sys.modules.update(dict.fromkeys(absent))  # None: an import of it fails
import vmamba
assert all(sys.modules[name] is None for name in absent)
""")


def test_the_library_imports_no_extras_package() -> None:
    """Nor tries to: what torch and timm import by themselves is imported before."""
    run("""
import sys, torch, timm, timm.models, timm.data, torch.utils.flop_counter
class Refuse:
    def find_spec(self, name, path=None, target=None):
        absent = ("triton", "lightning", "torchmetrics", "matplotlib", "mlxtend", "onnx")
        assert name.split(".")[0] not in absent, name
before = set(sys.modules)
sys.meta_path.insert(0, Refuse())
import vmamba
assert not [m for m in set(sys.modules) - before if m.split(".")[0] == "triton"]
""")


def test_the_library_touches_no_device() -> None:
    run("""
import torch, timm
def refuse(*arguments):
    raise AssertionError("a device was asked for")
for name in ("_lazy_init", "init", "is_available", "device_count", "get_device_properties"):
    setattr(torch.cuda, name, refuse)
torch.backends.mps.is_available = torch.accelerator.is_available = refuse
import vmamba
""")


def test_the_commands_help_is_light() -> None:
    printed = run("""
import sys
sys.argv = ["vmamba", "--help"]
from vmamba_cli.__main__ import main
try:
    main()
except SystemExit as end:
    assert not end.code
print("LOADED", [m for m in ("torch", "timm", "vmamba", "lightning", "numpy") if m in sys.modules])
""")
    assert "LOADED []" in printed
    assert "predict" in printed
