"""What only the compiled backend can get wrong: threads, blocks of channels, addresses, memory."""

import math
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from scans import TENSORS, assert_accurate, cast, given, operands, value_and_gradients
from vmamba.ops import BackendWarning, backends, cpu, selective_scan_2d
from vmamba.ops.operands import Operands

WHY_NOT = {status.name: status.reason for status in backends()}["cpu"]
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def test_says_what_it_runs_on() -> None:
    assert cpu.instruction_set() in ("avx512", "avx2", "baseline")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("n_state", [1, 5])
def test_the_same_bits_on_any_number_of_threads(batch: int, n_state: int) -> None:
    call = operands(batch, 10, 9, 200, n_state, 5, dtype=torch.float32)
    grad_y = torch.randn_like(call["x"])
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(value_and_gradients(call, grad_y, backend="cpu"))
    for other in results[1:]:
        for name, t in results[0].items():
            assert torch.equal(other[name], t), name


@pytest.mark.parametrize(("side", "threads"), [(4, 1), (32, 1), (48, 2), (64, 3)])
def test_a_small_call_stays_on_one_thread(side: int, threads: int) -> None:
    """By its work: positions, channels, routes and states."""
    torch.set_num_threads(3)
    call = operands(1, side, side, 8, 1, 2, requires_grad=False)
    values = [call[name] for name in TENSORS]
    assert cpu._scan(Operands(*values, True, [0, 1, 2, 3]))[0].threads == threads


@pytest.mark.parametrize("channels", [1, 15, 16, 17, 63, 64, 65, 130])
@pytest.mark.parametrize("rank", [None, 1, 9])
def test_any_number_of_channels(channels: int, rank: int | None) -> None:
    calls = [
        operands(2, 6, 7, channels, 2, rank, dtype=torch.float32) for _ in range(16 if channels < 15 else 1)
    ]
    assert_accurate(*calls, backend="cpu")


@pytest.mark.parametrize(("batch", "channels"), [(5, 1100), (19, 70), (0, 8)])
def test_any_number_of_images(batch: int, channels: int) -> None:
    """More than there are groups whose sums are kept apart, the last of them smaller, and none."""
    assert_accurate(operands(batch, 3, 4, channels, 1, 9, dtype=torch.float32), backend="cpu")


@pytest.mark.parametrize("n_state", [1, 4, 16, 17, 64])
def test_any_state_size(n_state: int) -> None:
    """Over several saved states, whose distance grows with N."""
    assert_accurate(operands(1, 20, 18, 8, n_state, 3, dtype=torch.float32), backend="cpu")


def test_a_larger_state_goes_to_the_slower_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmamba.ops._registry._WARNED", set())  # it warns once in a process
    call = operands(1, 2, 2, 2, 65, requires_grad=False)
    with pytest.raises(RuntimeError, match=r"'cpu' cannot serve this call: .* n of at most 64, got 65"):
        selective_scan_2d(**call, backend="cpu")
    with pytest.warns(BackendWarning, match="n of at most 64"):
        y = selective_scan_2d(**call)
    torch.testing.assert_close(y, selective_scan_2d(**call, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_value_is_read_exactly(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1, 1, 1)
    zero, one = torch.zeros(2**16, 1, 1, 1, 1), torch.ones(1, 1)
    y = selective_scan_2d(
        values, zero, -one[None], zero, zero, one, routes=("row",), out_dtype=torch.float32, backend="cpu"
    )
    expected = values.float() + 0.0  # the state adds 0 (or NaN, where 0·x is)
    expected[expected.isinf()] = torch.nan
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


EXTREMES = [0.0, 1e-42, 1e-30, 1e4, 1e30, 3e38, torch.inf, -torch.inf, torch.nan]


@pytest.mark.parametrize("name", ["x", "delta", "B", "C", "A"])
@pytest.mark.parametrize("value", EXTREMES)
@pytest.mark.parametrize("softplus", [True, False])
def test_extreme_values_are_as_the_reference_has_them(name: str, value: float, softplus: bool) -> None:
    """Not finite where it is not, the same infinity, and equal elsewhere."""
    call = operands(
        1, 3, 4, 20, 2, None, ("row", "column_reversed"), dtype=torch.float32, requires_grad=False
    )
    call["delta_bias"] = None
    if not softplus:
        call["delta"] = call["delta"].abs()
    if name == "A":
        call["A"][0, 3, 1] = -abs(value)
    elif name == "delta" and not softplus:
        call["delta"][0, 1, 2, 0, 3] = abs(value)
    else:
        call[name][0, 1, 2].view(-1)[3 if name in ("x", "delta") else 1] = value
    actual = selective_scan_2d(**call, delta_softplus=softplus, backend="cpu")
    expected = selective_scan_2d(**call, delta_softplus=softplus, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    "z", [-200.0, -104.0, -88.0, -60.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 88.0, 200.0, 1e30]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [None, 1])
def test_softplus_to_the_last_digits(z: float, dtype: torch.dtype, rank: int | None) -> None:
    """As y of one position with x = B = C = 1: softplus(z) alone."""
    one = torch.ones(1, 1, 1, 1, 1, dtype=dtype)
    y = selective_scan_2d(
        *(one[0], one * z, -one[0, 0], one, one),
        delta_weight=None if rank is None else one[0, 0],
        routes=("row",),
        backend="cpu",
    )
    expected = torch.nn.functional.softplus(torch.tensor(z, dtype=torch.float64), threshold=1e3)
    # The low-rank product has a rounding error of z itself in it.
    rounding = torch.finfo(dtype).eps * (2 if rank is None else 2 + min(abs(z), 1e3))
    torch.testing.assert_close(
        y.double().squeeze(), expected, rtol=rounding, atol=2 * torch.finfo(dtype).smallest_normal
    )


@pytest.mark.parametrize("z", [-88.0, -95.0, -101.0])
@pytest.mark.parametrize("rank", [None, 1])
def test_a_step_below_the_smallest_normal(z: float, rank: int | None) -> None:
    one, x = torch.ones(1, 1, 1, 1, 1), 1e30
    y = selective_scan_2d(
        *(one[0] * x, one * z, -one[0, 0], one, one),
        delta_weight=None if rank is None else one[0, 0],
        routes=("row",),
        backend="cpu",
    )
    smallest = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
    assert abs(y.item() / x - math.exp(z)) <= smallest + 1e-5 * math.exp(z)


@pytest.mark.parametrize("growth", [0.5, 40.0, 90.0])
@pytest.mark.parametrize("n_state", [1, 2])
def test_a_growing_state_among_shrinking_ones(growth: float, n_state: int) -> None:
    """One channel's A above 0, up to infinite states: as the reference, and all the others as without it."""
    call = operands(
        1, 4, 5, 70, n_state, 2, ("row", "column_reversed"), dtype=torch.float32, requires_grad=False
    )
    shrinking = selective_scan_2d(**call, backend="cpu")
    call["A"][:, 66] = growth
    actual, expected = (selective_scan_2d(**call, backend=backend) for backend in ("cpu", "reference"))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert actual[..., 66].isfinite().all() == (growth < 1)
    others = torch.arange(70) != 66
    torch.testing.assert_close(actual[..., others], shrinking[..., others])


def test_calls_from_several_threads_at_once() -> None:
    call = operands(2, 12, 11, 70, 2, 4, dtype=torch.float32)
    grad_y = torch.randn_like(call["x"])
    expected = value_and_gradients(call, grad_y, backend="cpu")
    wrong: list[str] = []

    def work() -> None:
        copy = cast(call, torch.float32)
        for _ in range(20):
            computed = value_and_gradients(copy, grad_y, backend="cpu")
            wrong.extend(name for name, t in expected.items() if not torch.equal(computed[name], t))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """Two images 2³¹ + 64 elements apart in a sparse file."""
    apart, shape = 2**31 + 64, (2, 2, 3, 4)
    file = tmp_path / "sparse"
    with file.open("wb") as out:
        out.truncate(4 * (apart + 24))
    flat = torch.from_file(str(file), shared=True, size=apart + 24, dtype=torch.float32)
    call = operands(*shape, dtype=torch.float32, requires_grad=False)
    x = flat.as_strided(shape, (apart, 12, 4, 1))
    x.copy_(call["x"])
    assert torch.equal(
        selective_scan_2d(**{**call, "x": x}, backend="cpu"), selective_scan_2d(**call, backend="cpu")
    )


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_does_not_leak() -> None:
    call = operands(2, 4, 4, 32, 1, 2, dtype=torch.float32)
    grad_y = torch.randn_like(call["x"])

    def run(n: int) -> int:
        for _ in range(n):
            selective_scan_2d(**call, backend="cpu").backward(grad_y)
            for t in given(call).values():
                t.grad = None
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = run(1_000)
    assert run(3_000) - before < 2**18


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_shares_the_threads_of_torch() -> None:
    """No thread beside torch's, and none at all beside the first with `set_num_threads(1)`."""
    program = """
import os, torch
from vmamba.ops import selective_scan_2d
def scan():
    K, D = 4, 256
    x, delta, z = (torch.randn(2, 8, 8, *rest) for rest in ((D,), (K, D), (K, 1)))
    selective_scan_2d(x, delta, -torch.ones(K, D, 1), z, z, backend="cpu")
    return len(os.listdir("/proc/self/task"))
torch.set_num_threads(1)
before = len(os.listdir("/proc/self/task"))
print(scan() - before)
torch.set_num_threads(3)
torch.randn(10**7).exp().sum()
before = len(os.listdir("/proc/self/task"))
print(scan() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "0"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_stays_for_the_next_call() -> None:
    """And is not mapped anew: beside the first time, activations of usual sizes cause no page fault."""
    program = """
import resource, torch
from vmamba.ops import cpu
assert not isinstance(cpu._load(), str)
def faults(calls):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        held = [torch.ones(2**20) for _ in range(10)]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(2)
print(faults(20))
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert int(run.stdout) < 20 * 10 * 2**22 // 4096 // 10  # a tenth of the pages written


def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        vmamba_scan_forward = staticmethod(lambda *_: 1)

    monkeypatch.setattr(cpu, "_library", Full)
    with pytest.raises(MemoryError, match="selective scan: out of memory"):
        selective_scan_2d(**operands(requires_grad=False), backend="cpu")
