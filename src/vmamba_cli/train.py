"""`vmamba train`."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe, such as recipes/mnist_pico.yaml.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, laid over the recipe.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run [default: runs/<recipe>].", show_default=False)
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show the whole recipe, with every default, and stop.")
    ] = False,
) -> None:
    """Run a recipe, or go on with a run.

    Writes recipe.yaml, env.json, metrics.csv, curves.png, checkpoints/best.ckpt and last.ckpt to the folder.
    Ctrl-C finishes the step and leaves a checkpoint to go on from.
    """
    from vmamba_cli._extra import load

    run = load("vmamba.train.run", "train")
    if resume is not None:
        if recipe is not None or overrides or out is not None:
            raise typer.BadParameter("--resume takes the recipe from the folder; give nothing else")
        folder, scores = resume, run.resume(resume)
    else:
        if recipe is None:
            raise typer.BadParameter("give a recipe, such as recipes/mnist_pico.yaml, or --resume FOLDER")
        checked = run.load_recipe(recipe, overrides or [])
        if print_config:
            typer.echo(checked.to_yaml(), nl=False)
            return
        folder = out or Path("runs") / recipe.stem
        scores = run.train(checked, folder)
    for name, value in scores.items():
        typer.echo(f"{name} {value:.4f}")
    typer.echo(f"wrote {folder}; next: vmamba eval {folder / 'checkpoints' / 'best.ckpt'}")
