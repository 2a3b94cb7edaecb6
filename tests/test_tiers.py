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
    table = {
        "a.py::test_one[x]": "a.py::test_two",
        "a.py::test_gone": "b.py::test_three",
        "b.py::test_three": "a.py::test_one[y]",
        "elsewhere.py::test_four": "a.py::test_one",
    }
    assert tiers.unknown(nodes, table) == ["a.py::test_gone", "a.py::test_one[y]"]


def test_files_of_the_table_exist() -> None:
    names = {*tiers.COVERED, *tiers.COVERED.values()}
    root = Path(__file__).parents[1]
    assert not sorted(name for name in names if not (root / name.split("::")[0]).is_file())


def test_what_covers_is_quick_itself() -> None:
    assert not tiers.COVERED.keys() & set(tiers.COVERED.values())


def test_the_quick_tier_of_a_file(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers =\n    full: left out")
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
        """
    )
    pytester.inline_run("-m", "not full").assertoutcome(passed=3 + 2 + 1)
    pytester.inline_run().assertoutcome(passed=6 + 2 + 1)
