"""Perseus: removes energy bloat from pipeline-parallel training.

The core, shared by the framework adapters. `perseus_core.planning` stands alone: it needs no GPU and no framework.
"""

__version__ = "0.1.0"
