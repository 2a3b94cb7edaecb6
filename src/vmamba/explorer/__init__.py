"""A local page to look inside a model: where each patch of an image receives from, along every route."""

from vmamba.explorer.queries import Explorer, ExplorerError, ShownModel
from vmamba.explorer.server import ExplorerServer

__all__ = ["Explorer", "ExplorerError", "ExplorerServer", "ShownModel"]
