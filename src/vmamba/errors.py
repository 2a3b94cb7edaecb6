"""Errors that are the caller's to mend: the command prints their message alone."""


class UserError(Exception):
    """Something given from outside is wrong; the message says what, where, and what was expected."""


class RecipeError(UserError, ValueError):
    """A recipe does not parse or check."""


class DataError(UserError, ValueError):
    """A data set is missing, empty or damaged."""


class CheckpointError(UserError, ValueError):
    """A checkpoint does not fit, or cannot be read safely."""


class ProcessError(UserError, RuntimeError):
    """Another process of a run died or hangs."""


class BackendError(UserError, RuntimeError):
    """A backend of the selective scan cannot run here, or cannot serve the call that names it."""


class UnknownBackendError(BackendError, ValueError):
    """There is no backend of that name."""
