"""Hooks of `mkdocs build`: the reference's pages, and links from pages to files of the repository."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "vmamba"
LISTED_FILE_BY_FILE = ("analysis", "bench", "train")
"""Packages whose `__init__` exports nothing, so that each of their public files gets a page."""

_LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)([)#])")


def public_modules() -> list[str]:
    """Dotted names of the modules that have a page, `vmamba` first."""
    names = ["vmamba"]
    for path in sorted(PACKAGE.iterdir()):
        if path.name.startswith("_") or not (path.suffix == ".py" or (path / "__init__.py").is_file()):
            continue
        names.append(f"vmamba.{path.stem}")
        if path.name in LISTED_FILE_BY_FILE:
            files = sorted(file for file in path.rglob("*.py") if not file.name.startswith("_"))
            names += [
                ".".join(["vmamba", *file.relative_to(PACKAGE).with_suffix("").parts]) for file in files
            ]
    return names


def on_config(config: Any) -> Any:
    """Add the reference's pages to the navigation."""
    for section in config.nav:
        if "Reference" in section:
            section["Reference"] = [{name: f"reference/{name}.md"} for name in public_modules()]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Create the reference's pages; mkdocstrings fills them from the docstrings."""
    for name in public_modules():
        is_package = (PACKAGE / Path(*name.split(".")[1:]) / "__init__.py").is_file()
        # A package shows what it exports, a file what it defines.
        members = "\n    options: {show_if_no_docstring: true}" if is_package else ""
        files.append(
            File.generated(config, f"reference/{name}.md", content=f"# {name}\n\n::: {name}{members}\n")
        )
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links that leave docs/ into addresses in the repository; on GitHub they work as they are."""

    def address(match: re.Match[str]) -> str:
        target = (Path(config.docs_dir) / page.file.src_uri).parent.joinpath(match[2]).resolve()
        if target.is_relative_to(config.docs_dir):
            return match[0]
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: {match[2]} does not exist")
        kind = "tree" if target.is_dir() else "blob"
        return f"{match[1]}{config.repo_url}/{kind}/main/{target.relative_to(ROOT)}{match[3]}"

    return _LINK.sub(address, markdown)
