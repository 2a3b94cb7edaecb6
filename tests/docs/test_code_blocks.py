"""Every code block of README and docs runs, or says in the page's source why not and is checked all the same.

- Python: the blocks of a page run one after another in one namespace, in a folder with stand-ins for a
  reader's files (see `docs.workplace`). Pages under docs/extend/ add to registries, and so run in a process
  of their own.
- Shell: `vmamba …` runs. In a block marked `<!-- not run: REASON -->` the verb, its options and every change
  to the recipe are checked, and of `make`, `python` and `pip` that target, file and extra exist.
- YAML parses; "text" is output.
"""

import functools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import typer
import yaml
from typer.testing import CliRunner

from docs.blocks import PAGES, ROOT, Block, blocks, commands
from docs.workplace import prepare
from vmamba_cli.__main__ import app

BLOCKS = [block for page in PAGES for block in blocks(page)]


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("docs")
    prepare(place)
    return place


@pytest.fixture
def workplace(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(prepared)
    monkeypatch.setenv("TORCH_HOME", str(prepared / "torch"))
    return prepared


def test_every_block_is_checked() -> None:
    assert len(BLOCKS) > 30, "the test looks in the wrong place"
    assert {block.language for block in BLOCKS} <= {"python", "bash", "yaml", "text"}


def run_python(page: Path) -> None:
    """Run a page's Python; an error's traceback shows the page's own lines."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python" and block.not_run is None:
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            exec(code, namespace)


def smaller(create_model: Callable[..., Any], name: str, **arguments: Any) -> Any:
    """`timm.create_model` of a `vmamba_pico` with one block."""
    small = {"depths": (1,), "dims": (8,)} if name == "vmamba_pico" else {}
    return create_model(name, **small, **arguments)


PYTHON_PAGES = sorted({block.page for block in BLOCKS if block.language == "python"})
EXTENDING = [page for page in PYTHON_PAGES if page.parent.name == "extend"]


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=page_name)
def test_python_compiles(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, str(block), "exec")


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("page", [page for page in PYTHON_PAGES if page not in EXTENDING], ids=page_name)
def test_python(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name == "deploy.md":  # torch.export takes seconds for each block
        monkeypatch.setattr(timm, "create_model", functools.partial(smaller, timm.create_model))
    run_python(page)


def test_python_of_extensions(workplace: Path) -> None:
    """One process for all: starting it takes longer than their blocks."""
    code = f"""
import sys
sys.path[:0] = {[str(ROOT / "tests"), str(ROOT / "src")]}
from pathlib import Path
from docs.test_code_blocks import run_python
for page in sys.argv[1:]:
    run_python(Path(page))
"""
    subprocess.run([sys.executable, "-c", code, *map(str, EXTENDING)], check=True, timeout=180)


def invoke(*arguments: str) -> None:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, f"vmamba {' '.join(arguments)}: {result.output}"


def check_vmamba(arguments: list[str]) -> None:
    """The verb exists, takes the options, and its recipe the changes."""
    command: Any = typer.main.get_command(app)
    rest = [a for a in arguments if a not in ("--debug",)]
    if rest[0] in ("--help", "--version"):
        return
    names = []
    while hasattr(command, "get_command"):
        names.append(rest.pop(0))
        command = command.get_command(None, names[-1])
        assert command is not None, f"vmamba {' '.join(names)}: no such verb"
    command.make_context(" ".join(names), list(rest))
    changes = [a for a in rest if re.match(r"[a-z_]+\.[a-z_.]+=", a)]
    recipe = next((a for a in rest if a.endswith(".yaml")), None)
    if recipe is None and changes:  # of a run, whose recipe lies in its folder
        recipe = str(Path(next(a for a in rest if a.startswith("runs/"))) / "recipe.yaml")
    if recipe is not None:
        invoke("train", recipe, *changes, "--print-config")


def check_other(words: list[str]) -> None:
    """What is not of the command: the target, file or extra exists."""
    program, *arguments = words
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert set(arguments) <= targets, f"make: no target {set(arguments) - targets}"
    elif program in ("python", "bash") and arguments[0] != "-m":
        assert (ROOT / arguments[0]).is_file(), arguments[0]
    elif program == "pip":
        known = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        for extras in re.findall(r"(?:vmamba|\.)\[([\w,]+)\]", " ".join(arguments)):
            assert set(extras.split(",")) <= set(known), extras
    else:
        assert program in ("git", "cd", "python", "pre-commit", "pytest"), f"{program}: cannot be checked"


SHELL_BLOCKS = [block for block in BLOCKS if block.language == "bash"]


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=str)
def test_shell(block: Block, workplace: Path) -> None:
    for words in commands(block.text):
        if words[0] != "vmamba":
            check_other(words)
            assert block.not_run, f"{words[0]} is not run: say so in an HTML comment before the block"
            continue
        check_vmamba(words[1:])
        if block.not_run is None:
            invoke(*words[1:])


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=str)
def test_yaml(block: Block) -> None:
    assert yaml.safe_load(block.text) is not None


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_to_files(page: Path) -> None:
    """Those of README too, and those that leave docs/; `mkdocs build --strict` sees the rest, and anchors."""
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not re.match(r"\w+:", target):
            assert (page.parent / target).exists(), target
