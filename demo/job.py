"""What both demonstrations do: simulated GPUs, one process for each stage, and the report."""

from __future__ import annotations

import argparse
import dataclasses
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from demo.report import report
from perseus_core.errors import InputError
from perseus_core.gpu.simulated import Description, create_node
from perseus_core.gpu.simulated.command import environment_for
from perseus_core.planning.profile import Profile
from perseus_core.runtime.settings import Settings

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parent
_SHARED_MEMORY = Path("/dev/shm")


def arguments_parser(module: str, description: str | None, *, config: str, output: str) -> argparse.ArgumentParser:
    """The arguments that both demonstrations have.

    Args:
        module: the demonstration.
        description: what it is.
        config: name of the file that says what Perseus does, in the demonstrations' folder.
        output: default folder.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--config", type=Path, default=FOLDER / config, help="JSON file with the perseus block")
    parser.add_argument("--gpus", type=Path, default=REPOSITORY / "configs" / "gpus" / "a100.json")
    parser.add_argument("--time-scale", type=float, default=0.5, help="shortens the GPUs' times, so the demo is quick")
    parser.add_argument("--text", type=Path, default=REPOSITORY / "LICENSE", help="what the model learns")
    parser.add_argument(
        "--most-iterations", type=int, default=400, help="it ends before, when a plan has shown what it saves"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path(output))
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line's arguments; the processes of a job run in another folder, so paths are absolute."""
    arguments = parser.parse_args()
    for name in ("config", "gpus", "text", "output"):
        setattr(arguments, name, getattr(arguments, name).absolute())
    return arguments


def run_and_report(
    arguments: argparse.Namespace,
    training: Sequence[str],
    block: dict[str, Any],
    output: Path,
    *,
    module: str,
    chunks: int = 1,
) -> bool:
    """Trains in four processes on four simulated GPUs, and reports; returns whether the training ended well.

    Args:
        arguments: of the command line.
        training: arguments of the training script, beside those that all have.
        block: the perseus block.
        output: folder for what is found out.
        module: the training script.
        chunks: model chunks of a stage.
    """
    description = Description.load(arguments.gpus)
    print(f"4 simulated GPUs: {description.name}, from {arguments.gpus} (a model, nothing measured), ", end="")
    print(f"times x {arguments.time_scale:g}\n", flush=True)
    started_s = time.monotonic()
    parent = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="perseus-gpus-", dir=parent) as folder:
        gpus, profile = Path(folder) / "gpus", Path(folder) / "profile.csv"
        gpus.mkdir()
        Profile.load(description.profile).divided_into_chunks(chunks).save(profile)
        # A chunk's passes are shorter by the number of chunks: slower GPUs make up for it.
        time_scale = arguments.time_scale * chunks
        create_node(dataclasses.replace(description, profile=profile, time_scale=time_scale), gpus)
        laps = output / "laps"
        laps.mkdir(exist_ok=True)
        for old in laps.glob("*.json"):
            old.unlink()
        common = ["--laps", str(laps), "--text", str(arguments.text), "--most-iterations"]
        common.append(str(arguments.most_iterations))
        if not train([*common, *training], gpus, module):
            print("\nThe training did not end well; the lines above say why.", file=sys.stderr)
            return False
    report(output, Settings.from_mapping(block), seconds=time.monotonic() - started_s)
    return True


def train(training: Sequence[str], gpus: Path, module: str) -> bool:
    """Starts one process of a module for each stage, as any launcher would; ends all of them when one fails.

    Args:
        training: arguments of the module.
        gpus: folder of the simulated ones.
        module: the training script.

    Returns:
        whether all ended well.
    """
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


def say_where_to_change_what(arguments: argparse.Namespace, module: str, *, block: str, model: str) -> None:
    """The last lines of a demonstration.

    Args:
        arguments: of the command line.
        module: the demonstration.
        block: which part of the config the block is, for people.
        model: the files that hold model and data.
    """
    print(f"""
Where to change what:
  what Perseus does      {arguments.config}{block}; for example "max_slowdown": 0.1
  the GPUs               --gpus: another of configs/gpus/, or a description of your own with a measured profile
  the model and the data {model}
  all of this            python -m {module} --help""")


def exit_with(main: Callable[[], int]) -> None:
    """Ends the process with what a demonstration returns; what the user gave wrong is one line."""
    try:
        sys.exit(main())
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
