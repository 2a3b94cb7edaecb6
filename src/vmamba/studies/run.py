"""Run a study: measure its groups one after the other, keep each result, and write tables and a figure.

A study's folder holds `groups/`, a file for each group, kind of measurement and its conditions, and what is
made of them: `results.json`, `table.md`, `table.csv`, `figure.png`. Run again, a study measures only the
groups that are missing.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vmamba.analysis.complexity import Complexity, count
from vmamba.analysis.memory import lacking_memory
from vmamba.bench.models import SubjectError, bench_settings
from vmamba.bench.timing import Ratio
from vmamba.environment import environment
from vmamba.files import write_atomically
from vmamba.models.checkpoints import expand, resolve_checkpoint
from vmamba.models.factory import create_on_meta
from vmamba.studies.study import Conditions, Row, Speed, Study, Subject
from vmamba.studies.writing import write_results

Log = Callable[[str], None]


class Budget:
    """Seconds that the measurements of one or several studies may take.

    Args:
        seconds: None for no limit.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds
        self._rate = 0.0

    def lacking(self, work: float) -> str | None:
        """None if there is time for a group, by what groups took so far; else why not.

        Args:
            work: Multiply-adds of one round of the group.
        """
        if self._end is None:
            return None
        left, needed = self._end - time.monotonic(), work * self._rate
        if left <= 0:
            return "time ran out"
        if needed > left:
            return f"needs about {needed / 60:.0f} min, and {left / 60:.0f} min are left"
        return None

    def spent(self, work: float, seconds: float) -> None:
        """Learn from a group that was measured."""
        self._rate = max(self._rate, seconds / work)


def run_study(
    study: Study,
    folder: Path,
    conditions: Conditions,
    budget: Budget | None = None,
    log: Log = lambda line: None,
) -> list[Row]:
    """Measure what is missing of a study, and write its results.

    Args:
        study: Of `STUDIES`, or one with a part of its subjects.
        folder: For its results; those in it that were measured under the same conditions are kept.
        conditions: How to measure.
        budget: Time; None for no limit.
        log: Called with a line of text at the start of each measurement.

    Returns:
        A row for each subject, also of those that were not measured: their notes say why.

    Raises:
        OSError: The folder cannot be written.
        ModelError: A model is unknown.
        MissingCheckpointError: There are no weights to judge.
        UserError: They cannot be judged; the message says why.
    """
    budget = budget or Budget()
    judged = {model: _weights(what) for model, what in conditions.accuracy.items()}
    counts, results = {}, {}
    for subject in study.subjects:
        log(f"counting {subject.key}")
        counts[subject.key] = each = _count(subject)
        results[subject.key] = Row(subject, each.parameters, each.macs)
    where = _fingerprint(conditions)
    for train in (False, True)[: 1 + conditions.train]:
        for number, group in enumerate(study.groups):
            stem = folder / "groups" / f"{'training' if train else 'inference'}-{number}"
            measured = _Measured(stem, group, replace(conditions, accuracy={}), train, where)
            for key, outcome in measured.get(counts, budget, log).items():
                results[key] = _with(results[key], outcome, train)
            write_results(study, list(results.values()), conditions, folder)
    for key, row in results.items():
        if row.subject.model in judged:
            log(f"judging {key}")
            top1 = _top1(judged[row.subject.model], row.subject.size, folder / "groups")
            results[key] = replace(row, top1=top1)
            write_results(study, list(results.values()), conditions, folder)
    return list(results.values())


def _count(subject: Subject) -> Complexity:
    size = (subject.size, subject.size)
    return count(create_on_meta(subject.model, image_size=size, **subject.args), (3, *size))


def _fingerprint(conditions: Conditions) -> dict[str, Any]:
    """What two measurements must share to stand in one table."""
    facts = environment()
    kept = {key: facts[key] for key in ("vmamba", "torch", "timm", "processor", "threads", "gpus")}
    return {**kept, **asdict(replace(conditions, accuracy={}, train=True))}


def _with(row: Row, outcome: Speed | str, train: bool) -> Row:
    """A row with one more measurement, or with the reason why there is none."""
    if isinstance(outcome, str):
        what = "training" if train else "inference"
        return replace(row, notes=(*row.notes, f"{what}: {outcome}"))
    if train:
        return row if row.training else replace(row, training=outcome)
    return row if row.inference else replace(row, inference=outcome)


@dataclass
class _Measured:
    """A group's speeds, from its file if they are there and were measured alike.

    Attributes:
        stem: Of the path of the results; what was measured otherwise lies beside them.
        group: The subjects.
        conditions: How to measure.
        train: Whether training steps are timed.
        where: From `_fingerprint`.
    """

    stem: Path
    group: Sequence[Subject]
    conditions: Conditions
    train: bool
    where: Mapping[str, Any]

    def get(self, counts: Mapping[str, Complexity], budget: Budget, log: Log) -> dict[str, Speed | str]:
        """Each subject's speed, or why it was not measured, by its key."""
        lacks = {s.key: self._lacking_memory(counts[s.key]) for s in self.group}
        outcomes: dict[str, Speed | str] = {key: lack for key, lack in lacks.items() if lack is not None}
        subjects = {s.key: s for s in self.group if s.key not in outcomes}
        if not subjects:
            return outcomes
        described = [self.where, self.train, [asdict(subject) for subject in subjects.values()]]
        identity = hashlib.sha256(json.dumps(described, default=str).encode()).hexdigest()
        file = self.stem.with_name(f"{self.stem.name}-{identity[:8]}.json")
        kept = self._kept(file, identity)
        if kept is not None:
            return outcomes | kept
        passes = 3 if self.train else 1  # a backward pass is about two forward ones
        work = passes * self.conditions.batch * sum(counts[key].macs for key in subjects)
        lack = budget.lacking(work)
        if lack is not None:
            return outcomes | dict.fromkeys(subjects, lack)
        start = time.monotonic()
        measured = self._measure(subjects, log)
        budget.spent(work, time.monotonic() - start)
        plain = {key: each if isinstance(each, str) else asdict(each) for key, each in measured.items()}
        contents = {"identity": identity, "environment": environment(), "outcomes": plain}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(contents, indent=2) + "\n")
        return outcomes | measured

    def _measure(self, subjects: Mapping[str, Subject], log: Log) -> dict[str, Speed | str]:
        """Time subjects in turns, without those that cannot run or compute something wrong."""
        settings = {key: (s.model, self.conditions.setting(s, self.train)) for key, s in subjects.items()}
        outcomes: dict[str, Speed | str] = {}
        while settings:
            try:
                timed = bench_settings(settings, self.conditions.rounds, self.conditions.memory, log)
            except SubjectError as error:
                outcomes[error.subject] = str(error)
                del settings[error.subject]
            else:
                speeds = {m.model: Speed(m.images_per_second, m.ratio, m.peak_memory) for m in timed}
                return outcomes | speeds
        return outcomes

    def _kept(self, file: Path, identity: str) -> dict[str, Speed | str] | None:
        """The outcomes in the file, if they are of the same subjects and conditions."""
        try:
            contents = json.loads(file.read_text(encoding="utf-8"))
            if contents["identity"] != identity:
                return None
            return {
                key: each if isinstance(each, str) else Speed(**{**each, "ratio": Ratio(**each["ratio"])})
                for key, each in contents["outcomes"].items()
            }
        except (OSError, ValueError, KeyError, TypeError):  # missing, cut short, or of another version
            return None

    def _lacking_memory(self, counts: Complexity) -> str | None:
        if self.conditions.device != "cpu":
            return None  # the device says so itself
        # Of training, what convolutions and products give is kept for backward, and about as much beside.
        per_image = 8 * counts.activations if self.train else counts.peak_memory
        lack = lacking_memory(self.conditions.batch * per_image + 4 * counts.parameters * (1 + self.train))
        return None if lack is None else f"takes {lack}"


def _weights(what: str) -> Path:
    """The file whose weights are judged: a recipe, or a run's or other checkpoint."""
    path = expand(what)
    return path if path.suffix in (".yaml", ".yml") and path.is_file() else resolve_checkpoint(what)


def _top1(weights: Path, size: int, folder: Path) -> float:
    """Top-1 of weights at a size; computed once for the same file."""
    from vmamba.train.evaluation import evaluate

    identity = f"{weights.absolute()} {weights.stat().st_mtime_ns} {size}"
    file = folder / f"top1-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    try:
        return float(json.loads(file.read_text(encoding="utf-8"))["top1"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    top1 = evaluate(weights, [f"data.image_size={size}"]).scores["top1"]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps({"weights": str(weights), "size": size, "top1": top1}) + "\n")
    return top1
