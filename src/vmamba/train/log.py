"""The log of a run, on the terminal and in log.txt."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOGGER = logging.getLogger("vmamba")


class _Terminal(logging.Handler):
    """Writes to the current `sys.stderr`, which a progress line replaces while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        text = f"{prefix}{record.getMessage()}\n"
        encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        sys.stderr.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stderr.flush()


class _File(logging.Handler):
    """Buffers log lines until the run's folder may be written to, then writes them to log.txt."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._kept: list[str] = []
        self._path: Path | None = None
        self._failed = False

    def open(self, path: Path) -> None:
        self._path = path
        kept, self._kept = self._kept, []
        for line in kept:
            self._write(line)

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if self._path is None:
            self._kept.append(line)
        else:
            self._write(line)

    def _write(self, line: str) -> None:
        assert self._path is not None
        try:
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{line}\n")
        except OSError as error:  # such as a full disk; the terminal still has it
            if not self._failed:
                self._failed = True
                sys.stderr.write(f"{self._path}: cannot be written ({error.strerror})\n")


class RunLog:
    """The log of one run.

    Args:
        file: The handler that writes log.txt.
    """

    def __init__(self, file: _File) -> None:
        self._file = file

    def open(self, folder: Path) -> None:
        """Write the lines logged so far, and from now on every line, to log.txt in a folder."""
        self._file.open(folder / "log.txt")


@contextmanager
def run_log(speaks: bool) -> Iterator[RunLog]:
    """Show what this library logs inside a `with` block on the terminal, and keep it for log.txt.

    Args:
        speaks: Whether this process logs; of a run's processes only the first one does.
    """
    file = _File()
    if not speaks:
        yield RunLog(file)
        return
    handlers: list[logging.Handler] = [_Terminal(), file]
    level = _LOGGER.level
    _LOGGER.setLevel(logging.INFO)
    for handler in handlers:
        _LOGGER.addHandler(handler)
    try:
        yield RunLog(file)
    except Exception as error:
        # The caller prints the error.
        file.handle(_LOGGER.makeRecord(_LOGGER.name, logging.ERROR, "", 0, str(error), (), None))
        raise
    finally:
        _LOGGER.setLevel(level)
        for handler in handlers:
            _LOGGER.removeHandler(handler)
