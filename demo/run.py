"""`make demo`: a small GPT, 4 pipeline stages, real DeepSpeed in 4 processes, on simulated A100s, under Perseus."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from demo.report import report
from perseus_core.errors import InputError
from perseus_core.files import write_text
from perseus_core.gpu.simulated import Description, create_node
from perseus_core.gpu.simulated.command import environment_for
from perseus_core.runtime.settings import Settings

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parent
SHARED_MEMORY = Path("/dev/shm")


def main() -> int:
    """Runs the job and reports."""
    arguments = _arguments()
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    config = json.loads(arguments.config.read_text(encoding="utf-8"))
    # The one thing added to the file: where the frontier goes that the pictures are drawn from.
    config["perseus"]["frontier_file"] = str((output / "frontier.json").resolve())
    write_text(output / "ds_config.json", json.dumps(config, indent=2) + "\n")

    description = dataclasses.replace(Description.load(arguments.gpus), time_scale=arguments.time_scale)
    print(f"4 simulated GPUs: {description.name}, from {arguments.gpus} (a model, nothing measured), ", end="")
    print(f"times x {arguments.time_scale:g}")
    print(f"DeepSpeed config {arguments.config}: perseus = {json.dumps(config['perseus'])}\n")
    started_s = time.monotonic()
    parent = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="perseus-gpus-", dir=parent) as gpus:
        create_node(description, gpus)
        laps = output / "laps"
        laps.mkdir(exist_ok=True)
        for old in laps.glob("*.json"):
            old.unlink()
        training = ["--config", str(output / "ds_config.json"), "--laps", str(laps), "--text", str(arguments.text)]
        training += ["--iterations", str(arguments.iterations), "--stages", "4"]
        if not train(training, Path(gpus)):
            print("\nThe training did not end well; the lines above say why.", file=sys.stderr)
            return 1
    report(output, Settings.from_mapping(config["perseus"]), seconds=time.monotonic() - started_s)
    _say_where_to_change_what(arguments)
    return 0


def train(training: list[str], gpus: Path, module: str = "demo.train_gpt") -> bool:
    """Starts one process of a module for each stage, as any launcher would; ends all of them when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **environment_for(gpus, os.environ),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "4",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCHDYNAMO_DISABLE": "1",  # Megatron would compile small functions for 13 s
    }
    command = [sys.executable, "-W", "ignore", "-m", module, *training]
    ranks = [
        subprocess.Popen(command, cwd=REPOSITORY, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(4)
    ]
    try:
        while any(rank.poll() is None for rank in ranks):
            if any(rank.poll() for rank in ranks):
                break
            time.sleep(0.2)
        return all(rank.poll() == 0 for rank in ranks)
    finally:
        for rank in ranks:
            rank.terminate()
        for rank in ranks:
            rank.wait()


def _say_where_to_change_what(arguments: argparse.Namespace) -> None:
    print(f"""
Where to change what:
  what Perseus does      {arguments.config}, block "perseus"; for example "max_slowdown": 0.1
  the GPUs               --gpus: another of configs/gpus/, or a description of your own with a measured profile
  the model and the data demo/gpt.py, demo/train_gpt.py
  all of this            {shlex.join(["python", "-m", "demo.run", "--help"])}""")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.run", description=__doc__)
    parser.add_argument("--config", type=Path, default=FOLDER / "ds_config.json", help="DeepSpeed config with a block")
    parser.add_argument("--gpus", type=Path, default=REPOSITORY / "configs" / "gpus" / "a100.json")
    parser.add_argument("--time-scale", type=float, default=0.5, help="shortens the GPUs' times, so the demo is quick")
    parser.add_argument("--text", type=Path, default=REPOSITORY / "LICENSE", help="what the model learns")
    parser.add_argument("--iterations", type=int, default=90)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo-output"))
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
