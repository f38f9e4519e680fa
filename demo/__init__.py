"""The demonstrations: `python -m demo.run` is what `make demo` runs."""
