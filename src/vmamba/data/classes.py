"""Names of classes: read for datasets that do not contain them, and compared."""

from collections.abc import Sequence
from pathlib import Path

from vmamba.errors import DataError
from vmamba.words import listed


def read_classes(names: str | Path | int) -> list[str]:
    """The class names of labels 0, 1, …: "0", "1", … for a number, or the lines of a text file.

    Raises:
        DataError: The file is missing, or a name is empty or appears twice.
    """
    if isinstance(names, int):
        return [str(number) for number in range(names)]
    try:
        lines = [line.strip() for line in Path(names).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{names}: cannot read the names of the classes ({error})") from None
    if not lines or not all(lines) or len(set(lines)) < len(lines):
        raise DataError(f"{names}: expected a name a line, none empty and none twice")
    return lines


def class_difference(actual: Sequence[str], expected: Sequence[str]) -> str:
    """How classes differ from those expected, for a message: "missing 'cat', not expected 'dog'"."""
    have, want = set(actual), set(expected)
    missing = [name for name in expected if name not in have]
    extra = [name for name in actual if name not in want]
    differences = [("missing", missing), ("not expected", extra)]
    return ", ".join(f"{what} {listed(names)}" for what, names in differences if names) or "in another order"
