"""Import modules that need an optional extra of this package."""

import importlib
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
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("vmamba"):
            raise
        refuse(f"{error}; to get it: pip install 'vmamba[{extra}]'")
