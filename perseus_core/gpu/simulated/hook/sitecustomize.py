"""Python runs this at the start of every process under `perseus simulate`, because its folder is first on PYTHONPATH.

It makes `pynvml` speak to the simulated GPUs, then runs the `sitecustomize` that would have been found without it.
"""

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent


def _elsewhere(folder: str) -> bool:
    return Path(folder or ".").resolve() != _HERE


def _install() -> None:
    if "PERSEUS_SIMULATED_GPUS" not in os.environ:
        return
    if importlib.util.find_spec("perseus_core") is None:
        # Last, so that it shadows nothing of the program's own environment.
        sys.path.append(str(_HERE.parents[3]))
    try:
        from perseus_core.gpu.simulated import install

        install()
    except Exception as error:  # the program must start whatever happens here
        print(f"perseus: no simulated GPUs in this process: {error}", file=sys.stderr)


def _run_next_sitecustomize() -> None:
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", [f for f in sys.path if _elsewhere(f)])
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


_install()
_run_next_sitecustomize()
