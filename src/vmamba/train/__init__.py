"""Training, evaluation and prediction, for any task."""

from vmamba.train import classification  # noqa: F401  (registers its task)
