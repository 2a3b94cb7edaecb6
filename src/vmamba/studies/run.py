"""Run a study: measure its groups one after the other, keep each result, and write tables and a figure.

A study's folder holds `groups/`, one file for each group and kind of measurement, and what is made of them:
`results.json`, `table.md`, `table.csv`, `figure.png`. Run again, a study measures only the groups that are
missing.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vmamba.analysis.complexity import count
from vmamba.analysis.memory import lacking_memory
from vmamba.bench.models import Measurement, bench_settings
from vmamba.bench.timing import BenchError, Ratio
from vmamba.environment import environment
from vmamba.files import write_atomically
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


@dataclass
class _Counts:
    parameters: int
    macs: float
    peak_memory: int
    activations: int


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
        UserError: Weights cannot be judged; the message says why.
    """
    budget = budget or Budget()
    rows = {}
    for subject in study.subjects:
        log(f"counting {subject.key}")
        counts = _count(subject)
        rows[subject.key] = Row(subject, counts.parameters, counts.macs), counts
    results = {key: row for key, (row, _) in rows.items()}
    all_counts = {key: counts for key, (_, counts) in rows.items()}
    where = _fingerprint(conditions)
    for train in (False, True)[: 1 + conditions.train]:
        for number, group in enumerate(study.groups):
            file = folder / "groups" / f"{'training' if train else 'inference'}-{number}.json"
            measured = _Measured(file, group, replace(conditions, accuracy={}), train, where)
            for key, outcome in measured.get(all_counts, budget, log):
                results[key] = _with(results[key], outcome, train)
            write_results(study, list(results.values()), conditions, folder)
    for key, row in results.items():
        if (what := conditions.accuracy.get(row.subject.model)) is not None:
            log(f"judging {key}")
            results[key] = replace(row, top1=_top1(what, row.subject, folder / "groups"))
            write_results(study, list(results.values()), conditions, folder)
    return list(results.values())


def _count(subject: Subject) -> _Counts:
    size = (subject.size, subject.size)
    model = create_on_meta(subject.model, image_size=size, **subject.args)
    counts = count(model, (3, *size))
    return _Counts(counts.parameters, counts.macs, counts.peak_memory, counts.activations)


def _fingerprint(conditions: Conditions) -> dict[str, Any]:
    """What two measurements must share to stand in one table."""
    facts = environment()
    kept = {key: facts[key] for key in ("vmamba", "torch", "timm", "processor", "threads", "gpus")}
    return {**kept, **asdict(replace(conditions, accuracy={}))}


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
        file: Of the results.
        group: The subjects.
        conditions: How to measure.
        train: Whether training steps are timed.
        where: From `_fingerprint`.
    """

    file: Path
    group: Sequence[Subject]
    conditions: Conditions
    train: bool
    where: Mapping[str, Any]

    def get(
        self, counts: Mapping[str, _Counts], budget: Budget, log: Log
    ) -> Iterator[tuple[str, Speed | str]]:
        """Each subject's key, and its speed or why it was not measured."""
        possible = {}
        for subject in self.group:
            reason = self._lacking_memory(counts[subject.key])
            if reason is None:
                possible[subject.key] = subject
            else:
                yield subject.key, reason
        if not possible:
            return
        identity = hashlib.sha256(
            json.dumps([self.where, self.train, [asdict(s) for s in possible.values()]], default=str).encode()
        ).hexdigest()
        kept = self._kept(identity)
        if kept is not None:
            yield from kept.items()
            return
        passes = 3 if self.train else 1
        work = passes * self.conditions.batch * sum(counts[key].macs for key in possible)
        lack = budget.lacking(work)
        if lack is not None:
            yield from ((key, lack) for key in possible)
            return
        start = time.monotonic()
        settings = {key: (s.model, self.conditions.setting(s, self.train)) for key, s in possible.items()}
        try:
            speeds = _speeds(bench_settings(settings, self.conditions.rounds, self.conditions.memory, log))
        except BenchError as error:
            yield from ((key, str(error)) for key in possible)
            return
        budget.spent(work, time.monotonic() - start)
        rows = {key: asdict(speed) for key, speed in speeds.items()}
        contents = {"identity": identity, "environment": environment(), "speeds": rows}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.file, json.dumps(contents, indent=2) + "\n")
        yield from speeds.items()

    def _kept(self, identity: str) -> dict[str, Speed] | None:
        try:
            contents = json.loads(self.file.read_text(encoding="utf-8"))
            if contents["identity"] != identity:
                return None
            return {
                key: Speed(**{**speed, "ratio": Ratio(**speed["ratio"])})
                for key, speed in contents["speeds"].items()
            }
        except (OSError, ValueError, KeyError, TypeError):  # missing, cut short, or of another version
            return None

    def _lacking_memory(self, counts: _Counts) -> str | None:
        if self.conditions.device != "cpu":
            return None  # the device says so itself
        # Of training, what convolutions and products give is kept for backward, and about as much beside.
        per_image = 8 * counts.activations if self.train else counts.peak_memory
        lack = lacking_memory(self.conditions.batch * per_image + 4 * counts.parameters * (1 + self.train))
        return None if lack is None else f"takes {lack}"


def _speeds(measurements: Sequence[Measurement]) -> dict[str, Speed]:
    return {m.model: Speed(m.images_per_second, m.ratio, m.peak_memory) for m in measurements}


def _top1(what: str, subject: Subject, folder: Path) -> float:
    """Top-1 of the weights of a run, checkpoint or recipe at a subject's size; computed once."""
    from vmamba.models.checkpoints import expand, resolve_checkpoint
    from vmamba.train.evaluation import evaluate

    path = expand(what)
    judged = path if path.suffix in (".yaml", ".yml") else resolve_checkpoint(path)
    identity = f"{judged.absolute()} {judged.stat().st_mtime_ns} {subject.size}"
    name = hashlib.sha256(identity.encode()).hexdigest()[:16]
    file = folder / f"top1-{name}.json"
    try:
        return float(json.loads(file.read_text(encoding="utf-8"))["top1"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    top1 = evaluate(what, [f"data.image_size={subject.size}"]).scores["top1"]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps({"weights": what, "size": subject.size, "top1": top1}) + "\n")
    return top1
