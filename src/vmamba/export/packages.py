"""The runtimes, which are not needed to write a file."""

import importlib.util

from vmamba.errors import ExportError


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def require(*packages: str) -> None:
    """Refuse to go on without some packages.

    Raises:
        ExportError: One is missing; the message says how to install it.
    """
    if missing := [package for package in packages if not is_installed(package)]:
        names = " ".join(missing)
        raise ExportError(f"{names}: not installed; to get it: pip install {names}")
