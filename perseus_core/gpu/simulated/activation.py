"""Puts the simulated driver into the place of the vendor library."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from perseus_core.errors import InputError
from perseus_core.gpu.simulated.description import Description
from perseus_core.gpu.simulated.driver import SimulatedLibrary
from perseus_core.gpu.simulated.node import SimulatedNode

ENVIRONMENT_VARIABLE = "PERSEUS_SIMULATED_GPUS"


def create_node(description: str | Path | Description, folder: str | Path, *, log: bool = False) -> SimulatedNode:
    """Makes simulated GPUs from a description (a file, or already read) in an empty folder.

    Raises:
        InputError: if the description or its profile is wrong.
    """
    if not isinstance(description, Description):
        description = Description.load(description)
    return SimulatedNode.create(description, Path(folder), log=log)


def open_node(folder: str | Path | None = None) -> SimulatedNode:
    """Opens simulated GPUs that exist, by default those of `PERSEUS_SIMULATED_GPUS`.

    Raises:
        InputError: if there are none.
    """
    if folder is None:
        folder = os.environ.get(ENVIRONMENT_VARIABLE)
        if folder is None:
            raise InputError(f"{ENVIRONMENT_VARIABLE} is not set; start the command with `perseus simulate`")
    return SimulatedNode(Path(folder))


def install(folder: str | Path | None = None) -> None:
    """Makes `pynvml` in this process speak to the simulated GPUs, whether it is imported already or will be later.

    Args:
        folder: where they are; by default `PERSEUS_SIMULATED_GPUS`.

    Raises:
        InputError: if there are none.
    """
    node = open_node(folder)
    if any(isinstance(finder, _PynvmlFinder) and finder.library.folder == node.folder for finder in sys.meta_path):
        return  # a second library would have forgotten that the program has called nvmlInit
    uninstall()
    library = SimulatedLibrary(node)
    sys.meta_path.insert(0, _PynvmlFinder(library))
    for name, module in list(sys.modules.items()):
        if _is_pynvml(name) and module is not None:
            _place_library(module, library)


def uninstall() -> None:
    """Undoes `install`: `pynvml` loads the vendor library again."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _PynvmlFinder)]
    for name, module in list(sys.modules.items()):
        if _is_pynvml(name) and isinstance(getattr(module, "nvmlLib", None), SimulatedLibrary):
            _place_library(module, None)


def _is_pynvml(name: str) -> bool:
    """Some packages carry a copy of `pynvml` of their own, such as `vllm.third_party.pynvml`."""
    return name == "pynvml" or name.endswith(".pynvml")


def _place_library(module: ModuleType, library: SimulatedLibrary | None) -> None:
    if not hasattr(module, "nvmlLib"):
        return
    setattr(module, "nvmlLib", library)  # noqa: B010 (mypy knows no attribute of an unknown module)
    # pynvml remembers the functions it has looked up; those of another library must go.
    getattr(module, "_nvmlGetFunctionPointer_cache", {}).clear()


class _PynvmlFinder(importlib.abc.MetaPathFinder):
    """Lets `pynvml` be imported as always, and places the library when its module has been executed."""

    def __init__(self, library: SimulatedLibrary) -> None:
        self.library = library

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _is_pynvml(fullname):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _PlacingLoader(spec.loader, self.library)
        return spec


class _PlacingLoader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, library: SimulatedLibrary) -> None:
        self._loader = loader
        self._library = library

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _place_library(module, self._library)
