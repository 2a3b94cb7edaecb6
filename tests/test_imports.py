"""Imports point one way, and importing the library or the command is light."""

import ast
import gc
import importlib
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from distributions import link_distributions, needed
from vmamba_cli._extra import importing

SRC = Path(__file__).parent.parent / "src"
FLOORS = [
    {"vmamba_cli"},
    {"vmamba.explorer", "vmamba.report", "vmamba.studies"},
    {"vmamba.bench"},  # it times a training step, so it stands above train
    {"vmamba.train", "vmamba.evaluate", "vmamba.analysis", "vmamba.export"},
    {"vmamba.environment"},  # it states vmamba's version
    {"vmamba"},  # vmamba/__init__.py, which gathers the public names of the floors below
    {"vmamba.dense_inference"},
    {"vmamba.inference"},
    {"vmamba.pretrained"},
    {"vmamba.heads", "vmamba.data"},
    {"vmamba.models"},
    {"vmamba.nn"},
    {"vmamba.ops"},
    {"vmamba.config", "vmamba.files", "vmamba.processes", "vmamba._torch_private"},
    {"vmamba.errors", "vmamba.labels", "vmamba.sizes", "vmamba.words"},
]
"""A module may import what stands on a lower floor, and what is in its own room."""

COMPOSES = "vmamba.studies"
"""May import the other rooms of its floor as well."""

LATE = {("vmamba.inference", "vmamba.train"), ("vmamba.inference", "vmamba.dense_inference")}
"""The arrows up: a task's predictor is imported only when a model of that task is loaded."""

RANK = {room: rank for rank, rooms in enumerate(FLOORS) for room in rooms}


def room_of(module: str) -> str | None:
    """The room that a module belongs to; None for modules of other packages."""
    names = module.split(".")
    candidates = (".".join(names[:length]) for length in (2, 1))
    return next((room for room in candidates if room in RANK), None)


def imported(source: str, package: str) -> set[str]:
    """The rooms that a module's text imports, wherever in it; relative imports start at `package`."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            rooms |= {room_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            rooms |= {room_of(f"{module}.{alias.name}") for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            rooms |= {room_of(a.value) for a in node.args if isinstance(getattr(a, "value", None), str)}
    return {room for room in rooms if room is not None}


def may_import(room: str, target: str) -> bool:
    """Whether an import points down."""
    if (room, target) in LATE:
        return True
    if RANK[target] == RANK[room]:
        return target == room or room == COMPOSES
    return RANK[target] > RANK[room]


def module_of(path: str) -> str:
    """The module at a path under src/."""
    return ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")


def wrong_arrows(path: str, source: str) -> list[str]:
    """The imports of a file, at a path under src/, that do not point down."""
    room = room_of(module_of(path))
    if room is None or (room == "vmamba" and module_of(path) != "vmamba"):
        return [f"{path} is on no floor; give its room a place in FLOORS"]
    package = ".".join(Path(path).parts[:-1])
    targets = sorted(imported(source, package))
    return [f"{path}: {room} imports {target}" for target in targets if not may_import(room, target)]


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
        ("vmamba/ops/a.py", "importlib.import_module('vmamba.models')", "vmamba.models"),
        ("vmamba/train/a.py", "from vmamba import analysis", "vmamba.analysis"),
        ("vmamba/train/tasks/a.py", "from vmamba import bench", "vmamba.bench"),
        ("vmamba/heads/a.py", "from vmamba.data.loading import Loader", "vmamba.data"),
        ("vmamba/inference.py", "import vmamba", "vmamba"),
        ("vmamba/files.py", "import vmamba.config", "vmamba.config"),
        ("vmamba/errors.py", "from vmamba.files import replacing", "vmamba.files"),
        ("vmamba/explorer/a.py", "import vmamba.studies.ladder", "vmamba.studies"),
        ("vmamba/__init__.py", "from . import train", "vmamba.train"),
        ("vmamba/studies/a.py", "import vmamba_cli", "vmamba_cli"),
    ],
)
def test_an_arrow_up_is_found(path: str, source: str, target: str) -> None:
    (wrong,) = wrong_arrows(path, source)
    assert wrong.endswith(f" imports {target}")


@pytest.mark.parametrize("path", ["vmamba/new.py", "vmamba/room/a.py", "other/a.py"])
def test_a_file_on_no_floor_is_found(path: str) -> None:
    (wrong,) = wrong_arrows(path, "")
    assert "is on no floor" in wrong


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("vmamba/nn/a.py", "from vmamba.ops import selective_scan_2d\nfrom .block import VSSBlock"),
        ("vmamba/train/a.py", "import vmamba\nimport timm\nfrom vmamba.errors import UserError"),
        ("vmamba/__init__.py", "from . import ops"),
        ("vmamba/__init__.py", "from vmamba.inference import load"),
        ("vmamba/bench/data.py", "from vmamba.train.session import Session\nfrom vmamba.bench import timing"),
        ("vmamba/studies/a.py", "from vmamba.explorer import page\nfrom vmamba.bench import models"),
        ("vmamba_cli/a.py", "from vmamba import studies\nfrom vmamba_cli._extra import load"),
    ],
)
def test_an_arrow_down_is_not(path: str, source: str) -> None:
    assert wrong_arrows(path, source) == []


def run(code: str, *options: str) -> str:
    """What a new Python prints."""
    command = [sys.executable, "-W", "error", *options, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Code that leaves only torch, timm, the package's core and what these need to be imported."""
    core = [name for name in metadata.requires("vmamba") or [] if "extra ==" not in name]
    names = needed(*core)
    assert {"torch", "timm", "typer", "pydantic"} <= names
    extras = {"lightning", "torchmetrics", "matplotlib", "mlxtend", "tensorboard", "datasets", "onnx", "yacs"}
    assert not names & (extras | {"scipy", "pandas", "scikit-learn"})
    folder = tmp_path_factory.mktemp("site-packages")
    link_distributions(names, folder)
    for package in SRC.iterdir():
        (folder / package.name).symlink_to(package)
    return f"import sys; sys.path.append({str(folder)!r})\n"


ABOVE = [room for rooms in FLOORS[: FLOORS.index({"vmamba.environment"})] for room in rooms]


def test_all_below_train_needs_torch_and_timm_alone(light: str) -> None:
    """In a Python that sees no other packages. The analyses draw with matplotlib, but import without it."""
    paths = [str(path.relative_to(SRC)) for path in SRC.rglob("*.py")]
    modules = sorted(module_of(path) for path in paths)
    absent = [room for room in ABOVE if room != "vmamba.analysis"]
    below = [module for module in modules if room_of(module) not in absent]
    assert {"vmamba", "vmamba.ops.cpu", "vmamba.data", "vmamba.analysis.attention"} <= set(below)
    run(light + f"import importlib\nfor name in {below}: importlib.import_module(name)", "-I", "-S")


def test_the_light_python_has_no_extras_packages(light: str) -> None:
    code = """
import importlib.util
for name in ("lightning", "torchmetrics", "matplotlib", "mlxtend", "datasets", "yacs", "pytest"):
    assert importlib.util.find_spec(name) is None, name
"""
    run(light + code, "-I", "-S")


def test_the_library_imports_without_the_extras_packages() -> None:
    """Triton among them, which torch and torchvision import by themselves where it is installed."""
    run("""
import sys
absent = ["triton", "lightning", "torchmetrics", "matplotlib", "mlxtend", "onnx"]
sys.modules.update(dict.fromkeys(absent))  # None: an import of it fails
import vmamba
assert all(sys.modules[name] is None for name in absent)
""")


def test_the_library_imports_no_extras_package_and_touches_no_device() -> None:
    """Nor tries to: what torch and timm import by themselves is imported before."""
    run("""
import sys, torch, timm, timm.models, timm.data, torch.utils.flop_counter
class Refuse:
    def find_spec(self, name, path=None, target=None):
        absent = ("triton", "lightning", "torchmetrics", "matplotlib", "mlxtend", "onnx")
        assert name.split(".")[0] not in absent, name
def refuse(*arguments):
    raise AssertionError("a device was asked for")
for name in ("_lazy_init", "init", "is_available", "device_count", "get_device_properties"):
    setattr(torch.cuda, name, refuse)
torch.backends.mps.is_available = torch.accelerator.is_available = refuse
before = set(sys.modules)
sys.meta_path.insert(0, Refuse())
import vmamba
assert not [m for m in set(sys.modules) - before if m.split(".")[0] == "triton"]
""")


def test_garbage_is_not_searched_for_in_what_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_searched(thing: object) -> bool:
        return any(each is thing for each in gc.get_objects())

    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    before: list[object] = [[]]
    with importing():
        pass
    assert is_searched(before)
    with importing():
        with importing():
            importlib.import_module("colorsys")
        assert not gc.isenabled()
    assert gc.isenabled()
    assert not is_searched(before)
    after: list[object] = [[]]
    assert is_searched(after)
    with pytest.raises(ModuleNotFoundError), importing():
        importlib.import_module("colorsys.none")
    assert gc.isenabled()


def test_training_loads_no_signal_processing() -> None:
    """Which Lightning would, with more than a second; who uses it gets it, inside the block and after it."""
    pytest.importorskip("scipy")
    run("""
import sys
from vmamba_cli._extra import load, signal_processing_later
load("vmamba.train.run", "train")
assert "torchmetrics" in sys.modules and "scipy.signal" not in sys.modules
with signal_processing_later():
    import scipy.signal
    assert "scipy.signal.windows" not in sys.modules and hasattr(scipy.signal, "hamming")
    from scipy.signal import fftconvolve
    assert fftconvolve is sys.modules["scipy.signal"].fftconvolve
assert scipy.signal.windows.hamming(3).shape == (3,)
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
