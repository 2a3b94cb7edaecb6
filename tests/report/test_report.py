import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from report.report_places import make_evaluation, make_run
from vmamba.errors import DataError, MissingCheckpointError
from vmamba.report import read_records, report_page
from vmamba_cli.__main__ import app

VOID = {"meta", "img", "line", "circle", "rect", "path", "polyline"}


class Page(HTMLParser):
    """A page's elements and text; checks that elements are closed in the order in which they open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(*runs: Path, evaluations: tuple[Path, ...] = ()) -> Page:
    return Page(report_page(read_records(runs, evaluations)))


def report(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_a_run_of_each_task(task: str, tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "mine", task))
    assert f"{task.capitalize()} The runs in short mine" in page.text
    (label,) = [
        label for each in page.all("svg") if (label := each.get("aria-label")) and label.startswith("loss ")
    ]
    assert "train/loss: 2.5 at epoch 1" in label
    assert "torch 2.9.9" in page.text
    assert "vmamba train 'a b.yaml'" in page.text
    assert "optim.lr: 1 → 2" in page.text
    assert "The paper has neither these data nor these models." in page.text
    assert "no evaluation by the full protocol" in page.text
    assert "--evaluation FOLDER" in page.text


def test_it_stands_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    make_evaluation(run / "report", "mine", {"top1": 0.5})
    page = page_of(run)
    assert not page.all("script")
    assert not page.all("link")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    sources = [attributes["src"] for _, attributes in page.elements if "src" in attributes]
    assert sources
    assert all(str(source).startswith("data:image/") for source in sources)
    assert not [attributes for _, attributes in page.elements if "href" in attributes]
    assert not page.all("b")
    assert not page.all("i")
    assert "<i>149</i>" not in page.text
    assert "<i>99</i>" in page.text
    assert "The first 100 of 150 rows." in page.text
    assert all(attributes["alt"] for attributes in page.all("img"))


def test_pictures_are_resized(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    make_evaluation(run / "report", "mine", {"top1": 0.5})
    Image.new("RGB", (3, 3)).save(run / "drawn.png")
    (run / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (run / "curves.png").write_bytes(b"is drawn as SVG instead")
    page = page_of(run)
    images = page.all("img")
    assert len(images) == 2
    data = str(images[0]["src"]).partition("base64,")[2]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (1600, 200)
    assert images[1]["alt"] == "mine: drawn.png"
    assert f"{run / 'broken.png'}: " in page.text


def test_runs_side_by_side(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a" / "run", args={"drop_path_rate": 0.5})
    second = make_run(tmp_path / "b" / "run", args={})
    page = page_of(first, second, first)
    assert f"The runs in short {first} {second} folder" in page.text
    assert "model.args drop_path_rate: 0.5 {}" in page.text
    labels = [str(each["aria-label"]) for each in page.all("svg") if "aria-label" in each]
    accuracy = next(label for label in labels if label.startswith("top1 over epochs"))
    assert f"{first}, val/top1: 0.1 at epoch 1, 0.75 at epoch 2" in accuracy
    assert f"{second}, val/top1: 0.1 at epoch 1, 0.75 at epoch 2" in accuracy


def test_tasks_have_chapters(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a"), make_run(tmp_path / "b", "segmentation"))
    assert "Classification The runs in short a folder" in page.text
    assert "Segmentation The runs in short b folder" in page.text


def test_the_papers_numbers_are_marked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", classes=1000, name="vmamba_tiny_s2l5", args={})
    make_evaluation(tmp_path / "flipped", "mine", {"top1": 0.875}, flip=True)
    assert (
        "mine (vmamba_tiny_s2l5) 30.7 M measured 0.10 at 32×32 measured 75.00 measured" in page_of(run).text
    )
    make_evaluation(tmp_path / "plain", "mine", {"top1": 0.5})
    text = page_of(run).text
    assert "mine (vmamba_tiny_s2l5) 30.7 M measured 0.10 at 32×32 measured 50.00 measured" in text
    assert "VMamba-T – this model 31 M quoted 4.9 quoted 82.5 quoted" in text
    assert "Swin-T 28 M quoted 4.6 quoted 81.3 quoted" in text


def test_other_data_have_other_accuracies(tmp_path: Path) -> None:
    text = page_of(make_run(tmp_path / "mine", name="vmamba_tiny")).text
    assert "VMamba-T – this model 31 M quoted 4.9 quoted No accuracy is set beside" in text
    assert "82.5" not in text
    assert "Swin-T" not in text


def test_the_average_over_sizes_is_a_score_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", "segmentation", 150)
    make_evaluation(tmp_path / "sizes", "mine", {"mIoU": 0.375}, scales=[0.75, 1.0])
    text = page_of(run).text
    assert "25.00 measured 37.50 measured" in text
    assert "VMamba-T 62.4 M quoted 947.8 quoted 48.3 quoted 48.6 quoted" in text


@pytest.mark.parametrize(
    "source", ["runs/mine", "mine", "mine/checkpoints/best.ckpt", "runs/mine/best.safetensors", "{run}"]
)
def test_evaluations_in_the_run_and_beside_it_are_of_it(source: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "mine")
    other = make_run(tmp_path / "runs" / "other")
    for place in (run / "report", run / "both" / "ema", run.parent / "beside"):
        make_evaluation(place, source.format(run=run), {"top1": 0.5})
    (run.parent / "bench").mkdir()
    (run.parent / "bench" / "results.json").write_text('{"results": []}')
    (mine,) = read_records([run / "checkpoints"])
    assert {each.folder.name for each in mine.judgements} == {"report", "ema", "beside"}
    assert read_records([other])[0].judgements == []


def test_an_evaluation_elsewhere_is_named(tmp_path: Path) -> None:
    run, other = make_run(tmp_path / "runs" / "mine"), make_run(tmp_path / "runs" / "other")
    place = make_evaluation(tmp_path / "far" / "away" / "report", "runs/mine", {"top1": 0.5})
    assert read_records([run])[0].judgements == []
    assert [each.folder for each in read_records([run, other], [place])[0].judgements] == [place]
    with pytest.raises(DataError, match=f"report: an evaluation of runs/mine, which is none of .*: {other}"):
        read_records([other], [place])


def test_an_evaluation_from_before_a_resumption_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    make_evaluation(run / "old", "mine", {"top1": 0.5}, date="2026-01-02T00:00:00+00:00")
    make_evaluation(run / "new", "mine", {"top1": 0.5})
    text = page_of(run).text
    assert "2026-01-02T00:00:00+00:00 (before the run was resumed) 9" in text
    assert "2026-01-04T00:00:00+00:00 9" in text


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine", metrics="")
    for name in ("metrics.csv", "config.json", "history.jsonl", "checkpoints/last.ckpt"):
        (run / name).unlink()
    text = page_of(run).text
    assert "state unfinished length 0 of 3 epochs" in text
    assert "No evaluation has been written yet." in text


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    (run / "checkpoints" / "last.ckpt").unlink()
    assert "state no checkpoint length 2 of 3 epochs" in page_of(run).text


def test_several_evaluations_an_epoch_are_drawn_over_steps(tmp_path: Path) -> None:
    metrics = "epoch,step,val/top1\n1,4,0.25\n1,8,0.5\n"
    page = page_of(make_run(tmp_path / "mine", metrics=metrics))
    labels = [str(each["aria-label"]) for each in page.all("svg") if "aria-label" in each]
    assert "top1 over steps. val/top1: 0.25 at step 4, 0.5 at step 8" in labels[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.csv", "epoch,step\nnone,4\n", "not a run of vmamba, or a damaged one"),
        ("metrics.csv", "epoch,step,val/top1,lr\n1,4,0.5,fast\n", "line 2: expected a number in every cell"),
        ("metrics.csv", "epoch,step,val/top1\n1,4,0.5,0.5\n", "line 2: expected a number in every cell"),
        ("metrics.csv", "epoch,step,lr\n1,,0.5\n2,8,0.5\n", "line 2: expected a number in every cell"),
        ("recipe.yaml", "task: [", "not a run of vmamba, or a damaged one"),
        ("env.json", "{", "env.json: damaged"),
        ("env.json", "[]", "env.json: damaged .expected a mapping, got list"),
        ("history.jsonl", '{"step": 0}\n{"st', "history.jsonl: damaged"),
        ("config.json", "{", "config.json: cannot be read as JSON"),
    ],
)
def test_damaged_files_are_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    (run / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_records([run])


@pytest.mark.parametrize("content", ["{", "{}", '{"source": "mine", "weights": "raw"}'])
def test_damaged_results_are_named(content: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match=r"results\.json: (damaged|not the results of `vmamba eval`)"):
        read_records([run], [tmp_path])


def test_what_is_no_run(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "mine")
    with pytest.raises(DataError, match=r"not a run of vmamba.*; name one of the runs in it: .*mine"):
        read_records([tmp_path / "runs"])
    with pytest.raises(MissingCheckpointError, match="no such run"):
        read_records([tmp_path / "none"])


def test_the_command(tmp_path: Path) -> None:
    run, out = make_run(tmp_path / "mine"), tmp_path / "new" / "page.html"
    done = report(run, "--out", out)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"wrote {out} (0.0 MB)\n"
    assert Page(out.read_text(encoding="utf-8")).all("title")
    place = make_evaluation(tmp_path / "far" / "a" / "b", "mine", {"top1": 0.5})
    assert report(run, "--evaluation", place, "--out", out).exit_code == 0
    assert "50.00" not in out.read_text(encoding="utf-8")
    assert "0.5000" in out.read_text(encoding="utf-8")


def test_the_command_refuses(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    for arguments, message in (
        ((run, "--out", tmp_path / "page.pdf"), "expected a name that ends in .html"),
        ((run, "--out", tmp_path / "mine.html"), "mine.html: a folder"),
        ((tmp_path / "min", "--out", tmp_path / "a.html"), "no such run; did you mean"),
        ((run, "--out", tmp_path / "mine" / "env.json" / "a.html"), "a.html: cannot be written"),
        (
            (run, "--evaluation", tmp_path, "--out", tmp_path / "a.html"),
            "no evaluation, it has no results.json",
        ),
    ):
        (tmp_path / "mine.html").mkdir(exist_ok=True)
        done = report(*arguments)
        assert done.exit_code == 2
        assert done.stderr.startswith("vmamba: ")
        assert message in done.stderr.replace("\n", " ")


def test_json_values_are_plain(tmp_path: Path) -> None:
    run = make_run(tmp_path / "mine")
    (run / "env.json").write_text(json.dumps({"backends": {"cpu": "available"}, "gpus": []}))
    assert "backends cpu: available gpus []" in page_of(run).text
