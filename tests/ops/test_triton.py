"""What only the Triton backend can get wrong: tiles, blocks of channels, packing, what it saves."""

import pytest
import torch

from scans import assert_accurate, operands, value_and_gradients
from vmamba.ops import selective_scan_2d
from vmamba.ops.triton import backend as triton

pytestmark = pytest.mark.skipif(
    not triton.interpreted(), reason="the kernels are interpreted: TRITON_INTERPRET=1"
)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 channels, several to a program and several programs."""
    monkeypatch.setattr(triton, "SETTINGS", dict.fromkeys(triton.SETTINGS, ((1, 8, 8),)))
    monkeypatch.setattr(triton, "PROGRAMS", 3)


@pytest.mark.parametrize(("height", "width"), [(5, 6), (9, 12), (9, 33), (1, 140), (140, 1)])
def test_any_tiles_and_blocks(height: int, width: int) -> None:
    """One tile in both directions, in forward alone, in none; channels that are no multiple of a block."""
    call = operands(2, height, width, 20, n_state=2, rank=2)
    grad_y = torch.randn_like(call["x"])
    expected = value_and_gradients(call, grad_y, backend="reference")
    for name, actual in value_and_gradients(call, grad_y, backend="triton").items():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(actual, expected[name], rtol=1e-12, atol=1e-12 * largest)


def test_accurate_over_several_blocks() -> None:
    assert_accurate(operands(1, 9, 33, 20, 1, 3, dtype=torch.float32), backend="triton")


def test_neighbours_in_memory_are_packed_without_a_copy() -> None:
    rows = torch.randn(2, 3, 4, 2, 9)
    delta, B, C = rows.split([5, 2, 2], -1)
    packed = triton._packed([delta, B, C])
    assert packed.data_ptr() == rows.data_ptr()
    assert torch.equal(packed, rows)
    for others in ([B, delta, C], [delta, B, C.clone()], [delta, B.double(), C]):
        packed = triton._packed(others)
        assert torch.equal(packed, torch.cat(others, -1))
        assert packed.data_ptr() != rows.data_ptr()


def test_an_infinite_decay_is_no_nan() -> None:
    """A position that pads a tile has a step size of 0, and 0 · A is not a number there."""
    call = operands(1, 3, 5, 4, requires_grad=False)
    call["A"][0, 1, 1] = -torch.inf
    expected = selective_scan_2d(**call, backend="reference")
    torch.testing.assert_close(selective_scan_2d(**call, backend="triton"), expected, rtol=1e-12, atol=1e-12)


def test_the_same_bits_each_time() -> None:
    call = operands(2, 9, 20, 20, n_state=1, dtype=torch.float32)
    grad_y = torch.randn_like(call["x"])
    first, second = (value_and_gradients(call, grad_y, backend="triton") for _ in range(2))
    assert all(torch.equal(second[name], t) for name, t in first.items())
