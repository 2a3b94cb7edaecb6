"""Numbers with their nouns."""

import pytest

from vmamba.words import counted, listed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, "image"), "0 images"),
        ((1, "image"), "1 image"),
        ((2, "image"), "2 images"),
        ((1000, "image"), "1,000 images"),
        ((1, "class", "classes"), "1 class"),
        ((3, "class", "classes"), "3 classes"),
    ],
)
def test_counted(arguments: tuple[int, str], expected: str) -> None:
    assert counted(*arguments) == expected


def test_listed() -> None:
    assert listed(["cat"]) == "'cat'"
    assert listed(["cat", "dog", "cow"], 2) == "'cat', 'dog' and 1 more"
    assert listed([str(number) for number in range(1012)]).endswith("'8', '9' and 1,002 more")
