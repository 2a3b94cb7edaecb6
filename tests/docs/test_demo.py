"""What the demo says and how it fails; `.ci/run` runs all of it."""

import importlib.util
import shlex
import sys
from pathlib import Path

import pytest

from docs.blocks import ROOT, commands
from docs.test_code_blocks import check_vmamba

spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
assert spec is not None
assert spec.loader is not None
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)


def test_the_commands_that_it_recommends_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = demo.look_at(Path("runs/demo"), Path("runs/demo/digits"), "runs/demo/cifar10/00-cat.png")
    lines = [line for line in text.splitlines() if line.startswith(f"  {demo.program()} ")]
    verbs = [line.split(f"{demo.program()} ")[1].split()[0] for line in lines]
    assert verbs == ["explore", "predict", "list", "--help"]
    for line in lines:
        (words,) = commands(line)
        assert words[0] == "vmamba"
        check_vmamba(words[1:])


def test_its_program_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(shlex.split(demo.program())[0]).exists()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    assert demo.program() == f"{Path('bin', 'python')} -m vmamba_cli"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "vmamba").touch(mode=0o755)
    assert demo.program() == str(Path("bin", "vmamba"))


def test_images_are_named_by_what_they_show(tmp_path: Path) -> None:
    if importlib.util.find_spec("foolbox") is None:
        pytest.skip("the images come with the package foolbox, which is missing")
    demo.copy_images(tmp_path, [f"class {number}" for number in range(10)])
    assert len(list((tmp_path / "cifar10").iterdir())) == 20
    assert (tmp_path / "cifar10" / "00-class 3.png").exists()
    assert (tmp_path / "mnist" / "00-7.png").exists()


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install foolbox"):
        demo.copy_images(tmp_path, [])


def test_a_command_that_fails_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.run("predict", "nowhere.png", "--model", demo.MODEL)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == f"\n$ {demo.program()} predict nowhere.png --model vmamba_pico_wide\n"
    assert "nowhere.png" in printed.err
