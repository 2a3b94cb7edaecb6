"""A Python that sees only some of the installed packages: `python -I -S` with a folder of links to them."""

from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def needed(*requirements: str) -> set[str]:
    """The installed distributions that these requirements bring in, themselves among them."""
    pending = list(requirements)
    names: set[str] = set()
    while pending:
        requirement = Requirement(pending.pop())
        name = canonicalize_name(requirement.name)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if not applies or name in names:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # in no environment of this platform or kind of PyTorch
            continue
        names.add(name)
        pending += distribution.requires or []
    return names


def link_distributions(names: set[str], folder: Path) -> None:
    """Fill a folder with links to what these distributions installed."""
    for name in names:
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            source, link = Path(str(distribution.locate_file(top))), folder / top
            if source.exists() and not link.exists():
                link.symlink_to(source)
