"""How the package gets into a job, and that it never gets in the way of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.deepspeed.launcher import REPOSITORY

ENTRY_POINT_OFF = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
LOOK = """
import json, sys
def ours():
    return sorted(name for name in sys.modules if name.startswith("perseus"))
{imports}
from deepspeed.runtime.pipe.engine import PipelineEngine
loader = sys.modules[PipelineEngine.__module__].__loader__
print(json.dumps({{
    "hooked": hasattr(PipelineEngine.__init__, "of_perseus"),
    "ours": ours(),
    "ours after torch": globals().get("after_torch"),
    "loader": [type(loader).__name__, sorted(vars(loader))],
}}))
"""


def look(imports: str, *, folder: Path, **environment: str) -> tuple[dict[str, Any], str]:
    """What a new process finds after some imports, and what it wrote to stderr; the folder is first on its path."""
    path = os.pathsep.join(filter(None, [str(folder), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", LOOK.format(imports=imports)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_installed_package_looks_at_pipeline_engines(tmp_path: Path) -> None:
    """By its entry point alone; and it loads nothing but what looks for a block, and leaves no trace on the import."""
    found, _ = look("import torch; after_torch = ours(); import deepspeed", folder=tmp_path)
    assert found["hooked"]
    assert found["ours after torch"] == ["perseus_autoload"]
    assert found["ours"] == ["perseus_autoload", "perseus_ds", "perseus_ds.activation", "perseus_ds.block"]
    assert found["loader"] == ["SourceFileLoader", ["name", "path"]]


@pytest.mark.parametrize("imports", ["import perseus_ds, deepspeed", "import deepspeed, perseus_ds"])
def test_one_line_does_the_same(imports: str, tmp_path: Path) -> None:
    """`import perseus_ds` before or after DeepSpeed, where entry points are switched off."""
    assert look(imports, folder=tmp_path, **ENTRY_POINT_OFF)[0]["hooked"]


def test_environment_variable_switches_off(tmp_path: Path) -> None:
    """With PERSEUS_DISABLE=1 DeepSpeed is as it was, whatever is imported."""
    assert not look("import deepspeed, perseus_ds", folder=tmp_path, PERSEUS_DISABLE="1")[0]["hooked"]


def test_broken_adapter_breaks_no_import(tmp_path: Path) -> None:
    """A package of ours that cannot be imported leaves DeepSpeed importable, with one line that says so."""
    (tmp_path / "perseus_ds").mkdir()
    (tmp_path / "perseus_ds" / "__init__.py").write_text("raise RuntimeError('broken on purpose')")
    found, errors = look("import deepspeed", folder=tmp_path)
    assert not found["hooked"]
    assert errors.count("perseus: not active, training is untouched: RuntimeError: broken on purpose") == 1


def test_shadowed_package_breaks_no_import(tmp_path: Path) -> None:
    """A stranger's package with the name of our adapter leaves torch and DeepSpeed importable."""
    (tmp_path / "perseus_ds").mkdir()
    (tmp_path / "perseus_ds" / "__init__.py").write_text("")
    # Whether the adapter is found behind the stranger depends on how it was installed; that `look` comes back does not.
    found, _ = look("import deepspeed", folder=tmp_path)
    assert "perseus_autoload" in found["ours"]
