"""The command, called in this process."""

import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest

from vmamba_cli.__main__ import main


class Done(NamedTuple):
    status: int
    stdout: str
    stderr: str


def predict(place: Path, *arguments: str) -> Done:
    return call(place, "predict", *arguments)


def call(place: Path, *arguments: str) -> Done:
    """`vmamba …` in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "argv", ["vmamba", *arguments])
        stdout, stderr = StringIO(), StringIO()
        with redirect_stdout(stdout), redirect_stderr(stderr), pytest.raises(SystemExit) as raised:
            main()
    return Done(int(raised.value.code or 0), stdout.getvalue(), stderr.getvalue())
