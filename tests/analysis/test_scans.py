import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vmamba import SS2D, VMamba
from vmamba.analysis.scans import Scan, ScanShape, record_scans, scan_shapes, watching_scans
from vmamba.ops import selective_scan_2d

IMAGES = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(0))


def again(scan: Scan) -> torch.Tensor:
    """y of the operator on what was recorded."""
    call = scan.call
    return selective_scan_2d(
        call.x,
        call.delta,
        call.A,
        call.B,
        call.C,
        call.D,
        call.delta_bias,
        delta_weight=call.delta_weight,
        delta_softplus=call.delta_softplus,
        routes=scan.route_names,
        out_dtype=scan.y.dtype,
    )


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"d_state": 3, "gate": True, "ssm_conv": 0},
        {"routes": ("column", "row_reversed", "row")},
        {"routes": "cascade", "d_state": 2},
    ],
    ids=["plain", "gate and several states", "other routes", "cascade"],
)
def test_what_is_recorded_is_what_the_operator_takes(kwargs: dict) -> None:
    model = VMamba(num_classes=2, depths=(1, 2), dims=(8, 16), **kwargs)
    scans = record_scans(model, IMAGES)
    assert list(scans) == ["stages.0.blocks.0.op", "stages.1.blocks.0.op", "stages.1.blocks.1.op"]
    cascade = kwargs.get("routes") == "cascade"
    for name, calls in scans.items():
        layer = model.get_submodule(name)
        assert len(calls) == (2 if cascade else 1)
        for scan in calls:
            torch.testing.assert_close(again(scan), scan.y)
            assert scan.call.A.shape == (len(scan.call.routes), *layer.A_log.shape[1:])
            assert not scan.call.x.requires_grad
        if cascade:  # lines of height 1: first the rows of all images, then the columns
            rows, columns = (scan.call.x.shape for scan in calls)
            assert rows[:3] == (2 * columns[2], 1, rows[2])
            assert calls[0].route_names == ("row", "row_reversed")
        else:
            assert torch.equal(torch.cat([scan.call.D for scan in calls]), layer.D)
            assert calls[0].call.routes == list(layer.routes)


def test_the_route_orders_are_those_of_the_scan() -> None:
    (scan,) = record_scans(SS2D(8, routes=("row", "column_reversed")), torch.randn(1, 2, 3, 8))[""]
    assert scan.call.order().tolist() == [[0, 1, 2, 3, 4, 5], [5, 2, 4, 1, 3, 0]]


class Wrapper(nn.Module):
    """A detector's backbone, say, beside an SS2D of its own that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"depths": (1, 1), "dims": (8, 16)}
        self.backbone = timm.create_model("vmamba_pico", features_only=True, out_indices=(0, 1), **sizes)
        self.neck = SS2D(16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.backbone(images)[-1].permute(0, 2, 3, 1)
        return self.neck(self.neck(x))


def test_inside_any_wrapper() -> None:
    scans = record_scans(Wrapper(), IMAGES)
    assert [len(calls) for calls in scans.values()] == [1, 1, 2]
    assert list(scans)[-1] == "neck"
    assert all(name.startswith("backbone.") for name in list(scans)[:-1])
    assert record_scans(timm.create_model("test_resnet"), torch.randn(1, 3, 64, 64)) == {}


def test_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(1)
    model = timm.create_model("vmamba_pico", drop_path_rate=0.5)
    model.stages[0].eval()
    modes = [m.training for m in model.modules()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        expected = VMamba.eval(model)(IMAGES)
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training
    outputs: list[torch.Tensor] = []
    hook = model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    record_scans(model, IMAGES)
    hook.remove()
    torch.testing.assert_close(outputs[0], expected)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="in_chans"):
        record_scans(model, IMAGES[:, :2])
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_watching_keeps_gradients_and_sees_autocast_types() -> None:
    model = VMamba(num_classes=2, depths=(1,), dims=(8,))
    model(IMAGES).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    seen: list[str] = []
    with watching_scans(model, lambda name, scan: seen.append(name)):
        model(IMAGES).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])
    types: list[torch.dtype] = []

    def note(name: str, scan: Scan) -> None:
        types.extend((scan.call.x.dtype, scan.call.B.dtype, scan.y.dtype))

    with watching_scans(model, note), torch.autocast("cpu", torch.bfloat16):
        model(IMAGES)
    assert seen == ["stages.0.blocks.0.op"]
    assert types == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_an_error_in_a_module_does_not_shift_the_names() -> None:
    model = Wrapper().eval()
    seen: list[str] = []
    with watching_scans(model, lambda name, scan: seen.append(name)):
        with pytest.raises(ValueError, match="in_chans"):
            model(IMAGES[:, :2])
        model.neck(torch.randn(1, 2, 2, 16))
        one = torch.ones(1, 1, 1, 1, 1)
        selective_scan_2d(one[0], one, -one[0, 0], one, one, routes=("row",))  # in no module of the model
    assert seen == ["neck"]


def test_without_data() -> None:
    with FakeTensorMode():
        model = VMamba(num_classes=0, depths=(1,), dims=(8,))
        ((scan,),) = record_scans(model, torch.empty(1, 3, 32, 64)).values()
        assert scan_shapes(model, (3, 32, 64)) == [ScanShape(8, 16, 16, 1, 1, scan.route_names)]
    assert scan.call.x.shape == (1, 8, 16, 16)


def test_shapes() -> None:
    model = timm.create_model("vmamba_tiny", num_classes=0)
    cross = ("row", "column", "row_reversed", "column_reversed")
    assert scan_shapes(model.to("meta"), (3, 64, 96)) == [
        ScanShape(16, 24, 192, 1, 6, cross, times=2),
        ScanShape(8, 12, 384, 1, 12, cross, times=2),
        ScanShape(4, 6, 768, 1, 24, cross, times=5),
        ScanShape(2, 3, 1536, 1, 48, cross, times=2),
    ]
    cascade = VMamba(num_classes=0, depths=(1,), dims=(8,), routes="cascade", device="meta")
    both = ("row", "row_reversed")
    assert scan_shapes(cascade, (3, 32, 64)) == [
        ScanShape(1, 16, 16, 1, 1, both, lines=8),
        ScanShape(1, 8, 16, 1, 1, both, lines=16),
    ]
