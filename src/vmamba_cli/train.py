"""`vmamba train`."""

from pathlib import Path
from typing import Annotated, Any

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
        Path | None,
        typer.Option(help="Folder of the run; runs/ and the recipe's name by default.", show_default=False),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with the run in this folder, as vmamba resume does.", show_default=False),
    ] = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="With --resume: let the schedule, the rate and so on change.")
    ] = False,
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

    Writes recipe.yaml, env.json, log.txt, metrics.csv, curves.png, best.safetensors, tensorboard/ and
    checkpoints/ with best.ckpt and last.ckpt to the folder. Ctrl-C and SIGTERM finish the step and leave a
    checkpoint to go on from. On several GPUs or nodes: train.devices=N, or start it with torchrun -m
    vmamba_cli, or with srun.
    """
    from vmamba_cli._checks import require_path, require_recipe
    from vmamba_cli._extra import load

    if resume is not None:
        if out is not None or auto_resume or print_config:
            raise typer.BadParameter("--resume takes overrides of how the run goes on, and nothing else")
        changes = [*([recipe] if recipe is not None else []), *(overrides or [])]
        require_path(resume, "run")
        show(load("vmamba.train.run", "train").resume(resume, changes, extend=extend))
        return
    if recipe is None:
        raise typer.BadParameter("give a recipe, such as recipes/mnist_pico.yaml, or --resume FOLDER")
    if extend:
        raise typer.BadParameter("--extend goes with --resume")
    path = require_recipe(Path(recipe))
    checked = load("vmamba.train.session", "train").load_recipe(path, overrides or [])
    if print_config:
        tasks = load("vmamba.train.tasks", "train")
        typer.echo(tasks.task_type(checked.task).resolve(checked).to_yaml(), nl=False)
        return
    run = load("vmamba.train.run", "train")
    folder = (out or Path("runs") / path.stem).expanduser()
    if auto_resume and run.holds_run(folder):
        show(run.resume(folder, recipe=checked))
    else:
        show(run.train(checked, folder))


def show(outcome: Any) -> None:
    """Print a run's result, in its first process only."""
    from vmamba_cli._extra import load

    if not load("vmamba.train.trainer", "train").is_first_process():
        return
    if outcome.scores:
        typer.echo("last evaluation:")
    for name, value in outcome.scores.items():
        typer.echo(f"  {name} {value:.4f}")
    if outcome.best is not None:
        typer.echo(
            f"best {outcome.monitor} {outcome.best:.4f}, after step {outcome.best_step}: "
            f"{outcome.folder / 'checkpoints' / 'best.ckpt'}, and its weights in best.safetensors"
        )
    wrote = "wrote" if outcome.trained else "nothing left to train in"
    typer.echo(f"{wrote} {outcome.folder}; next: vmamba eval {outcome.folder}")
