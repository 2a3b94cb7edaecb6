"""`vmamba info`."""

from enum import Enum
from typing import Annotated, Any

import typer

from vmamba_cli._extra import importing


class Heads(str, Enum):
    """Which head to count a model in, as the names in `vmamba.analysis.heads`."""

    MASK_RCNN = "mask_rcnn"
    UPERNET = "upernet"


def command(
    model: Annotated[str | None, typer.Argument(help="A model of `vmamba list`, or any of timm's.")] = None,
    size: Annotated[
        str | None, typer.Option("--input", help="Input size, 384 or 512x2048 (height x width).")
    ] = None,
    head: Annotated[
        Heads | None, typer.Option(help="Count the model as the backbone of this head, at the paper's size.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, devices and backends of this machine, or a model's counts and settings."""
    import json

    for option, value in (("--input", size), ("--head", head)):
        if model is None and value is not None:
            raise typer.BadParameter(f"{option} is of a model; name the model too")
    if model is None:
        facts = _machine()
    else:
        facts = _model(model, size) if head is None else _in_head(model, head.value, size)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        lines = [f"{k}: {v}" for k, v in value.items()] if isinstance(value, dict) else [_text(value)]
        for title, line in zip([name, *[""] * len(lines)], lines, strict=False):
            typer.echo(f"{typer.style(title.ljust(width), bold=True)}  {line}")


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _machine() -> dict[str, Any]:
    import platform
    import re

    with importing():
        import timm
        import torch

        import vmamba
        from vmamba.words import counted

    devices = [f"cpu ({counted(torch.get_num_threads(), 'thread')})"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    devices += [f"xpu:{i} ({torch.xpu.get_device_name(i)})" for i in range(torch.xpu.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    kinds = dict.fromkeys(re.split(r"[: ]", device)[0] for device in devices)
    gpus = [name for device in devices if (name := device.split(" ")[0]).startswith(("cuda:", "xpu:"))]
    return {
        "vmamba": vmamba.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "devices": ", ".join(devices),
        "backends": {
            status.name: f"available ({status.summary})" if status.available else f"no: {status.reason}"
            for status in vmamba.ops.backends()
        },
        "backend of choice": {kind: vmamba.ops.default_backend(kind) for kind in kinds},
        "proof on a GPU": {gpu: _proof(gpu) for gpu in gpus} or {"no GPU here": _WITHOUT_A_GPU},
        "cpu kernel": vmamba.ops.cpu.instruction_set(),
    }


_WITHOUT_A_GPU = (
    "on one, the first eager call checks 'triton' in another process and keeps the verdict: right and "
    "faster, it is the backend of choice, else 'chunked' (docs/gpu.md)"
)


def _proof(device: str) -> str:
    """What is known of `triton` on a GPU."""
    from dataclasses import asdict

    import vmamba
    from vmamba_cli.prove import describe

    reason = next(status.reason for status in vmamba.ops.backends() if status.name == "triton")
    if reason is not None:
        return f"none: {reason}"
    verdict = vmamba.ops.verdict_on("triton", device)
    if verdict is None:
        return f"not yet: the first eager call on it, or `vmamba prove --device {device}`, checks 'triton'"
    return describe(asdict(verdict))


def _model(name: str, size: str | None) -> dict[str, Any]:
    with importing():
        from vmamba.analysis.complexity import count, feature_shapes, parse_size
        from vmamba.analysis.scans import scan_shapes
        from vmamba.models.factory import create_on_meta

    given = parse_size(size) if size else None
    model = create_on_meta(name, given)
    cfg = model.pretrained_cfg
    in_chans, *default = cfg["input_size"]
    height, width = given or default
    input_size = in_chans, height, width
    counts = count(model, input_size)
    shapes = feature_shapes(model, input_size)
    scans = scan_shapes(model, input_size)
    facts = {
        "model": name,
        "input": f"{in_chans} x {height} x {width}",
        "parameters": counts.parameters,
        "GMACs": round(counts.macs / 1e9, 3),
    }
    if scans:
        facts["GMACs, scan as a for-loop"] = round(counts.macs_for_loop / 1e9, 3)
    facts["feature maps"] = {name: " x ".join(map(str, shape)) for name, shape in shapes.items()}
    if scans:
        kinds: dict[str, list[str]] = {}
        for scan in scans:
            kinds.setdefault(_times(scan), []).append(_scan(scan))
        facts["scans"] = {times: "; ".join(each) for times, each in kinds.items()}
    config: Any = getattr(model, "config", None)
    if hasattr(config, "arguments"):
        facts["settings"] = config.arguments()
    packaged = f"in this package, {file}" if (file := cfg.get("file")) else ""
    facts["weights"] = packaged or cfg.get("url") or cfg.get("hf_hub_id") or "none released"
    facts["preprocessing"] = {
        "mean": tuple(cfg["mean"]),
        "std": tuple(cfg["std"]),
        "interpolation": cfg["interpolation"],
        "crop_pct": cfg["crop_pct"],
    }
    return facts


def _in_head(name: str, head: str, size: str | None) -> dict[str, Any]:
    with importing():
        from vmamba.analysis.complexity import parse_size
        from vmamba.analysis.heads import HEADS, count_in_head

    height, width = parse_size(size) if size else HEADS[head].size
    counts = count_in_head(name, head, (height, width))
    return {
        "model": name,
        "head": HEADS[head].summary,
        "input": f"3 x {height} x {width}",
        "parameters": counts.parameters,
        "GMACs": round(counts.macs / 1e9, 3),
        "GMACs, scan as a for-loop": round(counts.macs_for_loop / 1e9, 3),
    }


def _times(scan: Any) -> str:
    """A `ScanShape` as text: how often the scan occurs in the model, and its sizes."""
    lines = f"{scan.lines} lines of " if scan.lines > 1 else ""
    return f"{scan.times} of {lines}{scan.height} x {scan.width}, {scan.channels} channels"


def _scan(scan: Any) -> str:
    return f"state size {scan.n_state}, rank of delta {scan.rank}, routes {' '.join(scan.routes)}"
