"""Words for messages."""

from collections.abc import Sequence
from typing import Any


def counted(number: int, noun: str, nouns: str | None = None) -> str:
    """A number and what it counts: "1 image", "1,000 images".

    Args:
        number: How many.
        noun: What one of them is called.
        nouns: What several are called; None for the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else nouns or f'{noun}s'}"


def listed(names: Sequence[Any], most: int = 10) -> str:
    """Names in quotes with commas between, and how many more there are: "'cat', 'dog' and 3 more".

    Args:
        names: What to list.
        most: How many to show.
    """
    shown = ", ".join(map(repr, names[:most]))
    return f"{shown} and {len(names) - most:,} more" if len(names) > most else shown
