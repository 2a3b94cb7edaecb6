"""Errors that the user can fix: the command prints only their message, without a traceback."""


class UserError(Exception):
    """An input is wrong; the message says what, where, and what was expected."""


class RecipeError(UserError, ValueError):
    """A recipe cannot be parsed or is not valid."""


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


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the given place."""

    def __str__(self) -> str:  # FileNotFoundError's own would print its arguments as a tuple
        return str(self.args[0])


class ModelError(UserError, ValueError):
    """A model's name, one of its arguments or an input size is unknown or does not fit."""


class ExportError(UserError, RuntimeError):
    """A model cannot be exported, or what was written computes something else."""


class OutputError(UserError, OSError):
    """A result cannot be written to the given place."""

    def __str__(self) -> str:
        return str(self.args[0])
