"""The fenced code blocks of README.md and docs/, and the shell commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_MARKER = re.compile(r"<!--\s*not run: (.+?)\s*-->\s*\Z", re.DOTALL)
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)```", re.M | re.S
)
_ASSIGNMENT = re.compile(r"[A-Z_]+=")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: The file.
        line: Of its first line of code, from 1.
        language: As the fence names it.
        text: The code, without the fence's indentation.
        not_run: The reason that an HTML comment `<!-- not run: REASON -->` right before the fence gives.
    """

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Every block of a page, in order."""
    markdown = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(markdown):
        marker = _MARKER.search(markdown[: match.start()])
        text = re.sub(f"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
        line = markdown.count("\n", 0, match.start()) + 2
        found.append(Block(page, line, match["language"], text, marker[1] if marker else None))
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block as words, without comments, variables, and programs that start others.

    `torchrun … -m vmamba_cli` and `srun vmamba` are `vmamba`, as is `.venv/bin/vmamba`.
    """
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and (_ASSIGNMENT.match(words[0]) or words[0] == "srun"):
            words = words[1:]
        if "vmamba_cli" in words:
            words = ["vmamba", *words[words.index("vmamba_cli") + 1 :]]
        if words:
            yield [Path(words[0]).name, *words[1:]]
