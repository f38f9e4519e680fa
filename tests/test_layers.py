"""Imports go one way: read from the sources, with those inside functions and those for the type checker."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import networkx as nx
import pytest

from tests.conftest import REPOSITORY

PACKAGES = ("perseus_core", "perseus_ds", "perseus_megatron")

_BASICS = ("perseus_core", "perseus_core.errors", "perseus_core.files", "perseus_core.documents")
_PLANNING = ("perseus_core.planning", *_BASICS)
_RUNTIME = "perseus_core.runtime."
_BASE_OF_RUNTIME = tuple(_RUNTIME + name for name in ("log", "patience", "cuda_driver", "side_threads"))
_ALL_OF_RUNTIME = "perseus_core.runtime"
_OF_A_JOB = ("perseus_core.gpu", _ALL_OF_RUNTIME, *_PLANNING)
_OF_ADAPTERS = (_ALL_OF_RUNTIME, "perseus_autoload", *_PLANNING)

# Each room, and what of ours its files may import beside each other. A file belongs to the longest name that fits. A
# name stands for all below it, but `perseus_core` for its own `__init__` only.
MAY_IMPORT: Mapping[str, tuple[str, ...]] = {
    "perseus_autoload": (),
    "perseus_core": (),
    "perseus_core.errors": (),
    "perseus_core.files": ("perseus_core.errors",),
    "perseus_core.documents": ("perseus_core.errors", "perseus_core.files"),
    "perseus_core.planning": ("perseus_core.errors", "perseus_core.files", "perseus_core.documents"),
    "perseus_core.report": _PLANNING,
    "perseus_core.gpu": _PLANNING,
    _RUNTIME + "log": (),
    _RUNTIME + "cuda_driver": (_RUNTIME + "log",),
    _RUNTIME + "side_threads": (_RUNTIME + "log", _RUNTIME + "cuda_driver"),
    _RUNTIME + "patience": ("perseus_core.gpu.errors",),
    _RUNTIME + "settings": _PLANNING,
    _RUNTIME + "measure": ("perseus_core.gpu", *_BASE_OF_RUNTIME, *_PLANNING),
    _RUNTIME + "clock": (
        _RUNTIME + "measure",
        "perseus_core.gpu",
        "perseus_core.planning.switching",
        *_BASE_OF_RUNTIME,
        *_BASICS,
    ),
    _RUNTIME + "ranks": ("perseus_core.planning.switching", *_BASE_OF_RUNTIME, *_BASICS),
    _RUNTIME + "job": (_RUNTIME + "measure", *_PLANNING),
    _RUNTIME + "replan": (
        _RUNTIME + "job",
        _RUNTIME + "measure",
        _RUNTIME + "ranks",
        _RUNTIME + "clock.planned_clock",
        *_BASE_OF_RUNTIME,
        *_PLANNING,
    ),
    "perseus_core.runtime": _OF_A_JOB,
    "perseus_core.commands": ("perseus_core.report", *_OF_A_JOB),
    "perseus_core.cli": ("perseus_core.commands", *_BASICS),
    "perseus_ds": _OF_ADAPTERS,
    "perseus_megatron": _OF_ADAPTERS,
    # What stands in for a GPU's work on a CPU.
    "perseus_ds.simulated_work": ("perseus_ds", "perseus_core.gpu.simulated", *_OF_ADAPTERS),
    "perseus_megatron.simulated_work": ("perseus_megatron", "perseus_core.gpu.simulated", *_OF_ADAPTERS),
}

# What is not ours, and where alone it may be imported.
ONLY_IN: Mapping[str, tuple[str, ...]] = {
    "pynvml": ("perseus_core.gpu",),
    "networkx": ("perseus_core.planning",),
    "matplotlib": ("perseus_core.report", "perseus_core.commands"),
    "torch": ("perseus_core.runtime", "perseus_core.commands.measurement", "perseus_ds", "perseus_megatron"),
    "deepspeed": ("perseus_ds",),
    "megatron": ("perseus_megatron",),
}


def _modules() -> dict[str, Path]:
    """All files of ours, by the name they are imported by."""
    found = {"perseus_autoload": REPOSITORY / "perseus_autoload.py"}
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("*.py"):
            name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = _modules()


def imported(tree: ast.AST) -> Iterator[str]:
    """The full names of all modules that a source imports: of `from x import y` that of the file `y`, if it is one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, "imports are written in full"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute | ast.Name)
            and (node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id) == "import_module"
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def is_within(name: str, room: str) -> bool:
    """Whether a module is a room's, or is one itself."""
    return name == room or (room != "perseus_core" and name.startswith(room + "."))


def room_of(name: str) -> str:
    """The longest name in the table that fits."""
    rooms = [room for room in MAY_IMPORT if is_within(name, room)]
    assert rooms, f"{name} is in no room: say in MAY_IMPORT what it may import"
    return max(rooms, key=len)


def _is_ours(name: str) -> bool:
    return name.split(".")[0] in (*PACKAGES, "perseus_autoload")


IMPORTS = {name: sorted(set(imported(ast.parse(path.read_text())))) for name, path in MODULES.items()}


def wrong_imports(imports: Mapping[str, list[str]]) -> list[str]:
    """Those that the table does not allow."""
    wrong = []
    for name, others in imports.items():
        room = room_of(name)
        for other in filter(_is_ours, others):
            if room_of(other) != room and not any(is_within(other, may) for may in MAY_IMPORT[room]):
                wrong.append(f"{name} imports {other}")
    return sorted(wrong)


def test_no_arrow_points_up() -> None:
    """Each file imports what its room may import, and nothing else of ours."""
    assert wrong_imports(IMPORTS) == []


def test_files_never_import_each_other_in_a_circle() -> None:
    """Not even inside functions or for the type checker."""
    graph = nx.DiGraph((name, other) for name, others in IMPORTS.items() for other in others if other in MODULES)
    circles = [sorted(files) for files in nx.strongly_connected_components(graph) if len(files) > 1]
    assert circles == []
    assert not list(nx.selfloop_edges(graph))


@pytest.mark.parametrize("package", ONLY_IN)
def test_what_is_not_ours_is_imported_only_where_it_belongs(package: str) -> None:
    """The planner needs no GPU and no framework, an adapter no driver, and training draws nothing."""
    users = {name for name, others in IMPORTS.items() if any(other.split(".")[0] == package for other in others)}
    assert users, "somebody does"
    assert {name for name in users if not any(is_within(name, room) for room in ONLY_IN[package])} == set()


def test_the_planner_stands_alone() -> None:
    """On numpy, networkx, the standard library and its own C."""
    others = {
        other.split(".")[0]
        for name, of_file in IMPORTS.items()
        if is_within(name, "perseus_core.planning")
        for other in of_file
        if not _is_ours(other)
    }
    assert others - sys.stdlib_module_names <= {"numpy", "networkx"}


def test_what_torch_loads_in_every_program_imports_nothing_of_ours() -> None:
    """It must cost nothing, and break nothing, where no framework of ours is used."""
    assert {
        other for other in IMPORTS["perseus_autoload"] if other.split(".")[0] not in sys.stdlib_module_names
    } == set()


def test_nobody_knows_who_uses_him() -> None:
    """The core knows no adapter, and adapters do not know each other."""
    assert [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in others
        if other.split(".")[0] in PACKAGES[1:] and other.split(".")[0] != name.split(".")[0]
    ] == []


@pytest.mark.parametrize(
    "source",
    [
        "import perseus_core.gpu.nvml",
        "import perseus_core.gpu.nvml as driver",
        "from perseus_core.gpu import nvml",
        "from perseus_core.gpu.nvml import NvmlDevice",
        "def later():\n    from perseus_core.gpu import nvml\n    return nvml",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from perseus_core.gpu.nvml import NvmlDevice",
        "try:\n    from perseus_core.gpu.nvml import NvmlDevice\nexcept ImportError:\n    pass",
        "import importlib\nnvml = importlib.import_module('perseus_core.gpu.nvml')",
    ],
)
def test_no_way_to_import_is_overlooked(source: str) -> None:
    """Wherever it stands in a file; an adapter must not do any of these."""
    assert "perseus_core.gpu.nvml" in imported(ast.parse(source))
    found = wrong_imports({"perseus_ds.block": list(imported(ast.parse(source)))})
    assert found == ["perseus_ds.block imports perseus_core.gpu.nvml"]


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("perseus_core.planning.dag", "perseus_core.runtime.log"),
        ("perseus_core.planning.dag", "perseus_core.gpu.device"),
        ("perseus_core.gpu.device", "perseus_core.runtime.log"),
        ("perseus_core.runtime.measure.meter", "perseus_core.runtime.ranks.records"),
        ("perseus_core.runtime.measure.meter", "perseus_core.runtime.clock.controller"),
        ("perseus_core.runtime.clock.controller", "perseus_core.runtime.replan.correction"),
        ("perseus_core.runtime.clock.controller", "perseus_core.runtime.session"),
        ("perseus_core.runtime.ranks.decisions", "perseus_core.runtime.replan.correction"),
        ("perseus_core.runtime.ranks.decisions", "perseus_core.runtime.reporter"),
        ("perseus_core.runtime.replan.job_planner", "perseus_core.runtime.clock.controller"),
        ("perseus_core.runtime.replan.job_planner", "perseus_core.runtime.rank_zero"),
        ("perseus_core.runtime.session", "perseus_core.commands.doctor"),
        ("perseus_core.runtime.session", "perseus_ds.config"),
        ("perseus_core.errors", "perseus_core.files"),
        ("perseus_core.report.units", "perseus_core.runtime.session"),
        ("perseus_ds.config", "perseus_core.gpu.simulated.node"),
    ],
)
def test_the_table_forbids_what_it_is_for(name: str, other: str) -> None:
    """Both files are there, and the arrow would point up."""
    assert {name, other} <= MODULES.keys()
    assert wrong_imports({name: [other]}) == [f"{name} imports {other}"]
