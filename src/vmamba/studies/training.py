"""The study of scan patterns with accuracy: every pattern trained alike, with several seeds."""

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vmamba.environment import environment
from vmamba.errors import RecipeError
from vmamba.files import write_atomically
from vmamba.studies.run import Budget
from vmamba.studies.writing import ACCURACY
from vmamba.train import run
from vmamba.train.module import NonFiniteError
from vmamba.train.recipe import Recipe, check, read_values
from vmamba.train.runs import read_run
from vmamba.train.session import load_recipe
from vmamba.train.stop import holds_run
from vmamba.train.tasks import task_type


@dataclass(frozen=True)
class Trained:
    """A pattern's trainings.

    Attributes:
        routes: The pattern.
        scores: Of the last evaluation, for each seed whose training ended.
        problems: For each training that broke off because a value was not finite, what and when.
        missing: Trainings that were not begun, because time ran out.
    """

    routes: str
    scores: tuple[float, ...]
    problems: tuple[str, ...]
    missing: int

    @property
    def mean(self) -> float | None:
        """Of the scores."""
        return statistics.mean(self.scores) if self.scores else None

    @property
    def deviation(self) -> float | None:
        """The scores' standard deviation, as of a sample; None for fewer than two."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


def train_patterns(
    recipe: str | Path,
    routes: Sequence[str],
    seeds: int,
    folder: Path,
    overrides: Sequence[str] = (),
    budget: Budget | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> list[Trained]:
    """Train a recipe's model with each pattern and seed; finished ones are kept, stopped ones resumed.

    A seed means the same first weights, order of images and augmentation for every pattern, whose parameters
    have the same shapes. All patterns are trained with one seed before the next, so that they can be
    compared if time runs out.

    Args:
        recipe: Of classification, with a model of this library.
        routes: The patterns, as the model's argument `routes`.
        seeds: Trainings of each; their seeds are 0, 1, …
        folder: For the runs, `runs/<pattern>-<seed>`, and `accuracy.json`, `accuracy.md`.
        overrides: `section.key=value` each, laid over the recipe.
        budget: No training begins when its time is over; None for no limit.
        log: Called with a line before each training.

    Raises:
        RecipeError: Something in the recipe is wrong, or a run in the folder is of another one or of data
            elsewhere; or it asks for several processes.
        DataError: The data are missing or damaged.
    """
    one_process(load_recipe(recipe, overrides))
    budget = budget or Budget()
    routes = list(dict.fromkeys(routes))
    scores: dict[str, list[float]] = {name: [] for name in routes}
    problems: dict[str, list[str]] = {name: [] for name in routes}
    missing = dict.fromkeys(routes, 0)
    for seed in range(seeds):
        for name in routes:
            place = folder / "runs" / f"{name.replace(':', '-')}-{seed}"
            asked = _with(recipe, overrides, name, seed)
            if not _is_finished(place, asked):
                if budget.lacking(0) is not None:
                    missing[name] += 1
                    continue
                log(f"{name}, seed {seed}: {place}")
                try:
                    _train(asked, place)
                except NonFiniteError as error:
                    problems[name].append(f"seed {seed}: {error}")
                    continue
            score = read_run(place, place.name).last
            assert score is not None, place
            scores[name].append(score)
    outcomes = [Trained(n, tuple(scores[n]), tuple(problems[n]), missing[n]) for n in routes]
    contents = {"environment": environment(), "recipe": str(recipe), "overrides": list(overrides)}
    rows = [{**asdict(each), "mean": each.mean, "deviation": each.deviation} for each in outcomes]
    write_atomically(folder / "accuracy.json", json.dumps({**contents, "patterns": rows}, indent=2) + "\n")
    write_atomically(folder / ACCURACY, table(outcomes) + "\n")
    return outcomes


def one_process(recipe: Recipe) -> None:
    """Check that a study can train by a recipe: its other processes would run the whole study.

    Raises:
        RecipeError: The recipe asks for several processes, or torchrun started them.
    """
    asked = (recipe.train.devices or 1) * (recipe.train.nodes or 1)
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if max(asked, started) > 1:
        raise RecipeError(
            f"train.devices: a study trains in one process, and here are {max(asked, started)}; for several, "
            "train each pattern by itself: vmamba train RECIPE 'model.args={routes: …}' train.seed=…"
        )


def _with(recipe: str | Path, overrides: Sequence[str], routes: str, seed: int) -> Recipe:
    args = {**load_recipe(recipe, overrides).model.args, "routes": routes}
    fixed = [f"model.args={json.dumps(args)}", f"train.seed={seed}", "train.devices=1", "train.nodes=1"]
    return load_recipe(recipe, [*overrides, *fixed])


def _is_finished(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder holds a finished run of the recipe.

    Raises:
        RecipeError: It holds a run of another recipe, or of data elsewhere, which may be others.
    """
    if not holds_run(folder):
        return False
    file = folder / "recipe.yaml"
    values, _ = read_values(file)
    changed = run.changes(check(type(recipe), values, str(file)), task_type(recipe.task).resolve(recipe))
    if refused := [key for key in changed if key not in run.RESUMABLE or key == "data.root"]:
        raise RecipeError(
            f"{folder}: holds a training of another recipe, it differs in {', '.join(refused)}; name another "
            "folder by --out"
        )
    return read_run(folder, folder.name).state == "finished"


def _train(recipe: Recipe, folder: Path) -> None:
    if holds_run(folder):
        run.resume(folder, recipe=recipe)
    else:
        run.train(recipe, folder)


def table(outcomes: Sequence[Trained]) -> str:
    """The outcomes as Markdown."""
    lines = [
        "| pattern | top-1, % | standard deviation | trainings | not begun, for lack of time | not finite |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for each in outcomes:
        mean = "" if each.mean is None else f"{100 * each.mean:.2f}"
        deviation = "" if each.deviation is None else f"{100 * each.deviation:.2f}"
        problems = "; ".join(each.problems) or "none"
        counts = f"{len(each.scores)} | {each.missing or ''}"
        lines.append(f"| {each.routes} | {mean} | {deviation} | {counts} | {problems} |")
    return "\n".join(lines)
