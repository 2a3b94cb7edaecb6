"""`vmamba analyze` as a user calls it."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import vmamba
from images import make_folder
from predicting import Done, call
from vmamba.analysis import memory
from vmamba.analysis.attention import scan_attention
from vmamba.analysis.backbones import read_input
from vmamba.analysis.complexity import count
from vmamba.analysis.receptive_field import high_contribution_ratio, receptive_field
from vmamba.data.preprocessing import Preprocessing
from vmamba.pretrained import model_config, save_pretrained

pytest.importorskip("matplotlib")

ARGS = {"depths": (1, 2), "dims": (8, 16), "stem_stride": 4}
PREPROCESSING = Preprocessing(size=(32, 32), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/ and trained/, a model whose weights stand for trained ones."""
    place = tmp_path_factory.mktemp("place")
    make_folder(place / "photos", each=1)
    torch.manual_seed(7)
    model = timm.create_model("vmamba_pico", num_classes=3, **ARGS)
    save_pretrained(
        place / "trained", model, model_config(model, PREPROCESSING, ["a", "b", "c"], model_args=ARGS)
    )
    (place / "broken.jpg").write_bytes(b"not an image")
    return place


def analyze(place: Path, *arguments: str) -> Done:
    return call(place, "analyze", *arguments)


def assert_written(done: Done, place: Path, *names: str) -> None:
    assert done.status == 0, done.stderr
    assert done.stdout.split() == list(names)
    for name in names:
        assert (place / name).exists()
        if name.endswith(".png"):
            Image.open(place / name).verify()


PHOTO = "photos/val/red/0.png"


def test_receptive_fields_before_and_after_training(place: Path) -> None:
    done = analyze(place, "erf", "photos/val", "--checkpoint", "trained", "--sample", "2", "--out", "erf")
    assert_written(done, place, "erf/erf.png", "erf/erf.csv", "erf/erf.json", "erf/erf.npz")
    assert "trained, untrained: 2 images of 32x32" in done.stderr
    fields = dict(np.load(place / "erf" / "erf.npz"))
    assert list(fields) == ["trained, untrained", "trained, trained"]

    paths = sorted((place / "photos" / "val").rglob("*.png"))
    predictor = vmamba.load(place / "trained", device="cpu")
    inputs = [read_input(path, PREPROCESSING) for path in paths]
    expected = [
        receptive_field(predictor.model, [image for image in inputs if image is not left_out])
        for left_out in inputs
    ]
    field = torch.from_numpy(fields["trained, trained"])
    assert any(torch.allclose(field, each) for each in expected)
    assert not np.allclose(fields["trained, untrained"], fields["trained, trained"])

    rows = json.loads((place / "erf" / "erf.json").read_text())
    assert rows["environment"]
    assert [row["trained"] for row in rows["results"]] == [False] * 4 + [True] * 4
    assert [row["share"] for row in rows["results"]] == [0.2, 0.3, 0.5, 0.99] * 2
    for row in rows["results"][4:]:
        assert row["area"] == pytest.approx(high_contribution_ratio(field, row["share"]), abs=1e-6)
    with (place / "erf" / "erf.csv").open(newline="") as file:
        assert [{k: str(v) for k, v in row.items()} for row in rows["results"]] == list(csv.DictReader(file))


def test_receptive_fields_of_models_for_one_size(place: Path) -> None:
    models = ("--model", "test_vit", "--model", "test_resnet", "--model", "vmamba_pico")
    done = analyze(place, "erf", PHOTO, *models, "--untrained", "--input", "48x64", "--out", "models")
    assert done.status == 0, done.stderr
    fields = dict(np.load(place / "models" / "erf.npz"))
    assert list(fields) == ["test_vit, untrained", "test_resnet, untrained", "vmamba_pico, untrained"]
    for field in fields.values():
        assert field.shape == (48, 64)
        assert field.max() > 0


def test_weights_that_do_not_name_their_model(place: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), place / "bare=.pth")
    torch.save(timm.create_model("test_resnet").state_dict(), place / "bare.pth")
    done = analyze(
        place, "erf", PHOTO, "--checkpoint", "test_resnet=bare.pth", "--input", "32", "--out", "bare"
    )
    assert done.status == 0, done.stderr
    assert list(np.load(place / "bare" / "erf.npz")) == ["bare.pth, untrained", "bare.pth, trained"]
    done = analyze(place, "erf", PHOTO, "--checkpoint", "bare=.pth", "--out", "refused")
    assert "does not say which model its weights are of" in done.stderr


def test_attention(place: Path) -> None:
    options = ("--query", "0.3,0.7", "--stage", "1", "--input", "64", "--panels", "--delta", "--kind", "CwBw")
    done = analyze(place, "attention", PHOTO, "--checkpoint", "trained", *options, "--out", "attention")
    files = ("attention/attention.png", "attention/attention.npz", "attention/panels")
    assert_written(done, place, *files)
    values = dict(np.load(place / "attention" / "attention.npz"))
    predictor = vmamba.load(place / "trained", device="cpu")
    image = read_input(place / PHOTO, PREPROCESSING, (64, 64))
    scan = scan_attention(predictor.model, image, stage=1, block=1)
    row = scan.row(scan.position((0.3, 0.7)), "CwBw", True)
    np.testing.assert_allclose(values["query-CwBw-delta-sum"], row.sum(0), rtol=1e-5)
    np.testing.assert_array_equal(values["orders"], scan.orders)
    pictures = sorted(path.stem for path in (place / "attention" / "panels").iterdir())
    assert pictures == sorted(set(values) - {"orders"})


def test_attention_of_a_module_by_its_name(place: Path) -> None:
    options = (
        "--module",
        "stages.1.blocks.1.op",
        "--untrained",
        "--no-maps",
        "--kind",
        "CB",
        "--out",
        "rows",
    )
    done = analyze(place, "attention", PHOTO, "--checkpoint", "trained", *options)
    assert_written(done, place, "rows/attention.png", "rows/attention.npz")
    names = list(np.load(place / "rows" / "attention.npz"))
    assert all(name.startswith(("query-CB", "progress-CB", "orders")) for name in names)


def test_routes(place: Path) -> None:
    (place / "order.txt").write_text("0 3 1 4 2 5\n5 4 3 2 1 0\n")
    np.save(place / "order.npy", np.arange(6)[::-1])
    named = ("--routes", "cascade", "--routes", "row,column_reversed", "--routes", "column")
    given = ("--order", "order.txt", "--grid", "2x3", "--image", PHOTO)
    done = analyze(place, "routes", *named, *given, "--model", "vmamba_pico", "--out", "routes")
    assert_written(done, place, "routes/routes.png", "routes/routes.npz")
    orders = dict(np.load(place / "routes" / "routes.npz"))
    assert orders["order.txt, 0 a permutation"].tolist() == [[0, 3, 1, 4, 2, 5]]
    assert orders["row,column_reversed, 1 column_reversed"].tolist() == [[5, 2, 4, 1, 3, 0]]
    assert orders["cascade, 2 each column"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert orders["vmamba_pico, 3 column_reversed"].shape == (1, 4)
    done = analyze(place, "routes", "--order", "order.npy", "--grid", "2x3", "--out", "npy")
    assert done.status == 0, done.stderr
    assert list(np.load(place / "npy" / "routes.npz")) == ["order.npy, 0 a permutation"]


def test_complexity(place: Path) -> None:
    done = analyze(place, "complexity", "vmamba_pico", "--input", "64", "--depth", "1", "--json")
    assert done.status == 0, done.stderr
    rows = json.loads(done.stdout)
    counts = count(timm.create_model("vmamba_pico"), (3, 64, 64))
    assert rows[0] == {"module": "", "level": 0, "kind": "VMamba", **vars(counts)}
    assert [row["module"] for row in rows] == ["", "stem", "stages", "norm", "head"]
    done = analyze(place, "complexity", "test_resnet", "--depth", "2")
    assert done.status == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["module", "parameters", "GMACs"]
    assert lines[1].startswith("ResNet ")
    assert any(line.startswith("    0 ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("erf", PHOTO), "analyze erf: of what?"),
        (("erf", "none.png", "--model", "vmamba_pico"), "none.png: no such image or folder"),
        (("erf", "broken.jpg", "--model", "test_resnet", "--untrained"), "broken.jpg: "),
        (("erf", PHOTO, "--checkpoint", "nowhere/run"), "nowhere/run"),
        (("erf", PHOTO, "--checkpoint", "vmamba_pico=nowhere.pth"), "nowhere.pth: no such run or checkpoint"),
        (("erf", PHOTO, "--model", "test_resnet", "--model", "vmamba_pick"), "unknown model 'vmamba_pick'"),
        (("erf", PHOTO, "--model", "test_resnet", "--input", "3x4x5"), "expected 384 or 512x2048"),
        (("erf", PHOTO, "--model", "vmamba_pico", "--input", "200000", "--untrained"), "GiB are free"),
        (("attention", PHOTO), "analyze attention: of what?"),
        (("attention", PHOTO, "--checkpoint", "trained"), "no block 1 in stage 2 with a scan"),
        (("attention", PHOTO, "--checkpoint", "trained", "--module", "stem"), "'stem' has 0"),
        (("attention", PHOTO, "--checkpoint", "trained", "--stage", "1", "--query", "1,0"), "in [0, 1)"),
        (("attention", PHOTO, "--model", "test_resnet", "--untrained"), "ResNet has none"),
        (
            ("attention", "photos", "--model", "vmamba_pico", "--untrained"),
            "6 images, and the figure is of one",
        ),
        (("routes",), "analyze routes: which?"),
        (("routes", "--routes", "zigzag"), "unknown name 'zigzag'"),
        (("routes", "--routes", "cross", "--grid", "0"), "--grid '0': expected 7 or 5x9"),
        (("routes", "--order", "none.txt"), "none.txt: no such file of permutations"),
        (("routes", "--order", PHOTO), "expected permutations, a line of whole numbers each"),
        (("routes", "--model", "test_resnet"), "ResNet has none"),
        (("complexity", "vmamba_huge"), "unknown model 'vmamba_huge'"),
        (("complexity", "vmamba_pico", "--input", "0"), "expected 384 or 512x2048"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_refused(arguments: tuple[str, ...], message: str, place: Path) -> None:
    done = analyze(place, *arguments, *(() if arguments[0] == "complexity" else ("--out", "refused")))
    assert done.status == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("vmamba: ")


def test_a_query_that_is_no_point(place: Path) -> None:
    done = analyze(place, "attention", PHOTO, "--checkpoint", "trained", "--query", "middle")
    assert done.status == 2
    assert "expected x,y such as 0.5,0.25" in done.stderr


def test_weights_that_cannot_be_had(place: Path) -> None:
    done = analyze(place, "erf", PHOTO, "--model", "vmamba_nano", "--out", "refused")
    assert done.status == 2
    assert "--untrained takes the model without weights" in done.stderr


def test_maps_without_memory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_available_memory", lambda: 2**20)
    command = (
        "attention",
        PHOTO,
        "--checkpoint",
        "trained",
        "--stage",
        "0",
        "--block",
        "0",
        "--input",
        "128",
    )
    done = analyze(place, *command, "--out", "refused")
    assert done.status == 2
    assert "4 routes over 32 x 32 positions" in done.stderr
    assert analyze(place, *command, "--no-maps", "--out", "without").status == 0
