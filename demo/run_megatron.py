"""`make demo-megatron`: a small GPT, 4 stages, the real Megatron in 4 processes, on simulated A100s, under Perseus.

Twice: 1F1B, and interleaved 1F1B with two model chunks on each stage.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from demo import job
from perseus_core.files import write_text


def main() -> int:
    """Runs both jobs and reports."""
    parser = job.arguments_parser(
        "demo.run_megatron", __doc__, config="megatron_perseus.json", output="demo-output/megatron"
    )
    parser.add_argument("--microbatches", type=int, default=8)
    arguments = job.parse(parser)
    for chunks, output in ((1, arguments.output), (2, arguments.output / "interleaved")):
        if not _run(arguments, chunks, output):
            return 1
    job.say_where_to_change_what(
        arguments, "demo.run_megatron", block="", model="demo/megatron_gpt.py, demo/train_megatron.py"
    )
    return 0


def _run(arguments: argparse.Namespace, chunks: int, output: Path) -> bool:
    output.mkdir(parents=True, exist_ok=True)
    block = json.loads(arguments.config.read_text(encoding="utf-8"))
    # The one thing added to the file: where the frontier goes that the pictures are drawn from.
    block |= {"enabled": True, "frontier_file": str(output / "frontier.json")}
    write_text(output / "perseus.json", json.dumps(block, indent=2) + "\n")
    print(f"\nMegatron-core, {'interleaved 1F1B, 2 chunks' if chunks > 1 else '1F1B'}; perseus = {json.dumps(block)}")
    training = ["--config", str(output / "perseus.json"), "--chunks", str(chunks)]
    training += ["--microbatches", str(arguments.microbatches // chunks)]
    return job.run_and_report(arguments, training, block, output, module="demo.train_megatron", chunks=chunks)


if __name__ == "__main__":
    job.exit_with(main)
