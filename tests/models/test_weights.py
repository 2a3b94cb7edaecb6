"""Weights into models that differ from theirs: what is permitted is done and told, the rest refused."""

import collections
import hashlib
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import vmamba
from authors import authors_names
from vmamba.errors import CheckpointError, MissingCheckpointError, ModelError
from vmamba.models import checkpoints
from vmamba.models.checkpoints import (
    open_checkpoint,
    read_checkpoint,
    resolve_checkpoint,
    run_folder,
    seal,
    state_digest,
)
from vmamba.models.factory import create_model, create_on_meta

MICRO: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 16, 32, 64), "num_classes": 10}
IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def micro(**changes: Any) -> Any:
    return timm.create_model("vmamba_tiny", **{**MICRO, **changes})


@pytest.fixture(scope="module")
def source() -> Any:
    torch.manual_seed(7)
    model = micro()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_everything_matches(source: Any) -> None:
    model = micro()
    report = vmamba.load_weights(model, source.state_dict())
    assert torch.equal(model.eval()(IMAGE), source(IMAGE))
    assert (report.left_out, report.missing, report.converted) == ([], [], {})
    assert set(report.loaded) == set(source.state_dict())
    assert report.summary == str(report) == f"state dict: {len(report.loaded)} weights loaded"


@pytest.mark.parametrize("names", ["ours", "authors"])
def test_features(names: str, source: Any) -> None:
    """README's two examples together: the strict load says the way, and that way works."""
    weights = snapshot(source) if names == "ours" else authors_names(snapshot(source))
    features = micro(features_only=True)
    before = snapshot(features)
    with pytest.raises(CheckpointError, match=r"load_weights\(model, file, classifier='drop'\) leaves out"):
        vmamba.load_official(features, weights)
    assert unchanged(features, before)
    report = vmamba.load_weights(features, weights, classifier="drop")
    assert sorted(report.left_out) == ["head.fc.bias", "head.fc.weight", "norm.bias", "norm.weight"]
    assert not report.missing
    expected = source.forward_intermediates(IMAGE, intermediates_only=True)
    for feature, other in zip(features.eval()(IMAGE), expected, strict=True):
        assert torch.equal(feature, other)
    inner = micro(features_only=True)
    vmamba.load_weights(inner.model, weights, classifier="drop")
    assert all(torch.equal(a, b) for a, b in zip(inner.eval()(IMAGE), expected, strict=True))


def test_fewer_stages_of_features_are_said_by_name(source: Any) -> None:
    features = micro(features_only=True, out_indices=(0, 1))
    with pytest.raises(CheckpointError, match=re.escape("partial=['stages.2.*', 'stages.3.*']")):
        vmamba.load_weights(features, source.state_dict(), classifier="drop")
    report = vmamba.load_weights(
        features, source.state_dict(), classifier="drop", partial=["stages.2.*", "stages.3.*"]
    )
    assert {name.split(".")[1] for name in report.left_out if name.startswith("stages")} == {"2", "3"}
    expected = source.forward_intermediates(IMAGE, indices=[0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(features.eval()(IMAGE), expected, strict=True))


def test_another_number_of_classes(source: Any) -> None:
    model = micro(num_classes=4)
    before = snapshot(model)
    with pytest.raises(
        CheckpointError, match=r"shape: head\.fc\.weight expected \(4, 64\), got \(10, 64\)"
    ) as refused:
        vmamba.load_weights(model, source.state_dict())
    assert "load_weights(model, file, classifier='new') keeps the model's own" in str(refused.value)
    assert unchanged(model, before)
    report = vmamba.load_weights(model, source.state_dict(), classifier="new")
    assert list(report.missing) == list(report.left_out) == ["head.fc.weight", "head.fc.bias"]
    assert "its classifier head.fc has 10 outputs, the model's 4" in str(report)
    after = model.state_dict()
    assert all(torch.equal(after[n], before[n]) == n.startswith("head") for n in after)
    same = micro()
    assert not vmamba.load_weights(same, source.state_dict(), classifier="new").missing
    assert torch.equal(same.eval()(IMAGE), source(IMAGE))


@pytest.mark.parametrize("classes", [0, 10])
def test_no_classifier(classes: int, source: Any) -> None:
    model = micro(num_classes=classes)
    before = snapshot(model)
    report = vmamba.load_weights(model, source.state_dict(), classifier="drop")
    assert list(report.left_out) == ["head.fc.weight", "head.fc.bias"]
    assert torch.equal(model.eval().forward_features(IMAGE), source.forward_features(IMAGE))
    if classes:
        assert torch.equal(model.head.fc.weight, before["head.fc.weight"])
    back = micro()
    with pytest.raises(CheckpointError, match=r"missing: head\.fc\.weight"):
        vmamba.load_weights(back, micro(num_classes=0).state_dict())


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_another_number_of_channels(channels: int, source: Any) -> None:
    """The same as timm makes of them for `pretrained=True`."""
    model = micro(in_chans=channels)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="in_chans='convert'"):
        vmamba.load_weights(model, source.state_dict())
    assert unchanged(model, before)
    report = vmamba.load_weights(model, source.state_dict(), in_chans="convert")
    assert report.converted == {"stem.conv1.weight": f"from 3 to {channels} image channels"}
    expected = timm.create_model(
        "vmamba_tiny",
        pretrained=True,
        pretrained_cfg_overlay={"state_dict": snapshot(source), "num_classes": 10},
        **{**MICRO, "in_chans": channels},
    )
    assert unchanged(model, snapshot(expected))


def test_a_gray_image_looks_as_its_colour_form(source: Any) -> None:
    model = micro(in_chans=1).eval()
    vmamba.load_weights(model, source.state_dict(), in_chans="convert")
    gray = IMAGE[:, :1]
    torch.testing.assert_close(model(gray), source(gray.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_other_depths(source: Any) -> None:
    shallow, deep = micro(depths=(1, 1, 1, 1)), micro(depths=(1, 1, 4, 1))
    with pytest.raises(CheckpointError, match=re.escape("partial=['stages.2.blocks.1.*']")):
        vmamba.load_weights(shallow, source.state_dict())
    report = vmamba.load_weights(shallow, source.state_dict(), partial="stages.2.blocks.1.*")
    assert all(name.startswith("stages.2.blocks.1.") for name in report.left_out)
    assert torch.equal(
        shallow.state_dict()["stages.2.blocks.0.op.A_log"], source.state_dict()["stages.2.blocks.0.op.A_log"]
    )
    before = snapshot(deep)
    with pytest.raises(CheckpointError, match=r"missing: stages\.2\.blocks\.3"):
        vmamba.load_weights(deep, source.state_dict(), partial=["stages.2.blocks.2.*"])
    assert unchanged(deep, before)
    report = vmamba.load_weights(deep, source.state_dict(), partial=True)
    assert {name.split(".")[3] for name in report.missing} == {"2", "3"}


def test_nothing_that_fits_is_refused_even_where_all_is_permitted() -> None:
    with pytest.raises(CheckpointError, match="no weight of the file has a place in the model"):
        vmamba.load_weights(micro(), {"other": torch.zeros(3)}, partial=True)


@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone.", "model.backbone.", "module.model."])
def test_wrapped_names(prefix: str, source: Any) -> None:
    wrapped = {prefix + name: value for name, value in authors_names(snapshot(source)).items()}
    model = micro()
    assert vmamba.load_weights(model, {"state_dict": wrapped}).prefix == prefix
    assert torch.equal(model.eval()(IMAGE), source(IMAGE))


def test_a_compiled_models_names(source: Any) -> None:
    wrapped = {f"_orig_mod.{name}": value for name, value in source.state_dict().items()}
    model = micro()
    vmamba.load_weights(model, wrapped)
    assert unchanged(model, snapshot(source))


def detector(source: nn.Module) -> dict[str, Tensor]:
    """What a detector's file holds of the authors: norms of every map, no classifier, and other modules."""
    weights = {
        f"backbone.{name}": value
        for name, value in authors_names(snapshot(source)).items()
        if not name.startswith("classifier.")
    }
    for stage, dim in enumerate(MICRO["dims"]):
        weights[f"backbone.outnorm{stage}.weight"] = torch.ones(dim)
        weights[f"backbone.outnorm{stage}.bias"] = torch.zeros(dim)
    weights["neck.fpn_convs.0.conv.weight"] = torch.zeros(1)
    weights["bbox_head.fc_cls.weight"] = torch.zeros(1)
    return weights


def test_a_detectors_backbone(source: Any) -> None:
    weights = {"state_dict": detector(source), "meta": {"epoch": 12}}
    model = micro(num_classes=3)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"unexpected: neck\.fpn_convs") as error:
        vmamba.load_weights(model, weights)
    assert "'outnorm*' belong to a backbone of a detector" in str(error.value)
    assert unchanged(model, before)
    report = vmamba.load_weights(model, weights, classifier="new")
    assert list(report.elsewhere) == ["neck.fpn_convs.0.conv.weight", "bbox_head.fc_cls.weight"]
    assert sorted({name.partition(".")[0] for name in report.left_out}) == [f"outnorm{i}" for i in range(4)]
    assert sorted(report.missing) == ["head.fc.bias", "head.fc.weight", "norm.bias", "norm.weight"]
    assert "left out, outside backbone.: neck" in str(report)
    features = micro(features_only=True).eval()
    vmamba.load_weights(features, weights, classifier="drop")
    expected = source.forward_intermediates(IMAGE, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(features(IMAGE), expected, strict=True))


@pytest.fixture
def mmengine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Classes that pickle as mmengine's and mmcv's do, gone before the file is read."""

    def module(name: str, **members: Any) -> None:
        made = types.ModuleType(name)
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)

    class HistoryBuffer:
        def __init__(self) -> None:
            import numpy as np

            self._log_history = np.array([1.0, 2.0])
            self.scalar = np.float64(3)
            self._statistics_methods = {"mean": HistoryBuffer.mean}

        def mean(self) -> float:
            return 0.0

    HistoryBuffer.__module__ = "mmengine.logging.history_buffer"
    HistoryBuffer.__qualname__ = "HistoryBuffer"
    HistoryBuffer.mean.__module__ = HistoryBuffer.__module__
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    ConfigDict = type("ConfigDict", (dict,), {"__module__": "mmengine.config.config"})
    for name in ("mmengine", "mmengine.logging", "mmengine.config"):
        module(name)
    module("mmengine.logging.history_buffer", HistoryBuffer=HistoryBuffer)
    module("mmengine.config.config", ConfigDict=ConfigDict)
    return types.SimpleNamespace(HistoryBuffer=HistoryBuffer, ConfigDict=ConfigDict)


def test_a_file_of_mmengine_without_mmengine(
    source: Any, mmengine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import argparse

    path = tmp_path / "epoch_12.pth"
    average = {f"module.{name}": value * 2 for name, value in detector(source).items()}
    torch.save(
        {
            "meta": {"cfg": mmengine.ConfigDict(a=mmengine.ConfigDict(b=[1]))},
            "state_dict": collections.OrderedDict(detector(source)),
            "ema_state_dict": {"steps": torch.tensor(7), **average},
            "message_hub": {"log_scalars": {"loss": mmengine.HistoryBuffer()}},
            "args": argparse.Namespace(path=Path("here")),
        },
        path,
    )
    monkeypatch.undo()
    model = micro(features_only=True)
    vmamba.load_weights(model, path, classifier="drop")
    assert torch.equal(model.state_dict()["model.stem.conv1.weight"], source.stem.conv1.weight)
    report = vmamba.load_weights(model, path, classifier="drop", weights="ema")
    assert (report.prefix, report.weights) == ("module.backbone.", "ema")
    assert torch.equal(model.state_dict()["model.stem.conv1.weight"], source.stem.conv1.weight * 2)


@pytest.mark.parametrize(("raw", "ema"), [("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_kinds_of_weights(raw: str, ema: str, source: Any, tmp_path: Path) -> None:
    other = {name: value * 2 for name, value in source.state_dict().items()}
    path = tmp_path / "last.pth.tar"
    torch.save({raw: source.state_dict(), ema: other}, path)
    for kind, expected in (("auto", source.state_dict()), ("raw", source.state_dict()), ("ema", other)):
        model = micro()
        vmamba.load_weights(model, path, weights=kind)
        assert unchanged(model, expected)
    torch.save({raw: source.state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"has no 'ema' weights; it has 'raw'"):
        vmamba.load_weights(micro(), path, weights="ema")


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "test_resnet"])
def test_timms_models_and_their_features(name: str) -> None:
    theirs = timm.create_model(name, num_classes=5).eval()
    model = timm.create_model(name, num_classes=3)
    report = vmamba.load_weights(model, theirs.state_dict(), classifier="new")
    assert {missing.rpartition(".")[0] for missing in report.missing} == {theirs.pretrained_cfg["classifier"]}
    features = timm.create_model(name, features_only=True).eval()
    vmamba.load_weights(features, theirs.state_dict(), classifier="drop")
    images = torch.randn(1, *theirs.pretrained_cfg["input_size"])
    expected = theirs.forward_intermediates(images, intermediates_only=True)
    for feature in features(images):
        assert any(feature.shape == e.shape and torch.allclose(feature, e) for e in expected)


def test_permissions_are_checked(source: Any) -> None:
    for wrong in ({"classifier": "keeep"}, {"in_chans": True}, {"weights": "average"}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected one of"):
            vmamba.load_weights(micro(), source.state_dict(), **wrong)


def test_a_model_without_memory_is_refused(source: Any) -> None:
    with torch.device("meta"):
        model = micro()
    with pytest.raises(CheckpointError, match="the model is on the meta device"):
        vmamba.load_weights(model, source.state_dict())


def test_a_model_of_another_type_keeps_it(source: Any) -> None:
    model = micro().half()
    vmamba.load_weights(model, source.state_dict())
    assert {value.dtype for value in model.state_dict().values()} == {torch.float16}


# Finding what is meant


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("checkpoints/best.ckpt", "checkpoints/last.ckpt", "recipe.yaml", "best.safetensors"):
        (folder / name).write_text("")
    return folder


def test_what_a_path_means(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = run / "checkpoints" / "best.ckpt"
    for place in (run, run / "checkpoints", run / "recipe.yaml", str(run) + "/", best):
        assert resolve_checkpoint(place) == best, place
    assert resolve_checkpoint(run / "checkpoints" / "last.ckpt").name == "last.ckpt"
    for place in (run, run / "checkpoints", run / "checkpoints" / "last.ckpt", run / "best.safetensors"):
        assert run_folder(place).resolve() == run.resolve(), place
    monkeypatch.chdir(run / "checkpoints")
    assert run_folder("last.ckpt") == run
    monkeypatch.setenv("HOME", str(run.parent))
    assert resolve_checkpoint("~/run") == best
    best.unlink()
    assert resolve_checkpoint(run).name == "best.safetensors"


def test_what_is_not_there(run: Path) -> None:
    close = re.escape(f"no such checkpoint; did you mean {run / 'checkpoints'}?")
    with pytest.raises(MissingCheckpointError, match=close):
        resolve_checkpoint(run / "chekpoints")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        resolve_checkpoint(run / "none" / "last.ckpt")
    (run / "empty").mkdir()
    with pytest.raises(MissingCheckpointError, match="no checkpoint in this folder"):
        resolve_checkpoint(run / "empty")
    for name in ("a.pth", "b.pth"):
        (run / "empty" / name).write_text("")
    with pytest.raises(MissingCheckpointError, match=r"several files of weights, name one: a\.pth, b\.pth"):
        resolve_checkpoint(run / "empty")


@pytest.mark.parametrize("name", ["mine.yaml", "mine.yml", "mine.json", "mine.csv"])
def test_a_file_of_text_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    """Nor does it stand for a file of weights that lies beside it by chance."""
    (tmp_path / name).write_text("text")
    (tmp_path / "others.pth").write_bytes(b"")
    with pytest.raises(MissingCheckpointError, match=rf"/{name}: no checkpoint, and not the {name} of a run"):
        resolve_checkpoint(tmp_path / name)


def test_an_address_keeps_its_slashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(url: str, path: str, progress: bool) -> None:
        asked.append(url)
        torch.save({"model": {"a": torch.ones(1)}}, path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for place in ("https://host/a/%23v2/x.pth", Path("https://host/a/%23v2/x.pth")):
        assert open_checkpoint(place).state_dict()["a"] == 1
    other = resolve_checkpoint("http://elsewhere/x.pth")
    assert asked == ["https://host/a/%23v2/x.pth", "http://elsewhere/x.pth"]  # each once
    assert other.name.endswith("-x.pth")

    def refuse(url: str, path: str, progress: bool) -> None:
        raise OSError("no such host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(CheckpointError, match=r"https://host/y\.pth: cannot be downloaded \(no such host\)"):
        resolve_checkpoint("https://host/y.pth")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pth"
    path.write_bytes(b"x" * 100)

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"a\.pth: cannot be read \(Permission denied\)"):
        read_checkpoint(path)


# The digest inside


def test_the_digest_covers_names_types_shapes_and_bytes() -> None:
    one = {"a": torch.arange(6.0), "b": [1, "x", None, 2.5, b"y"]}
    digest = state_digest(one)
    assert digest == state_digest({"b": one["b"], "a": one["a"].clone()})
    others = [
        {**one, "a": torch.arange(6.0).reshape(2, 3)},
        {**one, "a": torch.arange(6).int().view(torch.float32)},
        {**one, "a": torch.arange(6)},
        {"c": one["a"], "b": one["b"]},
        {**one, "b": [1, "x", None, 2.5, b"z"]},
        {**one, "b": ["1", "x", None, 2.5, b"y"]},
    ]
    assert len({digest, *map(state_digest, others)}) == 1 + len(others)
    assert state_digest(torch.tensor(3.0)) != state_digest(torch.tensor(4.0))
    assert state_digest({"a": torch.empty(0), "b": torch.ones(2, dtype=torch.bool)})


def flipped(path: Path, pattern: bytes) -> None:
    """Flip a bit within the bytes of a tensor."""
    content = bytearray(path.read_bytes())
    content[content.index(pattern) + 2] ^= 1
    path.write_bytes(content)


WEIGHT = torch.arange(1000, 1064).float()


def test_a_flipped_bit_without_a_file_beside(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(seal({"state_dict": {"model.a": WEIGHT}, "vmamba": {"recipe": {}, "classes": []}}), path)
    assert torch.equal(open_checkpoint(path).state_dict()["a"], WEIGHT)
    flipped(path, WEIGHT.numpy().tobytes())
    with pytest.raises(CheckpointError, match="damaged, its content does not match the digest inside"):
        open_checkpoint(path)


def test_a_flipped_bit_in_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    save_file({"a": WEIGHT}, path, {checkpoints.CONTENTS: state_digest({"a": WEIGHT})})
    assert torch.equal(read_checkpoint(path)["a"], WEIGHT)
    flipped(path, WEIGHT.numpy().tobytes())
    with pytest.raises(CheckpointError, match="damaged, its content does not match the digest inside"):
        read_checkpoint(path)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="no safetensors file, or a damaged one"):
        read_checkpoint(path)


def test_the_file_beside_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"a": WEIGHT}, path)
    sums = checkpoints.checksum_path(path)
    sums.write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  a.pth\n")
    read_checkpoint(path)
    flipped(path, WEIGHT.numpy().tobytes())
    with pytest.raises(CheckpointError, match=r"does not match a\.pth\.sha256"):
        read_checkpoint(path)


class _Code:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_stand_ins_run_no_code(tmp_path: Path) -> None:
    """`getattr` is read as something inert: it cannot be used to reach a function."""

    class Reach:
        def __reduce__(self) -> Any:
            return getattr, ("", "join")

    for content in (
        {"a": _Code(tmp_path / "proof")},
        {"message_hub": Reach(), "a": _Code(tmp_path / "proof")},
    ):
        torch.save(content, tmp_path / "bad.pth")
        with pytest.raises(CheckpointError, match=r"bad\.pth: refused"):
            read_checkpoint(tmp_path / "bad.pth")
    assert not (tmp_path / "proof").exists()


# The factory


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"drop_path_rate": 2.0}, "drop_path_rate: expected a number from 0 to below 1, got 2.0"),
        ({"drop_path_rate": -1}, "drop_path_rate: expected a number from 0"),
        ({"drop_rate": "much"}, "drop_rate: expected a number from 0"),
        ({"drop_path_rate": float("nan")}, "drop_path_rate: expected"),
        ({"mlp_ratio": -1}, "mlp_ratio: "),
        ({"gate": "maybe"}, "gate: "),
        ({"dims": [1, 1, 1, 1]}, "does not work with 32×32 images"),
        ({"depths": 3}, "vmamba_pico does not take"),
        ({"d_state": 1.5}, "vmamba_pico does not take"),
        ({"no_such": 1}, "vmamba_pico does not take .*no_such"),
        ({"num_classes": -1}, "num_classes: expected a whole number of at least 0"),
        ({"in_chans": 0}, "in_chans: expected a whole number of at least 1"),
        ({"checkpoint_path": "a.pth"}, "checkpoint_path: .*vmamba.load_weights"),
        ({"device": "cuda"}, r"device: .*model.to\(device\)"),
        ({"dtype": torch.half}, r"dtype: .*model.to\(dtype\)"),
        ({"num_classes": 7, "logits": 3}, r"gives \(2, 7\) for 2 images, not logits of 3 classes"),
        ({"features_only": True, "logits": 3}, "gives list for 2 images"),
        ({"global_pool": "", "logits": 1000}, "global_pool"),
        ({"num_classes": 0, "logits": 3}, r"gives \(2, 192\)"),
    ],
)
def test_arguments_that_break_a_model(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        create_model("vmamba_pico", **args)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vmamba_tny", "did you mean vmamba_tiny"),
        ("vmamba_pico.foo", "vmamba_pico has 'untrained', not 'foo'"),
        ("vit_tiny_patch16_224.foo", "has 'augreg_in21k_ft_in1k', 'augreg_in21k', not 'foo'"),
        ("qqqqqq", "ours are "),
        ("resnet5", "did you mean resnet50"),
    ],
)
def test_unknown_models(name: str, message: str) -> None:
    for create in (create_model, create_on_meta):
        with pytest.raises(ModelError, match=f"unknown model '{re.escape(name)}'.*{message}"):
            create(name)


def test_a_model_made_for_one_size() -> None:
    model = create_model("test_vit", image_size=(96, 64), num_classes=3, logits=3).eval()
    assert model(torch.randn(1, 3, 96, 64)).shape == (1, 3)
    with pytest.raises(ModelError, match=r"test_vit .*30×30"):
        create_model("test_vit", image_size=(30, 30), dynamic_img_size=False, depth=1, patch_size=64)


def test_no_pretrained_weights() -> None:
    with pytest.raises(CheckpointError, match=r"^no pretrained weights of vmamba_pico were released; train"):
        create_model("vmamba_pico", pretrained=True)
