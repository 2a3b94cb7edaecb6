from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import vmamba
from scans import operands
from vmamba import SS2D, VMamba
from vmamba.analysis import attention, memory
from vmamba.analysis.attention import (
    KINDS,
    AttentionError,
    ScanAttention,
    scaled,
    scan_attention,
    scan_names,
)
from vmamba.analysis.complexity import count
from vmamba.analysis.receptive_field import receptive_field
from vmamba.analysis.routes import routes_in
from vmamba.analysis.scans import Scan, record_scans
from vmamba.ops import reference
from vmamba.ops.operands import Operands
from vmamba.ops.routes import route_codes

ROUTES = ("column", "row", "row_reversed", "column_reversed", "column")


@pytest.fixture
def model() -> VMamba:
    torch.manual_seed(3)
    return VMamba(num_classes=0, depths=(1, 2), dims=(8, 16), d_state=3, routes=ROUTES).train()


IMAGE = torch.randn(3, 40, 60, generator=torch.Generator().manual_seed(0))
LAST = {"stage": 1, "block": 1}  # 5×8 positions


class Alone(nn.Module):
    """An SS2D in a network of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.layer = SS2D(8, d_state=2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(self.patches(images).permute(0, 2, 3, 1))


def test_any_model_with_an_ss2d(model: VMamba) -> None:
    expected = scan_attention(model, IMAGE, **LAST).maps().maps
    wrapped = scan_attention(nn.Sequential(model), IMAGE, **LAST).maps().maps
    torch.testing.assert_close(wrapped, expected)
    features = timm.create_model("vmamba_pico", features_only=True, out_indices=(0, 1))
    assert scan_attention(features, IMAGE, stage=1, block=1).size == (10, 15)
    named = scan_attention(nn.Sequential(model), IMAGE, module="0.stages.1.blocks.1")
    torch.testing.assert_close(named.maps().maps, expected)
    alone = scan_attention(Alone(), IMAGE, module="layer")
    assert (alone.maps().maps.shape, alone.size) == ((4, 35, 35), (5, 7))
    assert torch.equal(scan_attention(Alone(), IMAGE, module="").orders, alone.orders)


def test_which_ss2ds_there_are(model: VMamba) -> None:
    sizes = {"stages.0.blocks.0.op": (10, 15), "stages.1.blocks.0.op": (5, 8), "stages.1.blocks.1.op": (5, 8)}
    assert scan_names(model, (3, 40, 60)) == sizes
    assert model.training
    assert scan_names(Alone(), (3, 40, 60)) == {"layer": (5, 7)}
    assert scan_names(VMamba(num_classes=0, depths=(1,), dims=(8,), routes="cascade"), (3, 40, 60)) == {}
    assert scan_names(nn.Conv2d(3, 8, 1), (3, 4, 6)) == {}


@pytest.mark.parametrize("values_at_once", [1, 2**23])
def test_a_map_is_what_the_scan_does(
    model: VMamba, values_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an input that is the same in all channels, the scan's mean over channels is the merged map's."""
    monkeypatch.setattr(attention, "_VALUES_AT_ONCE", values_at_once)
    scan = scan_attention(model, IMAGE, **LAST)
    assert scan.size == (5, 8)
    assert scan.routes == ROUTES

    layer, inputs = model.stages[1].blocks[1].op, []
    hook = layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        model.eval()(IMAGE[None])
        hook.remove()
        _, delta, B, C, _ = layer.project(inputs[0])
        v = torch.randn(1, 5, 8, 1)
        x = v.expand(-1, -1, -1, layer.D.shape[1])
        weights = {"delta_bias": layer.dt_bias, "delta_weight": layer.dt_weight}
        y = vmamba.ops.selective_scan_2d(x, delta, layer.A(), B, C, **weights, routes=ROUTES)
    merged = scan.maps(with_delta=True).merged()
    torch.testing.assert_close((merged @ v.flatten()).view(5, 8), y.mean(-1)[0])


def test_the_factors_of_a_map(model: VMamba) -> None:
    scan = scan_attention(model, IMAGE, **LAST)
    actual = {kind: scan.maps(kind).maps for kind in KINDS}
    for maps in actual.values():
        assert maps.shape == (5, 40, 40)
        torch.testing.assert_close(maps, maps.tril())
    keeps = actual["ww"].diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(keeps, torch.full_like(keeps, 3.0))  # a state that keeps all, n of them
    falls = actual["ww"].diff(dim=2).tril(-1)  # the further back, the less is left
    assert (falls >= 0).all()
    assert (falls > 0).any()
    torch.testing.assert_close(actual["CB"].diagonal(dim1=1, dim2=2), actual["CwBw"].diagonal(dim1=1, dim2=2))
    shares = (scan.maps("CB", with_delta=True).maps / actual["CB"])[0].tril().nan_to_num()
    torch.testing.assert_close(shares[-1].expand_as(shares).tril(), shares)  # one δ to a column


@pytest.mark.parametrize("with_delta", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_queries_are_rows_and_the_diagonal_of_the_maps(model: VMamba, kind: str, with_delta: bool) -> None:
    scan = scan_attention(model, IMAGE, **LAST)
    maps = scan.maps(kind, with_delta)
    merged = maps.merged()
    for position in (0, 13, 39):
        row = scan.row(position, kind, with_delta)
        assert row.shape == (5, 5, 8)
        torch.testing.assert_close(row.sum(0).flatten(), merged[position])
        for route, order, heat in zip(maps.maps, maps.orders, row, strict=True):
            torch.testing.assert_close(heat.flatten()[order], route[order == position][0])
    torch.testing.assert_close(scan.diagonal(kind, with_delta), merged.diagonal().view(5, 8))
    positions, rows = scan.progress(2, kind, with_delta)
    assert positions == [30, 20, 10, 0]  # of 40 positions, from the last to the first
    torch.testing.assert_close(rows, torch.stack([scan.row(p, kind, with_delta)[2] for p in positions]))


def test_what_a_route_has_reached(model: VMamba) -> None:
    scan = scan_attention(model, IMAGE, **LAST)
    position = scan.position((0.5, 0.99))
    assert position == 4 * 8 + 4
    reached = scan.reached(position).flatten(1)
    assert torch.equal(reached[1], torch.arange(40) <= position)
    assert torch.equal(reached[2], torch.arange(40) >= position)
    assert torch.equal(scan.row(position)[1].flatten() != 0, reached[1])
    each = scan.maps().merged(scale_each=True)
    assert 0 <= each.min() <= each.max() <= 1
    assert scaled(torch.ones(3)).tolist() == [0, 0, 0]
    for query in ((0.2, 1.0), (-0.1, 0.5), (float("nan"), 0.5)):
        with pytest.raises(AttentionError, match=r"query: expected x and y in \[0, 1\)"):
            scan.position(query)
    with pytest.raises(AttentionError, match="position: expected 0 to 39 for 5 x 8 positions, got 40"):
        scan.row(40)


def test_maps_too_large_are_refused_and_rows_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1024² the first stage has 65,536 positions."""
    monkeypatch.setattr(memory, "_available_memory", lambda: 79 * 2**30)
    torch.manual_seed(0)
    model = VMamba(num_classes=0, depths=(1,), dims=(4,), ssm_ratio=1.0)
    scan = scan_attention(model, torch.randn(3, 1024, 1024), stage=0, block=0)
    assert scan.size == (256, 256)
    with pytest.raises(
        AttentionError, match=r"4 routes over 256 x 256 positions .* take 80.0 GiB, and 79.0 GiB"
    ):
        scan.maps()
    row = scan.row(scan.position((0.5, 0.5)), with_delta=True)
    assert row.shape == (4, 256, 256)
    assert row.isfinite().all()


def test_the_model_is_left_as_it_was(model: VMamba) -> None:
    half = scan_attention(model.bfloat16(), IMAGE, **LAST).maps().maps
    assert half.dtype == torch.float32
    assert half.isfinite().all()
    assert model.training
    assert not model.stages[1].blocks[1].op._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())


def test_a_long_decay_stays_finite(model: VMamba) -> None:
    torch.nn.init.constant_(model.stages[1].blocks[1].op.dt_bias, 1e3)
    scan = scan_attention(model, IMAGE, **LAST)
    torch.testing.assert_close(scan.maps("ww").maps, 3 * torch.eye(40).expand(5, -1, -1))
    row = torch.zeros(5, 40)
    row[:, 7] = 3
    torch.testing.assert_close(scan.row(7, "ww").flatten(1), row)


def test_what_has_no_map_is_an_error(model: VMamba) -> None:
    with pytest.raises(
        AttentionError,
        match="no block 2 in stage 1 with a scan; stages 0, 1, … have 1, 2 of them, counted from 0",
    ):
        scan_attention(model, IMAGE, stage=1, block=2)
    scan = scan_attention(model, IMAGE, **LAST)
    for query in (
        scan.maps,
        scan.diagonal,
        lambda kind: scan.row(0, kind),
        lambda kind: scan.progress(0, kind),
    ):
        with pytest.raises(AttentionError, match="kind: expected one of 'CB', 'CwBw', 'ww', got 'QK'"):
            query("QK")
    with pytest.raises(AttentionError, match="expected one with selective scans, ResNet has none"):
        scan_attention(timm.create_model("test_resnet"), IMAGE)
    with pytest.raises(AttentionError, match=r"module: .* 'stages.1' has 2; the SS2Ds are 'stages.0.blocks"):
        scan_attention(model, IMAGE, module="stages.1")
    with pytest.raises(AttentionError, match="the model has no stages; give module, one of 'layer'"):
        scan_attention(Alone(), IMAGE)
    with pytest.raises(AttentionError, match=r"image: expected .* got shape \(1, 3, 40, 60\)"):
        scan_attention(model, IMAGE[None], **LAST)
    cascade = VMamba(num_classes=0, depths=(1,), dims=(8,), routes="cascade")
    with pytest.raises(AttentionError, match="cascade"):
        scan_attention(cascade, IMAGE, stage=0, block=0)
    (scan,) = record_scans(Alone(), torch.stack([IMAGE, IMAGE]))["layer"]
    with pytest.raises(AttentionError, match="expected one of a single image, got 2 images"):
        ScanAttention.of(scan)


def recorded(call: dict[str, Any], initial_state: Tensor | None = None) -> Scan:
    """The scan of an operator's call, in which the reference computes y, without the skip D."""
    routes = route_codes(call["routes"])
    values = Operands(
        *(call[name] for name in ("x", "delta", "A", "B", "C")),
        D=None,
        delta_bias=call["delta_bias"],
        delta_weight=call["delta_weight"],
        delta_softplus=True,
        routes=routes,
        initial_state=initial_state,
    )
    y, last_state, _ = reference.forward(values)
    return Scan(values, None, "reference", y, last_state)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("routes", ["cross", ("column_reversed",)])
@pytest.mark.parametrize("n_state", [1, 3])
def test_the_scan_is_attention(n_state: int, routes: Any, with_state: bool) -> None:
    """Equation 19: in each channel Y = (Q ⊙ w) h + (((Q ⊙ w)(K / w)ᵀ) ⊙ M) V, with V = δx."""
    torch.manual_seed(0)
    call = operands(batch=1, height=4, width=6, n_state=n_state, routes=routes, requires_grad=False)
    k = call["A"].shape[0]
    state = torch.randn(1, k, 4, n_state, dtype=torch.float64) if with_state else None
    scan = recorded(call, state)
    seen = ScanAttention.of(scan)
    x = call["x"].view(24, 4)
    from_state = seen.from_state()
    y = torch.zeros(24, 4, dtype=torch.float64)
    for channel in range(4):
        matrices = seen.of_channel(channel).maps("CwBw", with_delta=True).maps
        for route, (matrix, order) in enumerate(zip(matrices, seen.orders, strict=True)):
            y[order, channel] += matrix @ x[order, channel]
            if state is not None:
                y[order, channel] += from_state[route, :, channel] @ state[0, route, channel]
    torch.testing.assert_close(y.view(1, 4, 6, 4), scan.y, rtol=0, atol=1e-10)


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """S ← diag(gate) S + kᵀ v, o = q S, a step for each row of q, k, gate (l, n) and v (l, d)."""
    state = torch.zeros(k.shape[1], v.shape[1], dtype=v.dtype)
    outputs = []
    for q_t, k_t, v_t, gate_t in zip(q, k, v, gate, strict=True):
        state = gate_t[:, None] * state + k_t[:, None] * v_t
        outputs.append(q_t @ state)
    return torch.stack(outputs)


def test_gated_linear_attention_is_the_case_of_a_decay_that_all_channels_share() -> None:
    torch.manual_seed(0)
    call = operands(batch=1, height=3, width=5, channels=4, n_state=3, routes=("row",), requires_grad=False)
    for name in ("A", "delta_bias", "delta_weight"):
        call[name] = call[name][:, :1].expand_as(call[name]).contiguous()
    scan = recorded(call)
    seen = ScanAttention.of(scan)
    x, delta = call["x"].view(15, 4), seen.delta[0]
    gate = torch.exp(delta[:, :1] * call["A"][0, 0])
    expected = gated_linear_attention(seen.C[0], seen.B[0], delta * x, gate)
    torch.testing.assert_close(scan.y.view(15, 4), expected, rtol=0, atol=1e-10)
    # One matrix serves all channels; with the decay of each channel it would not.
    (matrix,) = seen.maps("CwBw").maps
    torch.testing.assert_close(matrix @ (delta * x), expected, rtol=0, atol=1e-10)
    for channel in range(4):
        torch.testing.assert_close(seen.of_channel(channel).maps("CwBw").maps[0], matrix, rtol=0, atol=1e-12)
    other = ScanAttention.of(recorded(operands(batch=1, n_state=3, routes=("row",), requires_grad=False)))
    maps = [other.of_channel(channel).maps("CwBw").maps for channel in range(2)]
    assert (maps[0] - maps[1]).abs().max() > 0.01


def test_a_model_that_fails_gets_its_mode_back(model: VMamba) -> None:
    model.stages[0].eval()  # frozen
    modes = [module.training for module in model.modules()]
    for call in (
        lambda: scan_attention(model, torch.randn(1, 40, 60), **LAST),
        lambda: scan_names(model, (1, 40, 60)),
        lambda: receptive_field(model, [torch.randn(1, 40, 60)]),
        lambda: routes_in(model, (1, 40, 60)),
        lambda: count(model, (1, 40, 60)),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            call()
        assert [module.training for module in model.modules()] == modes
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
