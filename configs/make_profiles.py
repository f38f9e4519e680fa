"""Makes profiles by the GPU model of `perseus_core.gpu.model`. Nothing in them was measured.

python configs/make_profiles.py --committed
python configs/make_profiles.py --gpu h100 --model gpt3-175b --stages 16 --tensor-parallel 8 -o profile.csv
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from perseus_core.errors import InputError
from perseus_core.gpu.model import GPUS
from perseus_core.gpu.workload import TRANSFORMERS, Workload
from perseus_core.planning.profile import Profile

PROFILES = Path(__file__).parent / "profiles"


@dataclass(frozen=True)
class Recipe:
    """How one profile is made.

    Attributes:
        gpu: key of `GPUS`.
        model: key of `TRANSFORMERS`.
        stages: pipeline stages.
        microbatch_size: samples of one microbatch.
        tensor_parallel: GPUs per stage that share each layer.
        clocks_mhz: lowest, highest clock and their distance; all supported clocks where None.
    """

    gpu: str
    model: str
    stages: int
    microbatch_size: int
    tensor_parallel: int = 1
    clocks_mhz: tuple[int, int, int] | None = None

    def profile(self) -> Profile:
        """The profile; raises InputError for clocks that the GPU does not have."""
        workload = Workload(TRANSFORMERS[self.model], self.stages, self.microbatch_size, self.tensor_parallel)
        if self.clocks_mhz is None:
            return workload.profile(GPUS[self.gpu])
        lowest, highest, step = self.clocks_mhz
        return workload.profile(GPUS[self.gpu], tuple(range(highest, lowest - 1, -step)))


COMMITTED = {
    "gpt3-6.7b_a100_4stages.csv": Recipe("a100", "gpt3-6.7b", 4, 2, clocks_mhz=(810, 1410, 15)),
    "gpt3-175b_a100_8stages.csv": Recipe("a100", "gpt3-175b", 8, 1, tensor_parallel=8, clocks_mhz=(810, 1410, 15)),
    "gpt3-6.7b_h100_4stages.csv": Recipe("h100", "gpt3-6.7b", 4, 4, clocks_mhz=(990, 1980, 30)),
    "gpt3-6.7b_a40_4stages.csv": Recipe("a40", "gpt3-6.7b", 4, 1, clocks_mhz=(840, 1740, 30)),
}


def main() -> int:
    """Command line; returns the exit code."""
    arguments = _parse()
    try:
        if arguments.committed:
            for name, recipe in COMMITTED.items():
                recipe.profile().save(PROFILES / name)
                print(PROFILES / name)
        else:
            recipe = Recipe(
                arguments.gpu,
                arguments.model,
                arguments.stages,
                arguments.microbatch_size,
                arguments.tensor_parallel,
                arguments.clocks,
            )
            recipe.profile().save(arguments.output)
            print(arguments.output)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpu", choices=GPUS, default="a100")
    parser.add_argument("--model", choices=TRANSFORMERS, default="gpt3-6.7b")
    parser.add_argument("--stages", type=int, default=4, help="pipeline stages (default 4)")
    parser.add_argument("--microbatch-size", type=int, default=1, help="samples of one microbatch (default 1)")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that share each layer (default 1)")
    parser.add_argument(
        "--clocks", type=_clocks, metavar="LOW:HIGH:STEP", help="in MHz, for example 810:1410:15 (default all)"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("profile.csv"), help="default profile.csv")
    parser.add_argument("--committed", action="store_true", help=f"make the files of {PROFILES.name}/ again")
    return parser.parse_args()


def _clocks(text: str) -> tuple[int, int, int]:
    try:
        lowest, highest, step = (int(part) for part in text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW:HIGH:STEP, for example 810:1410:15") from None
    if not 0 < lowest <= highest or step < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: LOW must be above 0 and not above HIGH, STEP 1 or more")
    return lowest, highest, step


if __name__ == "__main__":
    sys.exit(main())
