"""The authors' weights: their numbers, and every way in which a file can be wrong."""

import collections
import contextlib
import itertools
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch
from safetensors.torch import load_file

import vmamba
from authors import authors_names
from scans import BACKENDS, FAST
from vmamba.errors import CheckpointError
from vmamba.ops import use_backend

DATA = Path(__file__).parent.parent / "data"
SETTINGS = {
    "v2_micro": {},
    "vanilla_micro": {
        "d_state": 16,
        "ssm_conv_bias": True,
        "gate": True,
        "mlp_ratio": 0.0,
        "stem": "patch",
        "downsample": "merge",
    },
}


def micro(name: str) -> vmamba.VMamba:
    return vmamba.VMamba(num_classes=10, depths=(1, 1, 2, 1), dims=(8, 16, 32, 64), **SETTINGS[name])


def numbers(name: str, prefix: str = "") -> dict[str, torch.Tensor]:
    actual = load_file(DATA / f"{name}.safetensors")
    return {key.removeprefix(prefix): value for key, value in actual.items() if key.startswith(prefix)}


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_parity(name: str, backend: str) -> None:
    expected = numbers(name)
    model = vmamba.load_official(micro(name), numbers(name, "param."))
    gradients = vmamba.load_official(micro(name), numbers(name, "grad."))  # their names, turned into ours
    with use_backend(backend):
        stages = model.forward_intermediates(expected["input"], intermediates_only=True)
        logits = model(expected["input"])
        logits.square().sum().backward()
    assert error(logits, expected["logits"]) < 1e-5
    for i, stage in enumerate(stages):
        assert error(stage, expected[f"stage.{i}"]) < 1e-5
    theirs = dict(gradients.named_parameters())
    for key, parameter in model.named_parameters():
        assert error(parameter.grad, theirs[key]) < 1e-4, key


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_model_moves_between_backends(name: str, backend: str) -> None:
    model = vmamba.load_official(micro(name), numbers(name, "param."))
    x = numbers(name)["input"]
    results = []
    for backend_name in ("chunked", backend):
        with use_backend(backend_name):
            logits = model(x)
            gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
        results.append((logits.detach(), gradients))
    (expected, expected_gradients), (logits, gradients) = results
    assert error(logits, expected) < 1e-5
    for (key, _), gradient, other in zip(
        model.named_parameters(), gradients, expected_gradients, strict=True
    ):
        assert error(gradient, other) < 1e-4, key


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", SETTINGS)
def test_backends_agree_in_float64(name: str, backend: str) -> None:
    model = vmamba.load_official(micro(name), numbers(name, "param.")).double()
    x = numbers(name)["input"].double()
    outputs = []
    for backend_name in ("reference", backend):
        with use_backend(backend_name):
            outputs.append(model(x))
    assert error(*outputs) < 1e-12


OLD = {
    "patch_embed.0.": "patch_embed.proj.",
    "patch_embed.2.": "patch_embed.norm.",
    ".op.": ".self_attention.",
    "classifier.norm.": "norm.",
    "classifier.head.": "head.",
}


def test_names_of_the_first_vanilla_models() -> None:
    weights = numbers("vanilla_micro", "param.")
    renamed = {}
    for key, value in weights.items():
        if ".blocks." in key:
            key = key.replace(".norm.", ".ln_1.")
        for new, old in OLD.items():
            key = key.replace(new, old)
        renamed[key] = value
    assert not set(renamed) & {key for key in weights if "downsample" not in key}
    expected = vmamba.load_official(micro("vanilla_micro"), weights).state_dict()
    for key, value in vmamba.load_official(micro("vanilla_micro"), renamed).state_dict().items():
        assert torch.equal(value, expected[key])


def test_linear_layers_saved_as_convolutions() -> None:
    weights = numbers("v2_micro", "param.")
    as_conv = {
        key: value[..., None, None] if value.ndim == 2 and "A_logs" not in key else value
        for key, value in weights.items()
    }
    expected = vmamba.load_official(micro("v2_micro"), weights).state_dict()
    for key, value in vmamba.load_official(micro("v2_micro"), as_conv).state_dict().items():
        assert torch.equal(value, expected[key])


@pytest.fixture
def yacs(monkeypatch: pytest.MonkeyPatch) -> type:
    """yacs' config class, or one that pickles under its name."""
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    return module.CfgNode


@pytest.mark.parametrize("key", ["model", "model_ema"])
def test_a_file_with_a_yacs_config(key: str, yacs: type, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "vssm.pth"
    config = yacs(MODEL=yacs(NAME="vssm", DEPTHS=[1, 1, 2, 1]))
    torch.save({key: numbers("v2_micro", "param."), "config": config, "epoch": 3}, path)
    monkeypatch.undo()  # whoever loads it need not have yacs
    model = vmamba.load_official(micro("v2_micro"), path)
    assert error(model(numbers("v2_micro")["input"]), numbers("v2_micro")["logits"]) < 1e-5


def test_pretrained_goes_the_same_way(yacs: type, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's own download path, from a file: other classes and channels are adapted as timm does."""
    source = timm.create_model("vmamba_pico")
    official = authors_names(source.state_dict())
    path = tmp_path / "official.pth"
    torch.save({"model": official, "config": yacs(A=1)}, path)
    monkeypatch.undo()
    x = torch.randn(1, 3, 32, 32)
    overlay = {"file": str(path)}
    same = timm.create_model("vmamba_pico", pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(same(x), source(x))
    other = timm.create_model(
        "vmamba_pico", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1
    )
    assert other(x[:, :1]).shape == (1, 7)
    torch.testing.assert_close(other.stages[0].state_dict(), source.stages[0].state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("classifier.head.bias"), r"missing: head\.fc\.bias \(10,\)"),
        (lambda w: w.update({"layers.9.x": torch.zeros(1)}), r"unexpected: stages\.9\.x"),
        (lambda w: w.update({"classifier.head.bias": torch.zeros(7)}), r"shape: .* \(10,\), got \(7,\)"),
        (lambda w: w.update({"outnorm0.weight": torch.zeros(8)}), r"'outnorm\*' belong to a backbone"),
        (lambda w: w.update({"classifier.head.bias": "text"}), r"not a tensor: head\.fc\.bias \(str\)"),
    ],
)
def test_what_does_not_match_is_listed_and_nothing_is_loaded(change, message: str) -> None:
    weights = numbers("v2_micro", "param.")
    change(weights)
    model = micro("v2_micro")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        vmamba.load_official(model, weights)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_another_size_lists_every_problem() -> None:
    with pytest.raises(CheckpointError, match=r"nothing was loaded\. \d\d\d problems"):
        vmamba.load_official(vmamba.VMamba(), numbers("v2_micro", "param."))


class Malicious:
    ran: ClassVar[list[str]] = []

    def __reduce__(self):
        return (Malicious.ran.append, ("code of the file",))


def test_a_pickle_with_code_does_not_run_it(tmp_path) -> None:
    path = tmp_path / "evil.pth"
    torch.save({"model": Malicious()}, path)
    with pytest.raises(CheckpointError, match="refused, since reading it would run code"):
        vmamba.load_official(micro("v2_micro"), path)
    path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(CheckpointError, match="refused, since reading it would run code"):
        vmamba.load_official(micro("v2_micro"), path)
    assert not Malicious.ran


def damaged(path: Path) -> Iterator[tuple[bytes, int]]:
    """A checkpoint, and places in it, close in its directory."""
    torch.save({"model": numbers("v2_micro", "param.")}, path)
    whole = path.read_bytes()
    directory = len(whole) - 4000
    places = (range(0, 30, 7), range(30, directory, len(whole) // 60), range(directory, len(whole) - 1, 61))
    return ((whole, place) for place in itertools.chain(*places))


def test_a_truncated_file(tmp_path) -> None:
    path = tmp_path / "short.pth"
    for whole, place in damaged(path):
        path.write_bytes(whole[:place])
        with pytest.raises(CheckpointError, match=r"short\.pth: (damaged|refused)"):
            vmamba.load_official(micro("v2_micro"), path)


def test_an_altered_file(tmp_path) -> None:
    """Where it is refused it is so as a damaged one, whatever it sets off in the reader."""
    path = tmp_path / "altered.pth"
    for whole, place in damaged(path):
        path.write_bytes(whole[:place] + bytes(97) + whole[place + 97 :])
        with contextlib.suppress(CheckpointError):
            vmamba.load_official(micro("v2_micro"), path)


def test_no_file_and_no_dict(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        vmamba.load_official(micro("v2_micro"), tmp_path / "none.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="expected a dict of weights, got list"):
        vmamba.load_official(micro("v2_micro"), tmp_path / "list.pth")
    assert collections.OrderedDict not in torch.serialization.get_safe_globals()
