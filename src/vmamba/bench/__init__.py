"""Benchmarks of models and of the operator."""
