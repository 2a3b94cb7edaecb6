"""What a study is: subjects that are measured alike, and a row of results for each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmamba.bench.models import Setting
from vmamba.bench.timing import Ratio

INFERENCE, TRAINING = "inference, images/s", "training, images/s"
INFERENCE_MEMORY, TRAINING_MEMORY = "inference, peak MB", "training, peak MB"
COLUMNS = (
    "parameters, M",
    "GMACs",
    INFERENCE,
    TRAINING,
    INFERENCE_MEMORY,
    TRAINING_MEMORY,
    "top-1, %",
)
"""What is measured or quoted of a subject."""


@dataclass(frozen=True)
class Subject:
    """What a row of a study measures.

    Attributes:
        label: As the paper calls it.
        model: A name of timm's registry.
        size: Side of the images, in pixels.
        args: Arguments of the model.
        backend: Of the selective scan; None for the device's.
        fused: Whether layers may be computed in fused form.
        quoted: The paper's values, by column (`COLUMNS`).
    """

    label: str
    model: str
    size: int = 224
    args: Mapping[str, Any] = field(default_factory=dict)
    backend: str | None = None
    fused: bool = True
    quoted: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The label, with the size: different for every subject of a study."""
        return f"{self.label}, {self.size}²"


@dataclass(frozen=True)
class Conditions:
    """How all subjects of a study are measured.

    Attributes:
        device: As PyTorch names it.
        batch: Images at once.
        rounds: How often all subjects of a group run in turns.
        autocast: Of training, None, "bf16" or "fp16"; inference is in float32, as in the paper.
        train: Whether training steps are timed too.
        memory: Whether peak memory is measured too, on a CPU in a process of its own.
        accuracy: Model's name → a run, checkpoint or recipe whose weights are judged on its data.
    """

    device: str = "cpu"
    batch: int = 1
    rounds: int = 5
    autocast: str | None = None
    train: bool = True
    memory: bool = True
    accuracy: Mapping[str, str] = field(default_factory=dict)

    def setting(self, subject: Subject, train: bool) -> Setting:
        """The setting in which a subject is timed."""
        return Setting(
            subject.size,
            self.batch,
            train,
            self.autocast if train else None,
            self.device,
            subject.backend,
            subject.fused,
            subject.args,
        )


@dataclass(frozen=True)
class Speed:
    """How fast a subject is.

    Attributes:
        images_per_second: From the median round.
        ratio: Speed of the group's first subject over this one's, in images, over the rounds of one run.
        peak_memory: Bytes of one call beyond those in use before it; None where that cannot be measured.
    """

    images_per_second: float
    ratio: Ratio
    peak_memory: int | None


@dataclass(frozen=True)
class Row:
    """The results of a subject.

    Attributes:
        subject: What was measured.
        parameters: Of the model.
        macs: Multiply-adds of one image, by the paper's counting.
        inference: None if it was not measured.
        training: None if it was not measured.
        top1: Of the weights that were given, on their data; None without.
        notes: Why something was not measured.
    """

    subject: Subject
    parameters: int
    macs: float
    inference: Speed | None = None
    training: Speed | None = None
    top1: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def speeds(self) -> dict[str, Speed]:
        """What was timed, by column."""
        timed = {INFERENCE: self.inference, TRAINING: self.training}
        return {column: speed for column, speed in timed.items() if speed is not None}

    @property
    def measured(self) -> dict[str, float]:
        """The values by column."""
        values: dict[str, float | None] = {
            "parameters, M": self.parameters / 1e6,
            "GMACs": self.macs / 1e9,
            "top-1, %": None if self.top1 is None else 100 * self.top1,
        }
        for speed, per_second, memory in (
            (self.inference, INFERENCE, INFERENCE_MEMORY),
            (self.training, TRAINING, TRAINING_MEMORY),
        ):
            if speed is not None:
                values[per_second] = speed.images_per_second
                values[memory] = None if speed.peak_memory is None else speed.peak_memory / 1e6
        return {column: value for column, value in values.items() if value is not None}


@dataclass(frozen=True)
class Study:
    """One of the paper's studies.

    Attributes:
        name: Of its command and folder.
        title: What it shows, and where the paper does.
        groups: Subjects that are timed in turns; each group begins with the same one, for the ratios. The
            first groups are the cheapest, for the case that time runs out.
        draw: Writes the figure, from the rows that are there, into a file.
        summary: Lines of text below the table, from the rows.
    """

    name: str
    title: str
    groups: Sequence[Sequence[Subject]]
    draw: Callable[[Sequence[Row], Path], None]
    summary: Callable[[Sequence[Row]], list[str]] = lambda rows: []

    @property
    def subjects(self) -> list[Subject]:
        """Every subject once, in order."""
        return list({subject.key: subject for group in self.groups for subject in group}.values())
