"""A process of a run ends with the one that started it, however early that is killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmamba_cli._starter import STARTER, ends_with_its_starter

# The command's first process starts a second one, which waits for ever, and is killed.
FIRST = """
import os, signal, subprocess, sys
from vmamba_cli._starter import ends_with_its_starter

second = '''
import sys, time
from vmamba_cli._starter import ends_with_its_starter
with ends_with_its_starter():
    if sys.argv[1] == "at work":
        print("waits", flush=True)
    time.sleep(600)
'''
with ends_with_its_starter():
    process = subprocess.Popen(
        [sys.executable, "-c", second, sys.argv[1]],
        stdout=subprocess.PIPE,
        env={**os.environ, "LOCAL_RANK": "1"},
    )
    if sys.argv[1] == "at work":
        process.stdout.readline()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name != "posix", reason="there is no SIGKILL")
@pytest.mark.parametrize("when", ["at the beginning", "at work"])
def test_a_process_ends_with_the_one_that_started_it(when: str, tmp_path: Path) -> None:
    # The second process holds the pipe of stderr, so that this call returns only when it has ended.
    done = subprocess.run(
        [sys.executable, "-c", FIRST, when], cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=60
    )
    assert done.returncode == -9
    assert done.stderr.endswith("which started this one, is gone; this one ends too\n")


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (None, "123"):
        if before is None:
            monkeypatch.delenv(STARTER, raising=False)
        else:
            monkeypatch.setenv(STARTER, before)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        with ends_with_its_starter():
            assert os.environ[STARTER] == str(os.getpid())
        assert os.environ.get(STARTER) == before
