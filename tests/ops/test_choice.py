"""Which backend serves a call that names none, on a device where one has to prove itself.

The device is simulated: the CPU, with a stand-in that has to prove itself there.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import stand_ins
import vmamba
from scans import operands
from vmamba.ops import (
    BackendError,
    BackendWarning,
    UnknownBackendError,
    _registry,
    cpu,
    default_backend,
    proof,
    selective_scan,
    selective_scan_2d,
    use_backend,
    verdicts,
)
from vmamba.ops.verdicts import Verdict

pytestmark = pytest.mark.skipif(
    isinstance(cpu._load(), str), reason="stand-ins are made of the compiled kernel"
)
CPU = torch.device("cpu")
BOTH = ["right forward", "right backward"]


@pytest.fixture(autouse=True)
def _simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device for which "right" is the fast backend, nothing known of it, and no proof."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv(_registry.VARIABLE, raising=False)
    slow = {name: _registry._BACKENDS[name] for name in ("chunked", "reference")}
    monkeypatch.setattr(_registry, "_BACKENDS", {"right": stand_ins.RIGHT, **slow})
    monkeypatch.setattr(_registry, "_WARNED", set())
    monkeypatch.setattr(verdicts, "_KNOWN", {})
    monkeypatch.setattr(proof, "prove", refuse)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch.compiler.reset()
    stand_ins.calls.clear()


def refuse(*arguments: Any) -> proof.Proof:
    raise AssertionError("a proof was started")


def verdict(reason: str | None = None) -> Verdict:
    return Verdict("right", verdicts.machine(stand_ins.RIGHT, CPU), reason, 1, {}, 1.0, "")


def keep(reason: str | None = None) -> None:
    """Keep a verdict in the cache folder, as another process would."""
    verdicts.keep(stand_ins.RIGHT, CPU, verdict(reason))
    verdicts._KNOWN.clear()


def provable(monkeypatch: pytest.MonkeyPatch, reason: str | None = None) -> list[Any]:
    """Let proofs end with a verdict; returns those started."""
    proofs: list[Any] = []

    def prove(*arguments: Any) -> proof.Proof:
        proofs.append(arguments)
        return proof.Proof(verdict(reason), [], [], "")

    monkeypatch.setattr(proof, "prove", prove)
    return proofs


@pytest.fixture
def layer() -> vmamba.SS2D:
    return vmamba.SS2D(8)


X = torch.ones(1, 4, 5, 8)


def eager(layer: vmamba.SS2D, x: torch.Tensor) -> torch.Tensor:
    return layer(x)


def compiled(layer: vmamba.SS2D, x: torch.Tensor) -> torch.Tensor:
    return torch.compile(layer, backend="aot_eager", fullgraph=True)(x)


def checkpointed(layer: vmamba.SS2D, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(layer, x, use_reentrant=False)


def compiled_checkpoint(layer: vmamba.SS2D, x: torch.Tensor) -> torch.Tensor:
    return torch.compile(checkpointed, backend="aot_eager", fullgraph=True)(layer, x)


def under_autocast(layer: vmamba.SS2D, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


def traced(layer: vmamba.SS2D, x: torch.Tensor) -> torch.Tensor:
    return torch.jit.trace(layer, (x,), check_trace=False)(x)


WAYS: list[Callable[[vmamba.SS2D, torch.Tensor], torch.Tensor]] = [
    eager,
    compiled,
    checkpointed,
    compiled_checkpoint,
    under_autocast,
    traced,
]
TRACED_BY_PYTORCH = pytest.mark.filterwarnings(
    "ignore:.torch.jit", "ignore::torch.jit.TracerWarning"
)  # PyTorch's own


@TRACED_BY_PYTORCH
@pytest.mark.parametrize("way", WAYS)
def test_proven(way: Any, layer: vmamba.SS2D) -> None:
    keep()
    with use_backend("chunked"):
        expected = torch.autograd.grad(way(layer, X).float().sum(), list(layer.parameters()))
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", BackendWarning)
        actual = torch.autograd.grad(way(layer, X).float().sum(), list(layer.parameters()))
    assert set(stand_ins.calls) == set(BOTH)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * b.abs().max().item())


@TRACED_BY_PYTORCH
@pytest.mark.parametrize("way", WAYS)
def test_found_wrong(way: Any, layer: vmamba.SS2D) -> None:
    keep("the gradient of C: error 0.1, allowed 0.001")
    with pytest.warns(BackendWarning, match="not on 'right': its check on cpu failed: the gradient") as told:
        way(layer, X).float().sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error", BackendWarning)  # told once
        way(layer, X).float().sum().backward()
    assert "vmamba prove --device cpu --all --out report.json" in str([w.message for w in told])
    assert stand_ins.calls == []


def test_the_first_eager_call_proves(monkeypatch: pytest.MonkeyPatch, layer: vmamba.SS2D) -> None:
    proofs = provable(monkeypatch)
    assert default_backend("cpu") == "chunked"
    assert not proofs
    for _ in range(2):
        layer(X).sum().backward()
    assert proofs == [(stand_ins.RIGHT, CPU)]
    assert stand_ins.calls == 2 * BOTH
    assert default_backend("cpu") == "right"


def test_a_default_device_does_not_keep_it_from_proving(
    monkeypatch: pytest.MonkeyPatch, layer: vmamba.SS2D
) -> None:
    """It is a mode of PyTorch's functions, and lasts as long as the process."""
    proofs = provable(monkeypatch)
    with torch.device("cpu"):
        layer(X)
    assert len(proofs) == 1


def test_what_reports_a_run_proves_first(monkeypatch: pytest.MonkeyPatch) -> None:
    proofs = provable(monkeypatch)
    assert default_backend("cpu", prove=True) == "right"
    assert len(proofs) == 1


def captured(layer: vmamba.SS2D, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> Any:
    """On a GPU whose stream records a graph, as the check of it sees it."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(_registry, "_is_capturing", lambda device: torch.cuda.is_current_stream_capturing())
    return layer(x)


def fake(layer: vmamba.SS2D, x: torch.Tensor) -> Any:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return layer(mode.from_tensor(x))


NOT_EAGER = {
    "captured": captured,
    "compiled": compiled,
    "traced": lambda layer, x: torch.jit.trace(layer, (x,), check_trace=False),
    "exported": lambda layer, x: torch.export.export(layer, (x,), strict=False),
    "exported strictly": lambda layer, x: torch.export.export(layer, (x,), strict=True),
    "fx": lambda layer, x: make_fx(layer, tracing_mode="fake", _allow_non_fake_inputs=True)(x),
    "fake": fake,
    "vmap": lambda layer, x: torch.vmap(layer)(x[None]),
    "grad": lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
}


@TRACED_BY_PYTORCH
@pytest.mark.filterwarnings("ignore::vmamba.ops.BackendWarning")
@pytest.mark.parametrize("way", NOT_EAGER)
def test_no_proof_unless_eager(way: str, layer: vmamba.SS2D, monkeypatch: pytest.MonkeyPatch) -> None:
    """`prove` raises here. An eager call afterwards does prove."""
    run = NOT_EAGER[way]
    with monkeypatch.context() as changed:
        run(layer, X, changed) if way == "captured" else run(layer, X)
    assert "right forward" not in stand_ins.calls
    torch.compiler.reset()
    proofs = provable(monkeypatch)
    layer(X)
    assert len(proofs) == 1
    assert stand_ins.calls == ["right forward"]


def test_unproven_while_compiled_says_what_to_do(layer: vmamba.SS2D) -> None:
    with pytest.warns(BackendWarning, match=r"not proven itself on cpu yet.* `vmamba prove --device cpu`"):
        compiled(layer, X)


def test_a_compiled_graph_keeps_its_backend(monkeypatch: pytest.MonkeyPatch, layer: vmamba.SS2D) -> None:
    """Proven between compilation and run: the number of saved states is still that of the graph."""
    step = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with pytest.warns(BackendWarning):
        step(X)
    provable(monkeypatch)
    layer(X)
    stand_ins.calls.clear()
    step(X).sum().backward()
    assert stand_ins.calls == []


def by_operator(call: dict) -> torch.Tensor:
    names = ("x", "delta", "A", "B", "C", "D", "delta_bias", "delta_weight")
    tensors = [call[name] for name in names]
    return torch.ops.vmamba.selective_scan_2d(*tensors, True, [0, 1, 2, 3], None, None, None)[0]


@pytest.mark.parametrize("scan", [lambda call: selective_scan_2d(**call), by_operator])
@pytest.mark.parametrize("gradients", [True, False])
def test_compiled_by_inductor_for_one_backend_then_another(scan: Any, gradients: bool) -> None:
    """PyTorch keeps compiled graphs on disk; backends differ in the number of states that they save."""
    keep()
    call = operands(height=5, width=7, dtype=torch.float32, requires_grad=gradients)
    expected = scan(call)
    for forced in ("reference", "right", None, "chunked"):
        torch.compiler.reset()
        stand_ins.calls.clear()
        with use_backend(forced) if forced else warnings.catch_warnings():
            y = torch.compile(scan, fullgraph=True)(call)
        if gradients:
            y.sum().backward()
        torch.testing.assert_close(y, expected)
        if scan is not by_operator:  # whose graph names no backend
            assert bool(stand_ins.calls) == (forced in ("right", None))


def test_compiled_sequences_name_their_backend() -> None:
    keep()
    u = torch.rand(1, 3, 9)
    arguments = (u, u, -torch.ones(3, 2), torch.rand(1, 2, 9), torch.rand(1, 2, 9))
    scan = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(scan(*arguments), selective_scan(*arguments, backend="reference"))
    assert stand_ins.calls == ["right forward"]


def test_a_compiled_call_that_the_proven_backend_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    few = replace(stand_ins.RIGHT, why_not=lambda call: "n is at most 1" if call.n_state > 1 else None)
    monkeypatch.setitem(_registry._BACKENDS, "right", few)
    keep()
    scan = torch.compile(lambda **kw: selective_scan_2d(**kw), backend="aot_eager", fullgraph=True)
    call = operands(n_state=2, dtype=torch.float32)
    with pytest.warns(BackendWarning, match="not on 'right': n is at most 1"):
        scan(**call).sum().backward()
    assert stand_ins.calls == []


# --- VMAMBA_ENGINE


def test_the_environment_forces_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    call = operands(dtype=torch.float32)
    monkeypatch.setenv("VMAMBA_ENGINE", "right")
    selective_scan_2d(**call)
    assert stand_ins.calls == ["right forward"]
    assert default_backend("cpu") == "right"
    selective_scan_2d(**call, backend="chunked")
    with use_backend("reference"):
        selective_scan_2d(**call)
    assert stand_ins.calls == ["right forward"]


def test_the_environment_names_no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMAMBA_ENGINE", "warp")
    with pytest.raises(UnknownBackendError, match="VMAMBA_ENGINE=warp: backend: there is no 'warp'"):
        selective_scan_2d(**operands())
    with pytest.raises(UnknownBackendError, match="VMAMBA_ENGINE=warp"):
        default_backend("cpu")
    monkeypatch.setenv("VMAMBA_ENGINE", "")  # as in `VMAMBA_ENGINE=$UNSET`
    with use_backend("chunked"):
        selective_scan_2d(**operands())
    keep("too slow")
    with pytest.warns(BackendWarning):
        assert compiled(vmamba.SS2D(8), X).shape == X.shape
    assert default_backend("cpu") == "chunked"


def test_the_environment_names_one_that_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    gone = replace(stand_ins.RIGHT, why_not_here=lambda: "there is no GPU")
    monkeypatch.setitem(_registry._BACKENDS, "right", gone)
    monkeypatch.setenv("VMAMBA_ENGINE", "right")
    with pytest.raises(BackendError, match="VMAMBA_ENGINE: 'right' cannot serve this call: there is no GPU"):
        selective_scan_2d(**operands())


# --- several processes

WORKER = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
import torch, stand_ins, vmamba
from torch import distributed
from vmamba.ops import _registry
torch.set_num_threads(1)
keep = ("chunked", "reference", sys.argv[2])
_registry._BACKENDS = {name: b for name, b in _registry._BACKENDS.items() if name in keep}
_registry._BACKENDS = dict(sorted(_registry._BACKENDS.items(), key=lambda item: item[0] == "chunked"))
distributed.init_process_group("gloo")
layer = torch.nn.parallel.DistributedDataParallel(vmamba.SS2D(8))
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always", _registry.BackendWarning)
    layer(torch.ones(1, 4, 5, 8)).sum().backward()
print([str(w.message) for w in told if w.category is _registry.BackendWarning], sorted(set(stand_ins.calls)))
distributed.destroy_process_group()
"""


@pytest.mark.parametrize("name", ["right", "raising"])
def test_two_processes_of_a_run_prove_once(name: str, tmp_path: Path) -> None:
    """Both need the verdict at once, one proves, and both go on with the same backend."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", WORKER, str(Path(stand_ins.__file__).parent), name]
    ranks = [
        subprocess.Popen(
            command,
            env=common | {"RANK": str(rank), "STAND_INS_LOG": str(log), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [(*rank.communicate(timeout=280), rank.returncode) for rank in ranks]
    assert [status for _, _, status in ended] == [0, 0], ended
    for printed, _, _ in ended:
        line = printed.splitlines()[-1]
        assert ("the compiler gave up" in line) == (name == "raising")
        assert ("right forward" in line) == (name == "right")
    assert len(log.read_text().splitlines()) == 3  # two processes of the run, one of the proof
