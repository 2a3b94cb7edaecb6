"""Labels of pixels."""

IGNORED = 255
"""The label of pixels of no class, which neither training nor evaluation counts."""
