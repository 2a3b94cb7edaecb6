"""The verbs as a user calls them; but for Ctrl-C in this process, since each new one imports for seconds."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
import yaml
from PIL import Image

from images import COLOURS, make_folder, tiny_values
from vmamba.train.run import Outcome
from vmamba_cli import __main__
from vmamba_cli.__main__ import VERBS, app, main
from vmamba_cli.train import show


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images/ and recipe.yaml, whose paths are relative."""
    place = tmp_path_factory.mktemp("place")
    make_folder(place / "images")
    (place / "recipe.yaml").write_text(yaml.safe_dump(tiny_values(Path("images"))))
    return place


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    done = vmamba(place, "train", "recipe.yaml", "--out", "run", "schedule.epochs=12", "optim.lr=5e-3")
    assert done.status == 0, done.stderr
    assert done.stdout.endswith("wrote run; next: vmamba eval run\n")
    assert "best val/top1 " in done.stdout
    return place / "run" / "checkpoints" / "best.ckpt"


REPORT = {
    "results.json",
    "per_class.csv",
    "confusion.csv",
    "confusion.png",
    "predictions.csv",
    "mistakes.csv",
}


class Done(NamedTuple):
    status: int
    stdout: str
    stderr: str


def vmamba(place: Path, *arguments: str) -> Done:
    """Call the command in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "argv", ["vmamba", *arguments])
        stdout, stderr = StringIO(), StringIO()
        with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as raised:
            main()
    return Done(int(raised.value.code or 0), stdout.getvalue(), stderr.getvalue())


def assert_told(done: Done, *message: str) -> None:
    """One message, on stderr alone, and no traceback."""
    assert done.status == 2
    assert done.stdout == ""
    assert done.stderr.startswith("vmamba: ")
    assert "Traceback" not in done.stderr
    for part in message:
        assert part in done.stderr


def test_train_eval_predict(place: Path, trained: Path) -> None:
    done = vmamba(place, "eval", str(trained), "--json", "train.batch_size=6")
    assert done.status == 0, done.stderr
    scores = json.loads(done.stdout)
    assert scores.keys() == {"weights", "samples", "skipped", "loss", "top1", "top5", "calibration_error"}
    assert scores["top1"] > 0.8

    images = [f"images/val/{name}/0.png" for name in COLOURS]
    done = vmamba(place, "predict", *images, "--checkpoint", str(trained), "--json")
    assert done.status == 0, done.stderr
    actual = json.loads(done.stdout)
    assert [one["image"] for one in actual] == images
    assert all({c["label"] for c in one["classes"]} == set(COLOURS) for one in actual)

    done = vmamba(place, "predict", *images, "--checkpoint", str(trained), "--top", "1")
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    for line, one in zip(lines, actual, strict=True):
        best = one["classes"][0]
        assert line == f"{one['image']}: {best['label']} {best['score']:.1%}"


def test_a_whole_report(place: Path) -> None:
    done = vmamba(place, "train", "recipe.yaml", "--out", "averaged", "train.ema_decay=0.5")
    assert done.status == 0, done.stderr
    asked = ["eval", "averaged", "--weights", "both", "--flip", "--scales", "1,1.25", "--per-class"]
    done = vmamba(place, *asked, "--out", "report")
    assert done.status == 0, done.stderr
    for kind in ("raw", "ema"):
        assert f"averaged, {kind} weights, 18 samples" in done.stdout
        names = {path.name for path in (place / "report" / kind).iterdir()} - {"mistakes.png"}
        assert names == REPORT
    assert all(done.stdout.count(name) >= 2 for name in COLOURS)
    actual = json.loads(vmamba(place, *asked, "--json").stdout)
    assert [each["weights"] for each in actual] == ["ema", "raw"]
    assert [row["name"] for row in actual[0]["per_class"]] == sorted(COLOURS)
    saved = json.loads((place / "report" / "ema" / "results.json").read_text())
    assert (saved["flip"], saved["scales"]) == (True, [1.0, 1.25])
    assert saved["scores"]["top1"] == actual[0]["top1"]
    for kind in ("raw", "ema"):
        done = vmamba(place, "predict", "images/val/red/0.png", "--checkpoint", "averaged", "--weights", kind)
        assert done.status == 0, done.stderr
    assert_told(vmamba(place, "eval", "averaged", "--scales", "nan"), "scales: expected numbers above 0")
    assert vmamba(place, "eval", "averaged", "--scales", "1;2").status == 2
    assert vmamba(place, "eval", "averaged", "--out", "recipe.yaml").status == 2


def test_runs_side_by_side(place: Path, trained: Path) -> None:
    (place / "foreign").mkdir()
    (place / "foreign" / "recipe.yaml").write_text("eggs: 3\n")
    (place / "foreign" / "env.json").write_text("{}")
    done = vmamba(place, "runs", ".", "--sort", "best")
    assert done.status == 0
    row = next(line for line in done.stdout.splitlines() if line.startswith("run "))
    assert row.split()[:4] == ["run", "model", "state", "epochs"]
    (row,) = (line for line in done.stdout.splitlines() if "12/12" in line)
    assert row.split()[:6] == ["run", "test_convnext", "finished", "12/12", "48", "top1"]
    assert done.stderr.startswith("foreign: not a run of vmamba")
    actual = json.loads(vmamba(place, "runs", ".", "--json").stdout)
    assert {"run", "foreign"} <= {each["name"] for each in actual}
    assert_told(vmamba(place, "runs", "nowhere"), "nowhere: no such folder")
    assert_told(vmamba(place, "runs", ".", "--sort", "size"), "no order 'size'")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_each_verbs_module_knows_the_tasks() -> None:
    """In a process where no other verb ran before; what is not ours is imported once for all."""
    code = """
import importlib, os, sys
from vmamba_cli._extra import signal_processing_later
with signal_processing_later():
    import lightning.pytorch, timm, torchmetrics, torchvision
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        importlib.import_module(f"vmamba.train.{name}")
        importlib.import_module("vmamba.train.tasks").task_type("classification")
        os._exit(0)  # without tidying up, which takes longer than the imports
    assert os.waitpid(child, 0)[1] == 0, name
"""
    command = [sys.executable, "-c", code, "run", "evaluation", "runs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_report_of_one_kind_of_weights(place: Path, trained: Path) -> None:
    done = vmamba(place, "eval", "run", "--per-class", "--out", "single")
    assert done.status == 0, done.stderr
    assert "run, raw weights, 18 samples" in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.split()[0] in COLOURS]) == 3
    # A picture of mistakes only where there are some.
    assert {path.name for path in (place / "single").iterdir()} - {"mistakes.png"} == REPORT
    assert_told(vmamba(place, "eval", "run", "--scales", "0"), "scales: expected numbers above 0")
    assert_told(vmamba(place, "eval", "run", "--weights", "both"), "has no 'ema' weights")


def test_print_config_writes_nothing(place: Path) -> None:
    done = vmamba(place, "train", "recipe.yaml", "optim.lr=3e-4", "--print-config", "--out", "none")
    assert done.status == 0
    assert yaml.safe_load(done.stdout)["optim"]["lr"] == 3e-4
    assert not (place / "none").exists()


def test_bad_recipes_are_told(place: Path) -> None:
    done = vmamba(place, "train", "recipe.yaml", "optim.lrr=1.0", "train.batch_size=many", "--out", "none")
    assert_told(done, "optim.lrr: no such key; did you mean 'lr'?", "train.batch_size: ", "got 'many'")
    assert_told(vmamba(place, "train", "none.yaml"), "none.yaml: no such recipe")
    assert not (place / "none").exists()


def test_what_is_no_recipe_is_told(place: Path, trained: Path) -> None:
    """The guesses of those who know other programs."""
    for arguments in (["--epochs", "3", "recipe.yaml"], ["recipe.yaml", "--epochs=3"]):
        done = vmamba(place, "train", *arguments)
        assert_told(done, "train: no option --epochs; ", "without dashes behind it: schedule.epochs=…")
    assert "No such option: --epoxy" in vmamba(place, "train", "recipe.yaml", "--epoxy").stderr
    done = vmamba(place, "train", "data.root=images", "optim.lr=1")
    assert_told(done, "data.root=images: a setting, and the recipe is missing before it: recipes/")
    done = vmamba(place, "train", "images")
    assert_told(
        done, "images: a folder; expected a recipe (.yaml), whose data.root is the folder of images\n"
    )
    done = vmamba(place, "train", str(trained.parent.parent))
    assert_told(done, f"; to go on with the run in it: vmamba resume {trained.parent.parent}\n")


@pytest.mark.parametrize("option", __main__._KEYS)
def test_options_point_to_keys_that_exist(option: str, place: Path) -> None:
    section, key = __main__._KEYS[option].split(".")
    done = vmamba(place, "train", "recipe.yaml", "--print-config")
    assert key in yaml.safe_load(done.stdout)[section]


def test_bad_images_and_checkpoints_are_told(place: Path, trained: Path) -> None:
    (place / "broken.png").write_bytes((place / "images/val/red/0.png").read_bytes()[:99])
    done = vmamba(place, "predict", "images/val/red/0.png", "broken.png", "--checkpoint", str(trained))
    assert (done.status, done.stdout.count("\n")) == (1, 1)  # the other image has its answer
    assert "vmamba: broken.png: not an image, or a damaged one" in done.stderr
    (place / "cut.ckpt").write_bytes(trained.read_bytes()[:-100])
    assert_told(vmamba(place, "eval", "cut.ckpt"), "cut.ckpt: damaged")
    assert_told(vmamba(place, "eval", "none.ckpt"), "none.ckpt: no such run, checkpoint or recipe")


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT to a process")
def test_ctrl_c_and_resume(place: Path) -> None:
    """Ctrl-C reaches every process of the group, the data workers too."""
    command = [sys.executable, "-m", "vmamba_cli", "train", "recipe.yaml", "--out", "stopped"]
    process = subprocess.Popen(
        [*command, "schedule.epochs=60", "train.workers=1"],
        cwd=place,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not (place / "stopped" / "metrics.csv").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130, message
    assert "to go on: vmamba resume stopped" in message
    assert "Traceback" not in message
    last = torch.load(place / "stopped" / "checkpoints" / "last.ckpt", weights_only=True)
    assert 4 <= last["global_step"] < 240

    done = vmamba(place, "train", "--resume", "stopped", "--out", "other")
    assert done.status == 2
    assert "overrides of how" in done.stderr


def test_resume_is_a_verb(place: Path) -> None:
    done = vmamba(place, "train", "recipe.yaml", "--out", "extended", "schedule.epochs=2")
    assert done.status == 0, done.stderr
    refused = vmamba(place, "resume", "extended", "schedule.epochs=3")
    assert_told(refused, "override 'schedule.epochs=3'", "add --extend")
    done = vmamba(place, "resume", "extended/checkpoints", "schedule.epochs=3", "--extend")
    assert done.status == 0, done.stderr
    assert "epoch 3, step 12 of 12: " in done.stderr
    done = vmamba(place, "resume", "extended")
    assert done.status == 0, done.stderr
    longer = (
        "this run is finished: 3 of 3 epochs; to train it longer: vmamba resume extended schedule.epochs=6"
    )
    assert f"{longer} --extend\n" in done.stderr
    assert done.stdout.endswith("nothing left to train in extended; next: vmamba eval extended\n")
    assert_told(vmamba(place, "resume", "extendet"), "extendet: no such run; did you mean extended?")


def test_a_mistyped_verb(place: Path) -> None:
    done = vmamba(place, "trian")
    assert done.status == 2
    assert "no verb 'trian'; did you mean train?" in done.stderr


def test_what_is_mistyped_is_told_before_pytorch_is_imported(place: Path) -> None:
    code = (
        "import sys; from vmamba_cli.__main__ import main; sys.argv = ['vmamba', *sys.argv[1:]]\n"
        "try:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    )
    for arguments in (["train", "recipe.yml"], ["eval", "rum"], ["resume", "rum"], ["train", "images"]):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (2, "False\n"), done.stderr
        assert done.stderr.startswith(f"vmamba: {arguments[1]}: ")


def test_results_cannot_be_written(place: Path, trained: Path) -> None:
    """Found out before the evaluation."""
    done = vmamba(place, "eval", "run", "--out", "recipe.yaml/below")
    assert_told(done, "recipe.yaml/below: cannot be written to")
    (place / "blocked" / "raw" / "mistakes.csv").mkdir(parents=True)
    done = vmamba(place, "eval", "run", "--out", "blocked/raw")
    assert_told(done, "mistakes.csv: a folder, where a file of results may be written")
    # Of two reports the second is looked at before the first is computed.
    done = vmamba(place, "eval", "run", "--weights", "both", "--out", "blocked")
    assert_told(done, "mistakes.csv: a folder, where a file of results may be written")
    assert_told(
        vmamba(place, "train", "recipe.yaml", "--out", "recipe.yaml"), "cannot be the folder of a run"
    )
    assert_told(vmamba(place, "train", "recipe.yaml", "--out", 300 * "x"), "name too long")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
@pytest.mark.parametrize("verb", ["list", "train recipe.yaml --print-config"], ids=["list", "train"])
def test_a_full_device(verb: str, place: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "vmamba_cli", *verb.split()]
        done = subprocess.run(command, cwd=place, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "vmamba: the output cannot be written: No space left on device\n"


def verbs() -> list[tuple[list[str], Any]]:
    """Each verb, with its subverb if it has some, and its parameters."""
    group: Any = typer.main.get_command(app)
    found = []
    for name in VERBS:
        verb = group.get_command(None, name)
        below = getattr(verb, "commands", None)
        found += [([name, sub], below[sub]) for sub in below] if below else [([name], verb)]
    return found


@pytest.mark.parametrize(("verb", "command"), [pytest.param(*each, id=" ".join(each[0])) for each in verbs()])
def test_the_help_shows_every_word(
    verb: list[str], command: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rich takes words in brackets for markup, and leaves them out."""
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 400)
    done = vmamba(place, *verb, "--help")
    shown = " ".join(done.stdout.replace("│", " ").split())
    for parameter in command.params:
        if help := getattr(parameter, "help", None):
            assert " ".join(help.split()) in shown, parameter.name
    first = command.help.partition("\n\n")[0]
    assert " ".join(first.split()) in shown


def test_the_help_shows_where_a_run_goes(place: Path) -> None:
    done = vmamba(place, "train", "--help")
    assert "runs/ and the recipe's name" in " ".join(done.stdout.split())


def test_the_last_lines_show_the_best_score(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(Outcome(Path("run"), {"val/top1": 0.5}, "val/top1", 0.75, 12))
    assert capsys.readouterr().out.splitlines() == [
        "last evaluation:",
        "  val/top1 0.5000",
        "best val/top1 0.7500, after step 12: run/checkpoints/best.ckpt, and its weights in best.safetensors",
        "wrote run; next: vmamba eval run",
    ]


NOISY = """
import sys, PIL.Image
from vmamba_cli.__main__ import main
PIL.Image.MAX_IMAGE_PIXELS = 1100  # Pillow warns of more, and refuses twice as many
for line in sys.stdin:
    sys.argv = ["vmamba", *line.split()]
    try:
        main()
    except SystemExit as done:
        print("status", done.code)
"""


def test_no_warnings_of_other_libraries(place: Path, tmp_path: Path) -> None:
    """More workers than processors, transparent palettes, large images, old files, a warm-up to the end."""
    make_folder(tmp_path / "images")
    for path in (tmp_path / "images").glob("*/red/*.png"):
        with Image.open(path) as image:
            palette = image.resize((40, 30)).quantize(16)
        palette.save(path, transparency=bytes(range(16)))
    torch.save({"weight": torch.ones(1)}, tmp_path / "old.pth", pickle_protocol=3)
    workers = f"train.workers={(os.cpu_count() or 1) + 1}"
    lines = [
        f"train {place}/recipe.yaml --out run data.root=images {workers} schedule.epochs=2",
        "eval run",
        "predict images/val/red/0.png --checkpoint run",
        "eval old.pth",
    ]
    done = subprocess.run(
        [sys.executable, "-c", NOISY],
        cwd=tmp_path,
        input="\n".join(lines),
        capture_output=True,
        text=True,
        check=False,
    )
    statuses = [line for line in done.stdout.splitlines() if line.startswith("status")]
    assert statuses == ["status 0", "status 0", "status 0", "status 2"], done.stderr
    assert "old.pth: not the checkpoint of a run" in done.stderr
    told = [line for line in done.stderr.splitlines() if "warn" in line.lower()]
    assert told == []
