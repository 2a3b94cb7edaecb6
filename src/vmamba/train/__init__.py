"""Training and evaluation, for any task."""
