"""The studies' subjects are the paper's rows: counts as it states them."""

import pytest

from vmamba.errors import ModelError
from vmamba.studies.run import _count
from vmamba.studies.study import Subject
from vmamba.studies.tables import SIZES, STUDIES, ladder, patterns, resolution, throughput

COUNTED_OTHERWISE = {
    "EfficientNet-B4, 380²": {"GMACs": 4.41},
    "EfficientNet-B5, 456²": {"GMACs": 10.31},
}
"""Where the paper took over a number that was counted in another way."""


def quoted(subjects: list[Subject]) -> list[Subject]:
    return [subject for subject in subjects if subject.quoted]


@pytest.mark.parametrize(
    "subject",
    quoted(ladder().subjects) + quoted(throughput().subjects) + quoted(patterns().subjects),
    ids=lambda subject: f"{subject.label}-{subject.size}",
)
def test_counts_are_the_papers(subject: Subject) -> None:
    counts = _count(subject)
    expected = {**subject.quoted, **COUNTED_OTHERWISE.get(subject.key, {})}
    if "parameters, M" in expected:
        assert counts.parameters / 1e6 == pytest.approx(expected["parameters, M"], rel=0.03, abs=0.5)
    if "GMACs" in expected:
        assert counts.macs / 1e9 == pytest.approx(expected["GMACs"], rel=0.03, abs=0.05)


def test_every_group_begins_with_the_same_model() -> None:
    for make in STUDIES.values():
        groups = make().groups
        assert len({group[0].model for group in groups}) == 1
        assert all(len({subject.key for subject in group}) == len(group) for group in groups)


def test_a_table_of_ones_own_models() -> None:
    (group,) = throughput(["swin_tiny_patch4_window7_224", "vmamba_pico"]).groups
    assert [(s.label, s.size) for s in group] == [("Swin-T", 224), ("vmamba_pico", 32)]
    assert group[0].quoted["inference, images/s"] == 1247
    assert not group[1].quoted
    with pytest.raises(ModelError, match="unknown model 'vmamba_huge'"):
        throughput(["vmamba_huge"])
    groups = resolution(["vmamba_tiny", "vmamba_pico"], [384, 320]).groups
    assert [[(s.label, s.size) for s in group] for group in groups] == [
        [("VMamba-T", 320), ("vmamba_pico", 320)],
        [("VMamba-T", 384), ("vmamba_pico", 384)],
    ]
    assert groups[1][0].quoted == {"inference, images/s": 450, "top-1, %": 82.5}
    assert not groups[0][0].quoted  # the paper has no such size


def test_windows_grow_with_the_image_as_in_the_paper() -> None:
    swin = [s for s in resolution().subjects if s.label == "Swin-T"]
    assert [s.args["window_size"] for s in swin] == [side // 32 for side in SIZES]
    assert _count(swin[-1]).macs / 1e9 == pytest.approx(152.5, rel=0.01)


def test_patterns_of_another_model() -> None:
    (group,) = patterns("vmamba_pico", routes=["cross", "cascade"]).groups
    assert [(s.label, s.size, s.args["routes"], dict(s.quoted)) for s in group] == [
        ("cross", 32, "cross", {}),
        ("cascade", 32, "cascade", {}),
    ]
