"""Recipes: a training run as checked YAML.

Sections that all tasks share are here; a task adds its own `data` and `augment` (see `vmamba.train.task`).
"""

import copy
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from timm.optim import list_optimizers

from vmamba.config import Section, describe_problems
from vmamba.errors import RecipeError


class ModelRecipe(Section):
    """Which model, of timm's registry."""

    name: str = "vmamba_tiny"
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the model")
    weights: str | None = Field(
        default=None,
        description="'pretrained' (downloaded, unless they come with the package), the path of a checkpoint, "
        "or null to start anew",
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
    def _frozen_has_weights(self) -> "ModelRecipe":
        if self.freeze is not None and self.weights is None:
            raise ValueError("freeze: without weights a frozen backbone stays random; set model.weights")
        return self


class OptimRecipe(Section):
    """timm's optimisers."""

    name: str = "adamw"
    lr: float = Field(default=1e-3, gt=0, le=1e6)
    weight_decay: float = Field(default=0.05, ge=0)
    decay: Literal["clean", "paper"] = Field(
        default="clean",
        description="'clean' leaves out biases, norms and the scan's A, D and δ bias; 'paper' what the "
        "authors leave out: in classification biases, norms and D, in detection and segmentation most norms "
        "alone",
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.999), strict=False)
    clip_grad: float | None = Field(default=5.0, gt=0, description="largest norm of the gradient")
    layer_decay: float | None = Field(default=None, gt=0, le=1)

    @field_validator("name")
    @classmethod
    def _exists(cls, name: str) -> str:
        names: Any = list_optimizers()
        if name not in names:
            close = difflib.get_close_matches(name, names) or names
            raise ValueError(f"no optimiser {name!r} in timm; there are {', '.join(close)}")
        return name

    @field_validator("betas")
    @classmethod
    def _within_range(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"expected two numbers from 0 to below 1, got {list(betas)}")
        return betas


class ScheduleRecipe(Section):
    """The length of a run, and its learning rate: linear warm-up, then the curve `name`, set for every step.

    Give the length as `epochs` or as `steps`, and the warm-up as `warmup_epochs` or as `warmup_steps`.
    """

    name: Literal["cosine", "multistep", "polynomial"] = Field(
        default="cosine",
        description="'cosine' and 'polynomial' fall from optim.lr to min_lr, 'multistep' by `gamma` at each "
        "milestone",
    )
    epochs: int | None = Field(default=None, ge=1, description="300 if `steps` is not given either")
    steps: int | None = Field(default=None, ge=1, description="steps of the optimiser, instead of epochs")
    warmup_epochs: float | None = Field(
        default=None, ge=0, description="20 for a run of epochs if `warmup_steps` is not given either"
    )
    warmup_steps: int | None = Field(default=None, ge=0)
    warmup_lr: float = Field(default=5e-7, ge=0)
    min_lr: float = Field(default=5e-6, ge=0)
    milestones: list[float] = Field(
        default_factory=list,
        description="of 'multistep': where the rate falls, in the unit of the run's length, counted from its "
        "start",
    )
    gamma: float = Field(default=0.1, gt=0, le=1, description="of 'multistep': the factor at a milestone")
    power: float = Field(default=1.0, gt=0, description="of 'polynomial'; 1 is a straight line")
    patience: int | None = Field(
        default=None,
        ge=1,
        description="stop after so many evaluations in a row without a better score; null for the whole run",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_length(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        if values.get("epochs") is None and values.get("steps") is None:
            values["epochs"] = 300
        if values.get("warmup_epochs") is None and values.get("warmup_steps") is None:
            if values.get("epochs") is not None:
                values["warmup_epochs"] = 20.0
            else:
                values["warmup_steps"] = 0
        return values

    @model_validator(mode="after")
    def _one_unit_each(self) -> "ScheduleRecipe":
        for one, other in (("epochs", "steps"), ("warmup_epochs", "warmup_steps")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(
                    f"{one} {getattr(self, one)} and {other} {getattr(self, other)}: give one of them; set "
                    f"the other to null"
                )
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> "ScheduleRecipe":
        for unit in ("epochs", "steps"):
            length, warmup = getattr(self, unit), getattr(self, f"warmup_{unit}")
            if length is not None and warmup is not None and warmup >= length:
                raise ValueError(f"warmup_{unit} {warmup} is not below {unit} {length}")
        return self

    @model_validator(mode="after")
    def _milestones_fit(self) -> "ScheduleRecipe":
        length = self.epochs or self.steps
        assert length is not None
        if (self.name == "multistep") != bool(self.milestones):
            raise ValueError(
                "milestones: missing; 'multistep' needs them"
                if self.name == "multistep"
                else f"milestones: only 'multistep' has them, and name is {self.name!r}"
            )
        ordered = all(low < high for low, high in pairwise([0.0, *self.milestones, float(length)]))
        if self.milestones and not ordered:
            unit = "steps" if self.epochs is None else "epochs"
            given = ", ".join(f"{milestone:g}" for milestone in self.milestones)
            raise ValueError(
                f"milestones: expected rising numbers between 0 and schedule.{unit} ({length}), got [{given}]"
            )
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
        default=None,
        ge=1,
        le=1024,
        description="threads of PyTorch on the CPU; null for 1 where a layer of the model has little work, "
        "else for OMP_NUM_THREADS or PyTorch's default",
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
    sync_batchnorm: bool = Field(
        default=False, description="let BatchNorm see the batches of all processes as one"
    )
    strategy: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="of several processes: a copy of the model each, or shards of it"
    )
    collective_timeout: float = Field(
        default=600, gt=0, description="seconds after which a process that does not answer is held for hung"
    )
    eval_every_steps: int | None = Field(
        default=None,
        ge=1,
        description="steps between evaluations; null to evaluate after every epoch. The last step of a run "
        "is always followed by one",
    )
    checkpoint_every: int | None = Field(
        default=None,
        ge=1,
        description="steps between checkpoints; one follows each evaluation anyway",
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
    def _warmup_needs_average(self) -> "TrainRecipe":
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

    def settings(self) -> dict[str, Any]:
        """Every value by its dotted key, such as "optim.lr"; a model's arguments are one value."""
        return _flat(self.model_dump(mode="json"))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and prefix != "model.":
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


R = TypeVar("R", bound=Recipe)


class _Loader(yaml.SafeLoader):
    """As YAML 1.1, but 1e-3 is a number instead of a string, and a duplicate key an error."""

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
        RecipeError: The file is missing or not a YAML mapping.
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
        if not isinstance(values, dict) or not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{source}: expected a mapping of sections, got {type(values).__name__}")
        json.dumps(values, default=str)  # raises on a mapping that contains itself
        return values, dict(_lines(node, ""))
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not YAML: {error}") from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{source}: a section that contains itself, or is nested too deep") from None


def _lines(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, int]]:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        yield name, key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            yield from _lines(value, f"{name}.")


def override_values(
    values: dict[str, Any], overrides: Sequence[str], recipe_type: type[BaseModel] | None = None
) -> dict[str, Any]:
    """Apply `key.key=value` overrides to plain values. Returns a copy.

    Args:
        values: As in a recipe's YAML.
        overrides: For a field of type str the value is used verbatim (but "null" is None where the field
            allows None); for other fields it is read as YAML.
        recipe_type: Gives the fields' types; without it every value is read as YAML.

    Raises:
        RecipeError: An override is not of that form, or its value is empty.
    """
    values = copy.deepcopy(values)
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise RecipeError(f"override {override!r}: expected section.key=value, such as optim.lr=1e-3")
        if not text.strip():
            raise RecipeError(
                f"override {override!r}: the value is empty (an unset variable of the shell?); write "
                f"{path}=null for none"
            )
        section = values
        for key in keys[:-1]:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise RecipeError(f"override {override!r}: {key!r} is a value, not a section")
        section[keys[-1]] = _override_value(text, override, _annotations(recipe_type, keys))
    return values


def _override_value(text: str, override: str, annotations: set[Any]) -> Any:
    """The value of an override for a field of these types."""
    if str in annotations and not (list in annotations and text.lstrip().startswith("[")):
        if text == "null" and type(None) in annotations:
            return None
        return int(text) if int in annotations and text.isdecimal() else text
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"override {override!r}: the value is not YAML: {error}") from None


def _annotations(section: Any, keys: Sequence[str]) -> set[Any]:
    """The types of the field at a path of keys, without unions; empty if there is no such field."""
    sections = {section}
    for key in keys:
        fields = [each.model_fields for each in sections if _is_section(each)]
        sections = {kind for names in fields if key in names for kind in _alternatives(names[key].annotation)}
    return sections


def _alternatives(annotation: Any) -> Iterator[Any]:
    """A type's alternatives: the members of a union, str for a literal string, list for a list[...]."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from _alternatives(member)
    elif origin is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif origin is Literal:
        yield from {type(value) for value in get_args(annotation)}
    else:
        yield origin or annotation


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def check(
    recipe_type: type[R], values: dict[str, Any], where: str, lines: Mapping[str, int] | None = None
) -> R:
    """Build a task's recipe from plain values.

    Args:
        recipe_type: The task's.
        values: As in its YAML.
        where: Where they come from, for messages.
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
