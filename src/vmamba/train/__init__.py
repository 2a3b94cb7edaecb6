"""Training, evaluation and prediction, for any task."""
