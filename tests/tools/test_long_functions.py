import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import long_functions

SOURCE = '''
class A:
    def method(self, a, /, b, *rest, c=1, **more):
        """Two
        lines."""

        # a comment
        return (
            a
        )

    @classmethod
    def make(cls):
        def inner(x):
            return x

        return inner


async def wait(): pass
'''


def test_sizes() -> None:
    measured = {s.name: (s.lines, s.arguments, s.place) for s in long_functions.sizes(SOURCE, "a.py")}
    assert measured == {
        "A.method": (4, 5, "a.py:3"),
        "A.make": (4, 0, "a.py:13"),
        "A.make.inner": (2, 1, "a.py:14"),
        "wait": (1, 0, "a.py:20"),
    }
    whole = {s.name: s.lines for s in long_functions.sizes(SOURCE, "a.py", whole=True)}
    assert whole["A.method"] == 8


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    assert long_functions.main([str(tmp_path)]) == 0
    assert long_functions.main([str(tmp_path), "--arguments", "4"]) == 1
    assert long_functions.main([str(tmp_path / "a.py"), "--lines", "3"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["4", "lines", "5", "arguments", f"{tmp_path}/a.py:3", "A.method"]
    assert {line.split()[-1] for line in lines[1:]} == {"A.method", "A.make"}
