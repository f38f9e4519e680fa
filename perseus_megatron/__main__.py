"""Runs a training script whose `--perseus` flags are then known: `python -m perseus_megatron pretrain_gpt.py ...`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Runs the script that the first argument names."""
    if len(sys.argv) < 2:
        sys.exit("usage: python -m perseus_megatron SCRIPT [ARGUMENT ...]")
    script = sys.argv[1]
    if not Path(script).is_file():
        sys.exit(f"perseus_megatron: there is no script {script!r}; give its path, then its arguments")
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
