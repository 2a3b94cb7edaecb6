"""`vmamba export`.

The parameters of a command are its options, so there may be many.
"""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="export",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Write a model as a file for other runtimes, and check it.",
)


class WeightType(str, Enum):
    float32 = "float32"
    float16 = "float16"


class Weights(str, Enum):
    auto = "auto"
    raw = "raw"
    ema = "ema"


Source = Annotated[
    str, typer.Argument(help="A run's folder, a checkpoint, best.safetensors, the authors' .pth, or a model.")
]
Model = Annotated[
    str | None,
    typer.Option(help="The model or backbone that a file of bare weights is of.", show_default=False),
]
Chosen = Annotated[
    Weights, typer.Option(help="As trained, their average, or the average where a checkpoint has one.")
]
Preprocess = Annotated[
    bool,
    typer.Option("--preprocess", help="Take uint8 images of any size (b, h, w, 3), give probabilities."),
]
Stored = Annotated[
    WeightType, typer.Option("--store", help="How weights are stored; computed is in float32.")
]
Untrained = Annotated[bool, typer.Option("--untrained", help="With weights drawn anew: for tests of speed.")]
NoCheck = Annotated[bool, typer.Option("--no-check", help="Do not run what was written.")]


@app.command("onnx")
def onnx(
    source: Source,
    out: Annotated[Path, typer.Option(help="The file, model.onnx.")],
    model: Model = None,
    weights: Chosen = Weights.auto,
    preprocess: Preprocess = False,
    store: Stored = WeightType.float32,
    untrained: Untrained = False,
    no_check: NoCheck = False,
) -> None:
    """ONNX for images of any size, compared with the model in ONNX Runtime."""
    from vmamba_cli._extra import load

    export = load("vmamba.export", "export")
    predictor = _load(source, model, weights, untrained, out)
    result = export.onnx(predictor, out, preprocess=preprocess, weights=store.value, check=not no_check)
    _show(result, no_check)


@app.command("openvino")
def openvino(
    source: Source,
    out: Annotated[Path, typer.Option(help="The file, model.xml; its weights go to model.bin.")],
    model: Model = None,
    weights: Chosen = Weights.auto,
    preprocess: Preprocess = False,
    store: Stored = WeightType.float32,
    untrained: Untrained = False,
    no_check: NoCheck = False,
    int8: Annotated[bool, typer.Option("--int8", help="Quantise to 8 bits; needs --calibration.")] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="Folder of images by which to quantise.", show_default=False)
    ] = None,
    labelled: Annotated[
        Path | None,
        typer.Option(help="Folder with a folder for each class: tells the accuracy.", show_default=False),
    ] = None,
) -> None:
    """OpenVINO's IR for images of any size, compared with the model in OpenVINO."""
    from vmamba_cli._extra import load
    from vmamba_cli._messages import refuse

    if int8 != (calibration is not None):
        refuse("--int8 and --calibration go together: 8 bits need a folder of images")
    if labelled is not None and not int8:
        refuse("--labelled: goes with --int8")
    export = load("vmamba.export", "export")
    predictor = _load(source, model, weights, untrained, out)
    result = export.openvino(
        predictor,
        out,
        preprocess=preprocess,
        weights=store.value,
        check=not no_check,
        calibration=calibration,
        labelled=labelled,
    )
    _show(result, no_check)


def _load(source: str, model: str | None, weights: Weights, untrained: bool, out: Path) -> Any:
    import vmamba
    from vmamba.export.writing import writable

    writable(out)  # before weights are fetched
    return vmamba.load(source, model=model, device="cpu", weights=weights.value, trained=not untrained)


def _show(result: Any, no_check: bool) -> None:
    from vmamba.words import counted

    typer.echo(
        f"{result.path}: {result.megabytes:.1f} MB, {result.nodes:,} nodes, outputs "
        f"{', '.join(result.outputs)}; any {', '.join(result.dynamic)}"
    )
    check = result.check
    if check is not None:
        typer.echo(
            f"{check.runtime}: differs by at most {check.difference:.1e} of the largest value, on inputs "
            + ", ".join("×".join(map(str, shape)) for shape in check.shapes)
        )
        height, width = check.size
        typer.echo(
            f"one image of {height}×{width}, {counted(check.threads, 'thread')}: "
            f"{check.seconds * 1e3:.1f} ms, PyTorch {check.torch_seconds * 1e3:.1f} ms"
        )
    elif not no_check:
        typer.echo("not checked: ONNX Runtime is not installed (pip install onnxruntime)")
    change = result.quantised
    if change is not None:
        typer.echo(f"8 bits: the same class for {change.agreement:.1%} of {change.images} calibration images")
        if change.labelled:
            typer.echo(
                f"accuracy on {change.labelled} labelled images: {change.accuracy:.2%} in 32 bits, "
                f"{change.accuracy_int8:.2%} in 8"
            )
