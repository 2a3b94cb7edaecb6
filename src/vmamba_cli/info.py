"""`vmamba info`."""

from typing import Annotated, Any

import typer


def command(
    model: Annotated[str | None, typer.Argument(help="A model of `vmamba list`, or any of timm's.")] = None,
    size: Annotated[
        str | None, typer.Option("--input", help="Input size, 384 or 512x2048 (height x width).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show versions, devices and engines here, or a model's counts and settings."""
    import json

    from rich.console import Console
    from rich.table import Table

    found = _machine() if model is None else _model(model, size)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in found.items():
        shown = "\n".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(f"[bold]{name}", shown)
    Console(width=None).print(table)


def _machine() -> dict[str, Any]:
    import platform

    import timm
    import torch

    import vmamba

    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return {
        "vmamba": vmamba.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "devices": ", ".join(devices),
        "engines": {
            status.name: f"available ({status.summary})" if status.available else f"no: {status.reason}"
            for status in vmamba.ops.backends()
        },
    }


def _model(name: str, size: str | None) -> dict[str, Any]:
    from vmamba.analysis.complexity import count, create_on_meta, parse_size

    model = create_on_meta(name)
    cfg = model.pretrained_cfg
    in_chans, *default = cfg["input_size"]
    height, width = parse_size(size) if size else default
    counts = count(model, (in_chans, height, width))
    return {
        "model": name,
        "input": f"{in_chans} x {height} x {width}",
        "parameters": counts.parameters,
        "GMACs (as the paper counts)": round(counts.macs / 1e9, 3),
        "GMACs (scan as a for-loop)": round(counts.macs_for_loop / 1e9, 3),
        "feature maps": {
            info["module"]: f"{info['num_chs']} channels, stride {info['reduction']}"
            for info in model.feature_info
        },
        "weights": cfg.get("url") or cfg.get("hf_hub_id") or "none released",
        "preprocessing": {
            "mean": tuple(cfg["mean"]),
            "std": tuple(cfg["std"]),
            "interpolation": cfg["interpolation"],
            "crop_pct": cfg["crop_pct"],
        },
    }
