"""Modules imported when a test uses them: every process that runs tests imports all their files."""

import importlib
from importlib.util import find_spec
from typing import Any

import pytest


class Later:
    """Stands for a module, which is imported when something public in it is first used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith(("_", "pytest")):  # pytest looks whether it is a test or a fixture
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)


def importorskip_later(name: str, extra: str) -> Any:
    """A `Later`, or a skip of the whole file, as by `pytest.importorskip`, where the module is missing."""
    if find_spec(name) is None:
        pytest.skip(f"could not import {name!r}: needs the extra `{extra}`", allow_module_level=True)
    return Later(name)
