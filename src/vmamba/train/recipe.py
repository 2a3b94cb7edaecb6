"""Recipes: a training run as checked YAML.

What every task has in common stands here; a task adds its own `data` and `augment` (see `vmamba.train.task`).
"""

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from timm.optim import list_optimizers

from vmamba.config import Section, describe_problems
from vmamba.errors import RecipeError


class ModelRecipe(Section):
    """Which model, of timm's registry."""

    name: str = "vmamba_tiny"
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the model")
    weights: str | None = Field(
        default=None, description="'pretrained' (downloads), the path of a checkpoint, or null to start anew"
    )
    weights_kind: Literal["auto", "raw", "ema"] = Field(
        default="auto",
        description="of a checkpoint that has an average of the weights; 'auto' takes it from a run's, and "
        "what was trained from the authors'",
    )
    new_classifier: bool = Field(
        default=True,
        description="start the classifier anew where that of the weights has another number of classes; "
        "false holds that for an error",
    )
    freeze: Literal["backbone"] | None = Field(
        default=None, description="'backbone' trains the classifier alone, on features without drop path"
    )

    @model_validator(mode="after")
    def _frozen_is_learnt(self) -> "ModelRecipe":
        if self.freeze is not None and self.weights is None:
            raise ValueError("freeze: without weights a frozen backbone stays random; set model.weights")
        return self


class OptimRecipe(Section):
    """timm's optimisers."""

    name: str = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    decay: Literal["clean", "paper"] = Field(
        default="clean",
        description="free of it are biases, norms and the scan's D, and in 'clean' its A and δ bias too",
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.999), strict=False)
    clip_grad: float | None = Field(default=5.0, gt=0, description="largest norm of the gradient")
    layer_decay: float | None = Field(default=None, gt=0, le=1)

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        known: Any = list_optimizers()
        if name not in known:
            close = difflib.get_close_matches(name, known) or known
            raise ValueError(f"no optimiser {name!r} in timm; there are {', '.join(close)}")
        return name


class ScheduleRecipe(Section):
    """Linear warm-up, then a cosine down to `min_lr`, set for every step."""

    epochs: int = Field(default=300, ge=1)
    warmup_epochs: float = Field(default=20, ge=0)
    warmup_lr: float = Field(default=5e-7, ge=0)
    min_lr: float = Field(default=5e-6, ge=0)

    @model_validator(mode="after")
    def _warmup_fits(self) -> "ScheduleRecipe":
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} is not below epochs {self.epochs}")
        return self


class TrainRecipe(Section):
    """How the loop runs. What is learnt depends on `batch_size`, not on how many processes share it."""

    batch_size: int = Field(
        default=128, ge=1, description="samples of an optimiser's step, over all processes"
    )
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="samples of one pass through the model in one process; a step accumulates as many as it "
        "needs; null for all of a process's share",
    )
    seed: int = Field(default=0, ge=0)
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = Field(
        default="32-true", description="the scan's state is float32 (or float64) in each"
    )
    ema_decay: float | None = Field(
        default=None, ge=0, lt=1, description="keep an exponential moving average of the weights too"
    )
    ema_warmup: bool = Field(default=False, description="let the average follow faster at first")
    workers: int = Field(default=4, ge=0, description="of the data, in each process")
    threads: int | None = Field(
        default=None, ge=1, description="threads of PyTorch on the CPU; null for its default"
    )
    grad_checkpointing: bool = Field(default=False, description="recompute each block in the backward pass")
    compile: bool = Field(default=False, description="run the model through torch.compile")
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int | None = Field(
        default=None,
        ge=1,
        description="processes on this node; null for those that torchrun or SLURM started, else one for "
        "every GPU, or one on a CPU",
    )
    nodes: int | None = Field(default=None, ge=1, description="null for those of torchrun or SLURM, else 1")
    strategy: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="of several processes: a copy of the model each, or shards of it"
    )
    collective_timeout: float = Field(
        default=600, gt=0, description="seconds after which a process that does not answer is held for hung"
    )
    checkpoint_every: int | None = Field(
        default=None,
        ge=1,
        description="steps between checkpoints within an epoch; one follows each epoch anyway",
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="the newest, to fall back on if one is damaged"
    )
    on_nonfinite: Literal["raise", "skip"] = Field(
        default="raise",
        description="after a loss or gradient that is not finite: stop, or leave out the step",
    )
    on_error: Literal["raise", "skip"] = Field(
        default="raise", description="at a damaged sample: stop, or leave it out and count it"
    )
    loader_timeout: float = Field(default=60, gt=0, description="seconds to wait for a batch of the workers")
    log_every: int = Field(default=20, ge=1, description="steps between the points of a loss curve")
    loggers: list[Literal["wandb", "mlflow"]] = Field(
        default_factory=list, description="beside metrics.csv and TensorBoard"
    )

    @model_validator(mode="after")
    def _warmup_of_what(self) -> "TrainRecipe":
        if self.ema_warmup and self.ema_decay is None:
            raise ValueError("ema_warmup: there is no average without ema_decay")
        return self


class Recipe(Section):
    """What every task's recipe holds."""

    task: str
    model: ModelRecipe = ModelRecipe()
    optim: OptimRecipe = OptimRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    train: TrainRecipe = TrainRecipe()

    def to_yaml(self) -> str:
        """The recipe with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


R = TypeVar("R", bound=Recipe)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a string and lets a key stand twice; here one is a number, one an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.append(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_values(source: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Read a recipe's file.

    Returns:
        Its values, and the line of each dotted key.

    Raises:
        RecipeError: The file is missing or no YAML mapping.
    """
    try:
        text = Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{source}: cannot read the recipe ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{source}: not a text file ({error})") from None
    try:
        values = yaml.load(text, _Loader)
        node = yaml.compose(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not YAML: {error}") from None
    if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{source}: expected a mapping of sections, got {type(values).__name__}")
    return values, dict(_lines(node, ""))


def _lines(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, int]]:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        yield name, key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            yield from _lines(value, f"{name}.")


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


def check(
    recipe_type: type[R], values: dict[str, Any], where: str, lines: Mapping[str, int] | None = None
) -> R:
    """Build a task's recipe from plain values.

    Args:
        recipe_type: The task's.
        values: As in its YAML.
        where: What to call them in a message.
        lines: Of the dotted keys in the file, if there is one.

    Raises:
        RecipeError: Keys are unknown, or values of the wrong type or out of range; all are listed.
    """
    try:
        return recipe_type.model_validate(values)
    except ValidationError as error:
        problems = []
        for name, sentence in describe_problems(recipe_type, error):
            line = (lines or {}).get(name)
            problems.append(sentence + (f" (line {line})" if line else ""))
    raise RecipeError("\n  ".join([f"{where}: the recipe does not check:", *problems])) from None
