"""Recipes: a training run as checked YAML.

What every task has in common stands here; a task adds its own `data` and `augment` (see `vmamba.train.task`).
"""

import copy
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vmamba.errors import RecipeError


class Section(BaseModel):
    """A part of a recipe: unknown keys and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelRecipe(Section):
    """Which model, of timm's registry."""

    name: str = "vmamba_tiny"
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the model")
    weights: str | None = Field(
        None, description="'pretrained' (downloads), the path of a checkpoint, or null to start anew"
    )


class OptimRecipe(Section):
    """timm's optimisers."""

    name: str = "adamw"
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(
        0.05, ge=0, description="of all but biases, norms and the scan's A, D and δ bias"
    )
    betas: tuple[float, float] = Field((0.9, 0.999), strict=False)
    clip_grad: float | None = Field(5.0, gt=0, description="largest norm of the gradient")
    layer_decay: float | None = Field(None, gt=0, le=1)


class ScheduleRecipe(Section):
    """Linear warm-up, then a cosine down to `min_lr`, set for every step."""

    epochs: int = Field(300, ge=1)
    warmup_epochs: float = Field(20, ge=0)
    warmup_lr: float = Field(5e-7, ge=0)
    min_lr: float = Field(5e-6, ge=0)


class TrainRecipe(Section):
    """How the loop runs."""

    batch_size: int = Field(128, ge=1, description="samples of a step in one process")
    seed: int = Field(0, ge=0)
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = "32-true"
    workers: int = Field(4, ge=0)
    threads: int | None = Field(None, ge=1, description="threads of PyTorch on the CPU; null for its default")
    grad_checkpointing: bool = False


class Recipe(Section):
    """What every task's recipe holds."""

    task: str
    model: ModelRecipe = Field(default_factory=ModelRecipe)
    optim: OptimRecipe = Field(default_factory=OptimRecipe)
    schedule: ScheduleRecipe = Field(default_factory=ScheduleRecipe)
    train: TrainRecipe = Field(default_factory=TrainRecipe)

    def to_yaml(self) -> str:
        """The recipe with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


R = TypeVar("R", bound=Recipe)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a string; here it is a number, as in JSON and YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_values(source: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe's file and lay `key.key=value` over it; a value is YAML.

    Raises:
        RecipeError: The file is missing or no YAML mapping, or an override is not of that form.
    """
    try:
        text = Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{source}: cannot read the recipe ({error.strerror})") from None
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{source}: expected a mapping of sections, got {type(values).__name__}")
    return override_values(values, overrides)


def override_values(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Lay `key.key=value` over plain values; a value is YAML. Returns a copy.

    Raises:
        RecipeError: An override is not of that form.
    """
    values = copy.deepcopy(values)
    for override in overrides:
        path, equals, value = override.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise RecipeError(f"override {override!r}: expected section.key=value, such as optim.lr=1e-3")
        section = values
        for key in keys[:-1]:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise RecipeError(f"override {override!r}: {key!r} is a value, not a section")
        try:
            section[keys[-1]] = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise RecipeError(f"override {override!r}: the value is not YAML: {error}") from None
    return values


def check(recipe_type: type[R], values: dict[str, Any], where: str) -> R:
    """Build a task's recipe from plain values.

    Raises:
        RecipeError: Keys are unknown, or values of the wrong type or out of range; all are listed.
    """
    try:
        return recipe_type.model_validate(values)
    except ValidationError as error:
        problems = [_explain(recipe_type, problem) for problem in error.errors()]
    raise RecipeError(f"{where}: {len(problems)} problems:\n  " + "\n  ".join(problems)) from None


def _explain(recipe_type: type[Section], problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    name = ".".join(location)
    if problem["type"] == "missing":
        return f"{name}: missing"
    if problem["type"] != "extra_forbidden":
        return f"{name}: {problem['msg']}, got {problem['input']!r}"
    section: Any = recipe_type
    for part in location[:-1]:
        section = section.model_fields[part].annotation
    known = list(section.model_fields)
    close = difflib.get_close_matches(location[-1], known, n=1)
    return f"{name}: no such key; " + (
        f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(known)}"
    )
