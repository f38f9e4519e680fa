"""`make demo-megatron`: a small GPT, 4 stages, the real Megatron in 4 processes, on simulated A100s, under Perseus.

Twice: 1F1B, and interleaved 1F1B with two model chunks on each stage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from demo.report import report
from demo.run import FOLDER, REPOSITORY, SHARED_MEMORY, train
from perseus_core.errors import InputError
from perseus_core.files import write_text
from perseus_core.gpu.simulated import Description, create_node
from perseus_core.planning.profile import Profile
from perseus_core.runtime.settings import Settings


def main() -> int:
    """Runs both jobs and reports."""
    arguments = _arguments()
    for chunks, output in ((1, arguments.output), (2, arguments.output / "interleaved")):
        if not _run(arguments, chunks, output):
            print("\nThe training did not end well; the lines above say why.", file=sys.stderr)
            return 1
    print(f"""
Where to change what:
  what Perseus does      {arguments.config}; for example "max_slowdown": 0.1
  the GPUs               --gpus: another of configs/gpus/, or a description of your own with a measured profile
  the model and the data demo/megatron_gpt.py, demo/train_megatron.py
  all of this            python -m demo.run_megatron --help""")
    return 0


def _run(arguments: argparse.Namespace, chunks: int, output: Path) -> bool:
    output.mkdir(parents=True, exist_ok=True)
    block = json.loads(arguments.config.read_text(encoding="utf-8"))
    # The one thing added to the file: where the frontier goes that the pictures are drawn from.
    block |= {"enabled": True, "frontier_file": str(output / "frontier.json")}
    write_text(output / "perseus.json", json.dumps(block, indent=2) + "\n")
    description = Description.load(arguments.gpus)
    print(f"\n4 simulated GPUs: {description.name}, from {arguments.gpus} (a model, nothing measured), ", end="")
    print(f"times x {arguments.time_scale:g}")
    print(f"Megatron-core, {'interleaved 1F1B, 2 chunks' if chunks > 1 else '1F1B'}; perseus = {json.dumps(block)}\n")
    started_s = time.monotonic()
    parent = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="perseus-gpus-", dir=parent) as folder:
        gpus = Path(folder) / "gpus"
        gpus.mkdir()
        profile = Path(folder) / "profile.csv"
        Profile.load(description.profile).divided_into_chunks(chunks).save(profile)
        # A chunk's passes are shorter by the number of chunks: slower GPUs and fewer microbatches make up for it.
        time_scale = arguments.time_scale * chunks
        create_node(dataclasses.replace(description, profile=profile, time_scale=time_scale), gpus)
        laps = output / "laps"
        laps.mkdir(exist_ok=True)
        for old in laps.glob("*.json"):
            old.unlink()
        training = ["--config", str(output / "perseus.json"), "--laps", str(laps), "--text", str(arguments.text)]
        training += ["--iterations", str(arguments.iterations), "--chunks", str(chunks)]
        training += ["--microbatches", str(arguments.microbatches // chunks)]
        if not train(training, gpus, "demo.train_megatron"):
            return False
    report(output, Settings.from_mapping(block), seconds=time.monotonic() - started_s)
    return True


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.run_megatron", description=__doc__)
    parser.add_argument("--config", type=Path, default=FOLDER / "megatron_perseus.json", help="the perseus block")
    parser.add_argument("--gpus", type=Path, default=REPOSITORY / "configs" / "gpus" / "a100.json")
    parser.add_argument("--time-scale", type=float, default=0.5, help="shortens the GPUs' times, so the demo is quick")
    parser.add_argument("--text", type=Path, default=REPOSITORY / "LICENSE", help="what the model learns")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=70, help="of each job")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo-output/megatron"))
    arguments = parser.parse_args()
    for name in ("config", "gpus", "text", "output"):
        setattr(arguments, name, getattr(arguments, name).absolute())
    return arguments


if __name__ == "__main__":
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
