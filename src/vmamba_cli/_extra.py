"""Import what takes long, or needs an optional extra of this package."""

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from vmamba_cli._messages import refuse


def load(module: str, extra: str) -> Any:
    """Import a module that needs an extra's packages.

    Args:
        module: Its full name.
        extra: The extra of this package that installs what is needed.

    Raises:
        typer.Exit: A package is missing; how to install it was printed.
    """
    try:
        with importing(), signal_processing_later():
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("vmamba"):
            raise
        refuse(f"{error}; to get it: pip install 'vmamba[{extra}]'")


@contextmanager
def importing() -> Iterator[None]:
    """Within the block garbage is not collected; after an import, what exists is never searched for any.

    PyTorch and what builds on it are a million objects that stay. Searching them for garbage takes a quarter
    of their import's time, and about as much once more when the process ends. This is for the command alone:
    in another program it would keep that program's garbage too.
    """
    if not gc.isenabled():
        yield
        return
    number = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > number:
            gc.freeze()
        gc.enable()


class _Later(ModuleType):
    """Stands for scipy.signal until something in it is used."""

    hamming = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # inspect asks every module for its file
            raise AttributeError(name)
        sys.modules.pop(self.__name__, None)
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def signal_processing_later() -> Iterator[None]:
    """Within the block importing scipy.signal does not load it, which takes over a second.

    Lightning imports torchmetrics, which imports scipy.signal only to add the name `hamming` where that is
    missing, for a package of audio.
    """
    name = "scipy.signal"
    if name in sys.modules:
        yield
        return
    stand_in = sys.modules[name] = _Later(name)
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
