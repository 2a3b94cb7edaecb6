"""Words for messages."""


def counted(number: int, noun: str, nouns: str | None = None) -> str:
    """A number and what it counts: "1 image", "1,000 images".

    Args:
        number: How many.
        noun: What one of them is called.
        nouns: What several are called; None for the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else nouns or f'{noun}s'}"
