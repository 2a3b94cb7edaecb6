"""`vmamba train`."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="A recipe, such as recipes/mnist_pico.yaml; not with --resume.", show_default=False
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value, laid over the recipe.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run [default: runs/<recipe>].", show_default=False)
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on with the run in this folder.", show_default=False)
    ] = None,
    auto_resume: Annotated[
        bool,
        typer.Option(
            "--auto-resume",
            help="Go on if the folder holds a run of this recipe, else start: for job scripts.",
        ),
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show the whole recipe, with every default, and stop.")
    ] = False,
) -> None:
    """Run a recipe, or go on with a run.

    Writes recipe.yaml, env.json, log.txt, metrics.csv, curves.png, tensorboard/ and checkpoints/ with
    best.ckpt and last.ckpt to the folder. Ctrl-C and SIGTERM finish the step and leave a checkpoint to go on
    from. On several GPUs or nodes: train.devices=N, or start it with torchrun -m vmamba_cli, or with srun.
    """
    from vmamba_cli._extra import load

    run = load("vmamba.train.run", "train")
    if resume is not None:
        if out is not None or auto_resume or print_config:
            raise typer.BadParameter("--resume takes overrides of how the run goes on, and nothing else")
        laid_over = [*([recipe] if recipe is not None else []), *(overrides or [])]
        folder, scores = resume, run.resume(resume, laid_over)
    else:
        if recipe is None:
            raise typer.BadParameter("give a recipe, such as recipes/mnist_pico.yaml, or --resume FOLDER")
        checked = run.load_recipe(recipe, overrides or [])
        if print_config:
            typer.echo(checked.to_yaml(), nl=False)
            return
        folder = out or Path("runs") / Path(recipe).stem
        if auto_resume and run.holds_run(folder):
            scores = run.resume(folder, recipe=checked)
        else:
            scores = run.train(checked, folder)
    if run.is_first_process():
        for name, value in scores.items():
            typer.echo(f"{name} {value:.4f}")
        typer.echo(f"wrote {folder}; next: vmamba eval {folder / 'checkpoints' / 'best.ckpt'}")
