"""The quick tier holds every value of a test's parameters, and what covers the tests that it leaves out."""

from pathlib import Path

import pytest

import tiers


@pytest.mark.parametrize(
    ("cases", "chosen"),
    [
        (["ax", "ay", "bx", "by"], {0, 3}),
        (["a", "b", "c"], {0, 1, 2}),
        ([""], set()),
    ],
    ids=["combinations", "one parameter", "none"],
)
def test_every_value_stays(cases: list[str], chosen: set[int]) -> None:
    """A letter stands for a value."""
    assert tiers.covering(frozenset((letter, 0) for letter in case) for case in cases) == chosen


def test_names_that_are_no_test() -> None:
    nodes = ["a.py::test_one[x]", "a.py::test_two", "b.py::test_three"]
    names = [*nodes, "a.py::test_gone", "a.py::test_one", "a.py::test_one[y]", "elsewhere.py::test_four"]
    assert tiers.unknown(nodes, names) == ["a.py::test_gone", "a.py::test_one[y]"]


def test_files_of_the_tables_exist() -> None:
    names = {*tiers.COVERED, *tiers.COVERED.values(), *tiers.CASES, *tiers.SAMPLED, *tiers.LEFT_OUT}
    names |= {*tiers.EXHAUSTIVE, *tiers.EXHAUSTIVE.values()}
    root = Path(__file__).parents[1]
    assert not sorted(name for name in names if not (root / name.split("::")[0]).exists())


def test_what_covers_is_quick_itself() -> None:
    covering = set(tiers.COVERED.values())
    assert not tiers.COVERED.keys() & covering
    assert not [name for name in covering if name.startswith(tiers.LEFT_OUT)]
    stay = {f"{test}[{name}]" for test, names in tiers.CASES.items() for name in names}
    assert not [name for name in covering - stay if "[" in name and tiers.function_of(name) in tiers.CASES]


def test_what_stands_for_an_exhaustive_test_is_of_ci() -> None:
    assert not tiers.EXHAUSTIVE.keys() & set(tiers.EXHAUSTIVE.values())
    assert not tiers.EXHAUSTIVE.keys() & tiers.SAMPLED.keys()


def test_the_quick_tier_of_a_file(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    pytester.makeini("[pytest]\nmarkers =\n    full: left out\n    slow: left out")
    pytester.makeconftest("from tiers import pytest_collection_modifyitems")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.parametrize("a", [1, 2, 3])
        @pytest.mark.parametrize("b", ["x", "y"])
        def test_product(a, b): ...

        @pytest.mark.parametrize(("a", "b"), [(1, 2), (3, 4)])
        def test_pairs(a, b): ...

        def test_plain(): ...

        @pytest.mark.parametrize("a", [1, 2, 11])
        def test_cases(a): ...
        """
    )
    file = "test_the_quick_tier_of_a_file.py"
    monkeypatch.setattr(tiers, "CASES", {f"{file}::test_cases": ("1",)})
    pytester.inline_run("-m", "not full").assertoutcome(passed=3 + 2 + 1 + 1)
    pytester.inline_run().assertoutcome(passed=6 + 2 + 1 + 3)
    monkeypatch.setattr(tiers, "SAMPLED", {f"{file}::test_cases": ("1", "11")})
    pytester.inline_run("-m", "not slow").assertoutcome(passed=6 + 2 + 1 + 2)
    monkeypatch.setattr(tiers, "CASES", {f"{file}::test_cases": ("3",)})
    assert pytester.inline_run().ret == pytest.ExitCode.USAGE_ERROR
