"""The flags on a Megatron command line, on a parser like Megatron's."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from perseus_megatron import activation
from perseus_megatron.flags import settings_of, with_state_in_checkpoint
from tests.conftest import REPOSITORY


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """As `megatron.training.arguments.parse_args` makes it, with no training loop to follow."""
    monkeypatch.setattr("perseus_megatron.training_hooks.hook_training", lambda settings: None)
    arguments: Any = ModuleType("megatron.training.arguments")
    arguments.add_megatron_arguments = lambda parser: parser
    activation.activate(arguments)
    parser: argparse.ArgumentParser = arguments.add_megatron_arguments(
        argparse.ArgumentParser(prog="pretrain_gpt.py", allow_abbrev=False)
    )
    return parser


def message(parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What the user reads when the flags are refused."""
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(flags)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_flags_are_a_group_of_their_own_in_help(parser: argparse.ArgumentParser) -> None:
    """`--help` shows all of them under one title."""
    group = parser.format_help().split("perseus:")[1]
    for flag in ("--perseus ", "--perseus-config", "--perseus-max-slowdown", "--perseus-profile-cache"):
        assert flag in group
    assert "--perseus-measure-only" in group


def test_without_the_flag_nothing_is_enabled(parser: argparse.ArgumentParser) -> None:
    """The namespace says so, in values that a checkpoint can hold."""
    namespace = vars(parser.parse_args([]))
    assert namespace == {
        "perseus": False,
        "perseus_config": None,
        "perseus_max_slowdown": None,
        "perseus_profile_cache": None,
        "perseus_measure_only": False,
    }


def test_flags_count_more_than_the_file(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    """The file's other keys stay."""
    file = tmp_path / "perseus.json"
    file.write_text(json.dumps({"max_slowdown": 0.2, "tolerance": 0.01}))
    flags = ["--perseus", "--perseus-config", str(file), "--perseus-max-slowdown", "0.05", "--perseus-measure-only"]
    settings = settings_of(parser.parse_args(flags))
    assert (settings.enabled, settings.max_slowdown, settings.tolerance) == (True, 0.05, 0.01)
    assert settings.measure_only


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--perseus", "--perseus-max-slowdown", "1.2"], "--perseus-max-slowdown: 1.2 is not in [0, 1)"),
        (["--perseus-max-slowdown", "0.1"], "--perseus-max-slowdown does nothing without --perseus"),
        (["--perseus-measure-only"], "--perseus-measure-only does nothing without --perseus"),
        (["--perseus", "--perseus-config", "/nowhere.json"], "/nowhere.json cannot be read"),
    ],
)
def test_wrong_flags_end_the_job_before_it_starts(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    """One line names the flag, its value and what would be right."""
    refused = message(parser, capsys, *flags)
    assert said in refused
    assert refused.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"max_slowdwon": 0.1}', 'config "perseus.max_slowdwon" is not known; did you mean "max_slowdown"?'),
        ('{"max_slowdown": 2}', 'config "perseus.max_slowdown": 2 is not in [0, 1)'),
        ("[1]", "holds no object"),
        ("{", "is not JSON"),
    ],
)
def test_wrong_file_ends_the_job_before_it_starts(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, said: str
) -> None:
    """With the same sentences as the DeepSpeed block."""
    file = tmp_path / "perseus.json"
    file.write_text(content)
    assert said in message(parser, capsys, "--perseus", "--perseus-config", str(file))


def test_switched_off_by_the_environment_the_flag_is_still_known(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PERSEUS_DISABLE=1 leaves a command line valid and does nothing."""
    monkeypatch.setenv("PERSEUS_DISABLE", "1")
    monkeypatch.setattr("perseus_megatron.training_hooks.hook_training", pytest.fail)
    assert parser.parse_args(["--perseus"]).perseus


def test_state_is_kept_beside_the_checkpoints(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    """A resumed job finds the state in the folder that it loads from, though it saves to another."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "perseus_session.json").write_text("state")
    arguments = parser.parse_args(["--perseus"])
    arguments.save, arguments.load = str(tmp_path / "new"), str(tmp_path / "old")
    settings = with_state_in_checkpoint(settings_of(arguments), arguments)
    assert Path(settings.state_file) == tmp_path / "new" / "perseus_session.json"
    assert Path(settings.state_file).read_text() == "state"


SCRIPT = """
import argparse, sys
{imports}
from megatron.training import arguments
parser = arguments.add_megatron_arguments(argparse.ArgumentParser())
print("known" if "--perseus" in parser.format_help() else "unknown")
"""


@pytest.mark.parametrize(
    ("command", "imports", "expected"),
    [
        ([], "import torch", "known"),
        ([], "import perseus_megatron", "known"),
        ([], "from megatron.training import arguments\nimport perseus_megatron", "known"),
        (["-m", "perseus_megatron"], "", "known"),
        ([], "", "unknown"),
    ],
    ids=["entry point", "import before", "import after", "launcher", "not at all"],
)
def test_ways_to_make_the_flags_known(tmp_path: Path, command: list[str], imports: str, expected: str) -> None:
    """By the entry point alone, by one import, or by the launcher; a stand-in for `megatron.training` is enough."""
    package = tmp_path / "megatron" / "training"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "arguments.py").write_text("def add_megatron_arguments(parser):\n    return parser\n")
    script = tmp_path / "pretrain.py"
    script.write_text(SCRIPT.format(imports=imports))
    entry_point = {} if "torch" in imports else {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(
        [sys.executable, *command, str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)]), **entry_point},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.split() == [expected], done.stderr
