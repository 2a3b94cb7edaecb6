"""Checks of a command's arguments; those of paths run before PyTorch is imported, which takes seconds."""

import difflib
from pathlib import Path

import typer

from vmamba_cli._extra import importing
from vmamba_cli._messages import refuse


def require_path(path: Path, what: str) -> Path:
    """Stop with a message if there is nothing at a path; returns it with `~` expanded.

    Args:
        path: As the user gave it. A web address is returned unchanged.
        what: What should be there, for the message.
    """
    if str(path).startswith(("http:/", "https:/")):
        return path
    expanded = path.expanduser()
    if not _exists(expanded):
        refuse(f"{path}: no such {what}{_hint(expanded)}")
    return expanded


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that is too long
        return False


def _hint(path: Path) -> str:
    """The names nearest to a path that does not exist."""
    folder = path.parent
    if not folder.is_dir():
        return f"; there is no folder {folder}"
    close = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=3)
    return f"; did you mean {' or '.join(str(folder / name) for name in close)}?" if close else ""


def require_recipe(path: Path) -> Path:
    """Stop with a message if a path is not a file with a YAML mapping; returns it with `~` expanded."""
    import yaml

    if "=" in str(path) and not _exists(path):
        refuse(f"{path}: a setting, and the recipe is missing before it: recipes/mnist_pico.yaml {path}")
    expanded = require_path(path, "recipe")
    if expanded.is_dir():
        run = (
            f"; to go on with the run in it: vmamba resume {path}"
            if (expanded / "checkpoints").is_dir()
            else ""
        )
        refuse(f"{path}: a folder; expected a recipe (.yaml), whose data.root is the folder of images{run}")
    problem = ""
    try:
        node = yaml.compose(expanded.read_text(encoding="utf-8"), yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            problem = "expected a mapping of sections"
    except OSError as error:
        problem = f"cannot read the recipe ({error.strerror})"
    except UnicodeDecodeError as error:
        problem = f"not a text file ({error})"
    except yaml.YAMLError as error:
        problem = f"not YAML: {error}"
    except RecursionError:
        problem = "sections are nested too deep"
    if problem:
        refuse(f"{path}: {problem}")
    return expanded


def prepare_device(device: str, threads: int | None) -> None:
    """Set PyTorch's number of threads, and try the device.

    Raises:
        typer.BadParameter: PyTorch cannot use the device.
    """
    with importing():
        import torch

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"--device {device}: {str(error).splitlines()[0]}") from error
