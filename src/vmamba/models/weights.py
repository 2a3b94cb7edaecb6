"""Loading weights into a model that may differ from the one they were trained in, where that is permitted.

No weight is skipped, kept or converted in silence: a difference that was not permitted raises before the
model is changed, and the others are listed in the report.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby
from os import PathLike
from typing import Any, Literal

import timm
import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from vmamba.errors import CheckpointError
from vmamba.models.checkpoints import Checkpoint, Weights, open_checkpoint
from vmamba.models.official import convert_names
from vmamba.words import counted

_WRAPPERS = {"module", "model", "backbone", "body", "ema", "_orig_mod"}
"""Prefixes by which DDP, Lightning, mmengine, detectors, averages and torch.compile wrap a model's names."""

_BEHIND_THE_STAGES = ("norm.", "fc_norm.", "outnorm")
"""Names of the norms between a backbone and what uses it, beside the classifier's own module."""


@dataclass(frozen=True)
class LoadReport:
    """What a load took from a file, and what it did not.

    Attributes:
        source: The file.
        weights: "raw" or "ema".
        prefix: The prefix of the names in the file, such as "backbone.".
        loaded: Names in the model of the weights that were loaded, converted ones among them.
        converted: How weights were changed, by their names in the model.
        left_out: Names in the file, without the prefix, of what the model has no place for.
        elsewhere: Names in the file without the prefix, such as a detector's neck and heads.
        missing: Names in the model of what the file does not have; they keep the values that they had.
        notes: Further remarks, in sentences.
    """

    source: str
    weights: str
    prefix: str = ""
    loaded: Sequence[str] = ()
    converted: Mapping[str, str] = field(default_factory=dict)
    left_out: Sequence[str] = ()
    elsewhere: Sequence[str] = ()
    missing: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def summary(self) -> str:
        """One line: the numbers of each."""
        numbers = [f"{counted(len(self.loaded), 'weight')} loaded"]
        if self.converted:
            numbers.append(f"{len(self.converted)} of them converted")
        if self.left_out or self.elsewhere:
            numbers.append(f"{len(self.left_out) + len(self.elsewhere)} of the file left out")
        if self.missing:
            numbers.append(f"{len(self.missing)} of the model not in the file")
        kind = ", average" if self.weights == "ema" else ""
        return f"{self.source}{kind}: {', '.join(numbers)}"

    def __str__(self) -> str:
        lines = [self.summary, *(f"  {note}" for note in self.notes)]
        lines += [f"  converted: {name} {how}" for name, how in self.converted.items()]
        lines += [f"  left out: {names}" for names in _abridged(self.left_out)]
        lines += [f"  left out, outside {self.prefix}: {names}" for names in _abridged(self.elsewhere)]
        lines += [f"  not in the file, kept as it was: {names}" for names in _abridged(self.missing)]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Target:
    """The model that is loaded into.

    Attributes:
        model: The model.
        prefix: A wrapper's prefix in all of its names ("model." of timm's `features_only`).
        tensors: Its state dict, without the prefix.
        classifiers: Names of its classifiers, or of those that it would have.
        first_convs: Names of the convolutions that take the image.
        convert: From the names in a file to the model's: its method `convert_names`, if it has one.
    """

    model: nn.Module
    prefix: str
    tensors: Mapping[str, Tensor]
    classifiers: Sequence[str]
    first_convs: Sequence[str]
    convert: Callable[[Mapping[str, Any], Mapping[str, torch.Size]], dict[str, Any]]

    def is_classifier(self, name: str) -> bool:
        return name.rpartition(".")[0] in self.classifiers

    def is_behind_the_stages(self, name: str) -> bool:
        """Whether a name is that of the classifier, or of what lies between the stages and it."""
        modules = tuple(f"{name.partition('.')[0]}." for name in self.classifiers)
        return self.is_classifier(name) or name.startswith((*modules, *_BEHIND_THE_STAGES))


def load_weights(
    model: nn.Module,
    source: str | PathLike[str] | Mapping[str, Any] | Checkpoint,
    *,
    classifier: Literal["keep", "drop", "new"] = "keep",
    in_chans: Literal["convert", "refuse"] = "refuse",
    partial: bool | str | Sequence[str] = False,
    weights: Weights = "auto",
) -> LoadReport:
    """Load weights into a model; what differs must be permitted.

    Args:
        model: Of any kind: a `VMamba`, a `features_only` model or its `.model`, another model of timm's.
        source: A file, a run's folder or an address (see `vmamba.models.checkpoints.resolve_checkpoint`), a
            state dict, or an opened checkpoint. The names may be ours, the VMamba authors' or the model's
            own, with prefixes such as `module.`, `model.`, `backbone.` or `ema.`, which detectors and
            trainers add.
        classifier: "keep": the file's classifier must fit. "new": it is loaded where it fits; otherwise the
            model keeps its own, for other classes. "drop": it is left out, as for features. The latter two
            also cover the norms behind the stages, which feature extractors and detectors replace.
        in_chans: "convert" adapts the first convolution to another number of image channels, as timm does.
        partial: What may be left out of the file, or missing in it: patterns of names such as
            "stages.2.blocks.*", or True for anything.
        weights: "raw", as trained, "ema", their average, or "auto": a run's average if it has one, otherwise
            those as trained.

    Returns:
        What was loaded, converted, left out and missing; `print` it, or its `summary`.

    Raises:
        MissingCheckpointError: There is no such file (a `FileNotFoundError`).
        CheckpointError: The file cannot be read safely, or something differs that was not permitted; all of
            it is listed, and the model is as it was.
        ValueError: A permission is not one of those above.
    """
    _check_permissions(classifier, in_chans, weights)
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    patterns = ["*"] if partial is True else [partial] if isinstance(partial, str) else list(partial or ())
    target = _target(model)
    kind = checkpoint.kind(weights)
    prefix, file_weights = _strip_wrappers(checkpoint.weights[kind], target)
    outside = [name for name in checkpoint.weights[kind] if not name.startswith(prefix)]
    plan = _Plan(target, file_weights)
    plan.match(classifier, in_chans == "convert", patterns)
    if classifier == "keep":
        unmatched = (name for name in outside if not any(fnmatchcase(name, each) for each in patterns))
        plan.problems += [f"unexpected: {name}" for name in unmatched]
    plan.problems += _meta_problem(target)
    if plan.problems:
        listed = "\n  ".join(plan.problems)
        hints = "".join(f"\n{hint}" for hint in plan.hints(classifier, in_chans))
        raise CheckpointError(
            f"{checkpoint.path}: does not fit {type(model).__name__}; nothing was loaded. "
            f"{counted(len(plan.problems), 'problem')}:\n  {listed}{hints}"
        )
    model.load_state_dict({target.prefix + name: value for name, value in plan.loaded.items()}, strict=False)
    return LoadReport(
        source=checkpoint.path,
        weights=kind,
        prefix=prefix,
        loaded=list(plan.loaded),
        converted=plan.converted,
        left_out=plan.left_out,
        elsewhere=outside,
        missing=plan.missing,
        notes=plan.notes,
    )


def fits(model: nn.Module, state_dict: Mapping[str, Any]) -> bool:
    """Whether every weight of a file has a place of its shape in a model, and every place is filled."""
    target = _target(model)
    prefix, weights = _strip_wrappers(state_dict, target)
    if weights.keys() != target.tensors.keys() or any(not name.startswith(prefix) for name in state_dict):
        return False
    return all(
        isinstance(weight, Tensor) and weight.shape == target.tensors[name].shape
        for name, weight in weights.items()
    )


def _check_permissions(classifier: str, in_chans: str, weights: str) -> None:
    for name, value, choices in (
        ("classifier", classifier, ("keep", "drop", "new")),
        ("in_chans", in_chans, ("convert", "refuse")),
        ("weights", weights, ("auto", "raw", "ema")),
    ):
        if value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def _meta_problem(target: _Target) -> list[str]:
    """Copying into a tensor on the meta device does nothing, and PyTorch says so in a warning at most."""
    if any(tensor.is_meta for tensor in target.tensors.values()):
        return ["the model is on the meta device and can hold no weights; create it on a real one"]
    return []


class _Plan:
    """Which weight of a file goes where in a model, and the differences that forbid the load.

    Args:
        target: The model.
        weights: Of the file, under the model's names.
    """

    def __init__(self, target: _Target, weights: Mapping[str, Any]) -> None:
        self.target, self.weights = target, weights
        self.loaded: dict[str, Tensor] = {}
        self.converted: dict[str, str] = {}
        self.left_out: list[str] = []
        self.missing: list[str] = []
        self.notes: list[str] = []
        self.problems: list[str] = []

    def match(self, classifier: str, convert_channels: bool, partial: Sequence[str]) -> None:
        """Fill `loaded`, `problems` and the other lists."""
        target = self.target

        def permitted(name: str) -> bool:
            behind = classifier != "keep" and target.is_behind_the_stages(name)
            return behind or any(fnmatchcase(name, pattern) for pattern in partial)

        refused = []
        for name, tensor in target.tensors.items():
            if name in self.weights and not (classifier == "drop" and target.is_classifier(name)):
                continue
            if permitted(name):
                self.missing.append(name)
            else:
                refused.append(f"missing: {name} {tuple(tensor.shape)}")
        self.problems += refused
        for name, weight in self.weights.items():
            dropped = classifier == "drop" and target.is_classifier(name)
            if name not in target.tensors or dropped:
                if dropped or permitted(name):
                    self.left_out.append(name)
                else:
                    self.problems.append(f"unexpected: {name}")
            elif not isinstance(weight, Tensor):
                self.problems.append(f"not a tensor: {name} ({type(weight).__name__})")
            elif weight.shape == target.tensors[name].shape:
                self.loaded[name] = weight
            else:
                self._other_shape(name, weight, classifier, convert_channels)
        if not self.loaded and not self.problems:
            self.problems.append("no weight of the file has a place in the model")

    def _other_shape(self, name: str, weight: Tensor, classifier: str, convert_channels: bool) -> None:
        shape = self.target.tensors[name].shape
        if classifier == "new" and self.target.is_classifier(name) and weight.shape[1:] == shape[1:]:
            self.left_out.append(name)
            self.missing.append(name)
            if weight.ndim > 1:
                self.notes.append(
                    f"its classifier {name.rpartition('.')[0]} has {len(weight)} outputs, the model's "
                    f"{shape[0]}: the model keeps its own"
                )
            return
        if convert_channels and self._other_channels(name, weight):
            self.loaded[name] = _adapt(weight, shape[1])
            self.converted[name] = f"from {weight.shape[1]} to {shape[1]} image channels"
            return
        self.problems.append(f"shape: {name} expected {tuple(shape)}, got {tuple(weight.shape)}")

    def _other_channels(self, name: str, weight: Tensor) -> bool:
        """Whether a weight belongs to a convolution of the image and differs only in its input channels."""
        shape = self.target.tensors[name].shape
        is_first = name.rpartition(".")[0] in self.target.first_convs
        alike = weight.ndim == 4 and (*shape[:1], *shape[2:]) == (*weight.shape[:1], *weight.shape[2:])
        return is_first and alike

    def hints(self, classifier: str, in_chans: str) -> list[str]:
        """How to permit each kind of problem."""
        target, hints = self.target, []
        wrong = [problem.split(": ", 1)[1].split(" ")[0] for problem in self.problems if ": " in problem]
        if any(name.startswith("outnorm") for name in wrong):
            hints.append(
                "'outnorm*' belong to a backbone of a detector or segmenter, which norms every stage's map: "
                "vmamba.heads.Features"
            )
        behind = [name for name in wrong if target.is_behind_the_stages(name)]
        elsewhere = [name for name in wrong if name not in self.weights and name not in target.tensors]
        if classifier == "keep" and (behind or elsewhere):
            has_one = any(target.is_classifier(name) for name in target.tensors)
            hints.append(
                "vmamba.load_weights(model, file, classifier='new') keeps the model's own classifier where "
                "the file's does not fit"
                if has_one
                else "vmamba.load_weights(model, file, classifier='drop') leaves out the file's classifier, "
                "which this model has no place for"
            )
        if in_chans == "refuse" and any(
            name in self.weights and self._other_channels(name, self.weights[name])
            for name in wrong
            if name in target.tensors and isinstance(self.weights.get(name), Tensor)
        ):
            hints.append("Another number of image channels: load_weights(…, in_chans='convert') adapts them")
        patterns = _stages([name for name in wrong if name not in behind], self)
        if patterns:
            hints.append(f"Other stages or blocks: load_weights(…, partial={patterns}) permits them")
        return hints


def _stages(names: Iterable[str], plan: _Plan) -> list[str]:
    """Patterns for whole stages or blocks that only the file or only the model has."""
    shared = [name.split(".") for name in plan.weights.keys() & plan.target.tensors.keys()]
    patterns: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for length in (2, 4):  # stages.2, stages.2.blocks.1
            module = parts[:length]
            if parts[0] == "stages" and len(parts) > 4 and all(s[:length] != module for s in shared):
                patterns[f"{'.'.join(module)}.*"] = None
                break
    return list(patterns)


def _adapt(weight: Tensor, channels: int) -> Tensor:
    """timm's conversion of the first convolution, which before 1.0.23 supports only three channels."""
    try:
        if weight.shape[1] == 3:
            return adapt_input_conv(channels, weight)
        return adapt_input_conv(channels, weight, base_chans=weight.shape[1])
    except (TypeError, NotImplementedError) as error:
        raise CheckpointError(
            f"in_chans: this timm does not convert {weight.shape[1]} image channels to {channels} ({error})"
        ) from error


def _target(model: nn.Module) -> _Target:
    tensors, prefix = dict(model.state_dict()), ""
    while len(first := {name.partition(".")[0] for name in tensors}) == 1 and first <= _WRAPPERS:
        (wrapper,) = first
        prefix += f"{wrapper}."
        tensors = {name.partition(".")[2]: tensor for name, tensor in tensors.items()}
    inner = model.get_submodule(prefix.rstrip(".")) if prefix else model
    convert = getattr(inner, "convert_names", convert_names)
    return _Target(model, prefix, tensors, _classifiers(inner), _first_convs(inner), convert)


def _configured(model: nn.Module, key: str) -> list[str]:
    """Module names in a timm model's configuration, or in that of its architecture."""
    config = getattr(model, "pretrained_cfg", None) or {}
    value = config.get(key)
    if value is None and config.get("architecture") and timm.is_model(config["architecture"]):
        value = getattr(timm.get_pretrained_cfg(config["architecture"]), key, None)
    return [value] if isinstance(value, str) else list(value or ())


def _classifiers(model: nn.Module) -> list[str]:
    if names := _configured(model, "classifier"):
        return names
    get = getattr(model, "get_classifier", None)
    modules = get() if callable(get) else ()
    classifiers = modules if isinstance(modules, tuple) else (modules,)
    return [name for name, module in model.named_modules() if name and any(module is c for c in classifiers)]


def _first_convs(model: nn.Module) -> list[str]:
    if names := _configured(model, "first_conv"):
        return names
    return [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)][:1]


def _strip_wrappers(state_dict: Mapping[str, Any], target: _Target) -> tuple[str, dict[str, Any]]:
    """The prefix that makes most of the file's names match the model's, and the weights without it."""
    prefixes = {""}
    for name in state_dict:
        parts = name.split(".")
        for length in range(1, len(parts)):
            if parts[length - 1] not in _WRAPPERS:
                break
            prefixes.add(".".join(parts[:length]) + ".")
    shapes = {name: tensor.shape for name, tensor in target.tensors.items()}
    results = []
    for prefix in sorted(prefixes, key=lambda prefix: (len(prefix), prefix)):
        inside = {
            name.removeprefix(prefix): weight
            for name, weight in state_dict.items()
            if name.startswith(prefix)
        }
        converted = _flattened(target.convert(inside, shapes), shapes)
        results.append((len(converted.keys() & shapes.keys()), prefix, converted))
    _, prefix, converted = max(results, key=lambda result: result[0])  # the shortest of equal ones
    return prefix, converted


def _flattened(weights: dict[str, Any], shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """Names as timm's rewriting feature extractors have them: `stages.0.…` is `stages_0.…` there."""
    return {
        flat if name not in shapes and (flat := name.replace(".", "_", 1)) in shapes else name: weight
        for name, weight in weights.items()
    }


def _abridged(names: Sequence[str]) -> list[str]:
    """The names; if there are many, the modules that they are in."""

    def module(name: str) -> str:
        return ".".join(name.split(".")[: 4 if ".blocks." in name else 2][:-1]) or name

    lines = []
    for owner, members in groupby(names, module):
        listed = list(members)
        lines.append(listed[0] if len(listed) == 1 else f"{owner}.* ({len(listed)})")
    return lines
