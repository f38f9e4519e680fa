"""GPUs: one interface over NVML, zeusd and simulated GPUs.

Simulated GPUs stand behind `pynvml` itself, so nothing in this package knows of them but these lines: where
`PERSEUS_SIMULATED_GPUS` is set, importing `perseus_core.gpu` makes `pynvml` speak to them.
"""

import os

if "PERSEUS_SIMULATED_GPUS" in os.environ:
    from perseus_core.gpu import simulated

    simulated.install()
