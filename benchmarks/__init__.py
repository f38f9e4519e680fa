"""Measurements of what the README claims. Each module is run as `python -m benchmarks.NAME` and prints Markdown."""
