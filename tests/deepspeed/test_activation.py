"""How the package gets into a job, and that it never gets in the way of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deepspeed.launcher import REPOSITORY

IS_HOOKED = """
from deepspeed.runtime.pipe.engine import PipelineEngine
print("hooked" if hasattr(PipelineEngine.__init__, "of_perseus") else "as it was")
"""


def python(code: str, *, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new process; files in the folder can be imported before anything else."""
    folders = [str(folder) if folder else "", str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(filter(None, folders))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, "DS_ACCELERATOR": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=100,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "imports",
    [
        "import deepspeed",
        "import perseus_ds, deepspeed",
        "import deepspeed, perseus_ds",
        "import deepspeed.runtime.pipe.engine, perseus_ds",
    ],
)
def test_pipeline_engine_is_looked_at(imports: str) -> None:
    """By the installed entry point alone, and by `import perseus_ds` before or after DeepSpeed."""
    without_entry_point = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"} if "perseus_ds" in imports else {}
    assert last_line(python(imports + IS_HOOKED, **without_entry_point)) == "hooked"


@pytest.mark.parametrize("imports", ["import deepspeed", "import perseus_ds, deepspeed"])
def test_environment_variable_switches_off(imports: str) -> None:
    """With PERSEUS_DISABLE=1 DeepSpeed is as it was."""
    assert last_line(python(imports + IS_HOOKED, PERSEUS_DISABLE="1")) == "as it was"


def test_importing_torch_imports_nothing_of_ours() -> None:
    """The entry point brings one small module, and neither the core nor an adapter."""
    code = "import sys, torch\nprint(sorted(m for m in sys.modules if m.startswith('perseus')))"
    assert last_line(python(code)) == "['perseus_autoload']"


def test_importing_deepspeed_imports_no_planner() -> None:
    """Without a block nothing is loaded but what looks for one."""
    code = "import sys, deepspeed\nprint(sorted(m for m in sys.modules if m.startswith('perseus')))"
    assert last_line(python(code)) == "['perseus_autoload', 'perseus_ds', 'perseus_ds.activation']"


def test_broken_adapter_breaks_no_import(tmp_path: Path) -> None:
    """A package of ours that cannot be imported leaves DeepSpeed importable, with one line that says so."""
    (tmp_path / "perseus_ds").mkdir()
    (tmp_path / "perseus_ds" / "__init__.py").write_text("raise RuntimeError('broken on purpose')")
    done = python("import deepspeed" + IS_HOOKED, folder=tmp_path)
    assert last_line(done) == "as it was"
    assert done.stderr.count("perseus: not active, training is untouched: RuntimeError: broken on purpose") == 1


def test_shadowed_package_breaks_no_import(tmp_path: Path) -> None:
    """A stranger's folder with the name of our adapter leaves torch and DeepSpeed importable."""
    (tmp_path / "perseus_ds").mkdir()
    done = python("import deepspeed" + IS_HOOKED, folder=tmp_path)
    assert last_line(done) == "as it was"


def test_watched_module_keeps_its_loader() -> None:
    """Nothing of ours stays in the import machinery of a module that was awaited."""
    code = "import deepspeed.runtime.pipe.engine as e\nprint(type(e.__loader__).__name__, vars(e.__loader__).keys())"
    assert last_line(python(code)) == "SourceFileLoader dict_keys(['name', 'path'])"
