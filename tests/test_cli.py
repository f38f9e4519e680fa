"""The program as a stranger uses it: real processes, real files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from perseus_core import cli
from tests.conftest import OWN_PROFILE, PUBLISHED

SOLVE = ["solve", str(OWN_PROFILE), "--microbatches", "8", "--blocking-power", "83.5"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "perseus_core.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_from_profile_to_picture(tmp_path: Path) -> None:
    """Solve, plan and plot, each in its own process, as in the README."""
    frontier, plan, picture = (str(tmp_path / name) for name in ("frontier.json", "plan.json", "plan.png"))
    assert run(*SOLVE, "-o", frontier).returncode == 0
    assert run("plan", frontier, "--max-slowdown", "0.1", "-o", plan).returncode == 0
    drawn = run("plot", plan, "-o", picture)
    assert drawn.returncode == 0, drawn.stderr
    assert Path(picture).read_bytes().startswith(b"\x89PNG")


def test_json_holds_what_machines_need(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every key promised is there, and the numbers agree with each other."""
    frontier = str(tmp_path / "frontier.json")
    assert cli.main([*SOLVE, "--json", "-o", frontier]) == 0
    solved = json.loads(capsys.readouterr().out)
    assert cli.main(["plan", frontier, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert solved["saving"] == pytest.approx(plan["saving"])
    assert plan["saving"] == pytest.approx(1 - plan["energy_j"] / plan["baseline_energy_j"])
    assert plan["slowdown"] == pytest.approx(plan["iteration_time_s"] / plan["baseline_time_s"] - 1)
    assert plan["gap"] == pytest.approx(plan["energy_j"] / plan["bound_energy_j"] - 1)
    assert [len(order) for order in plan["clocks_mhz"]] == [16] * 4


@pytest.mark.parametrize(
    "policy",
    [
        ["--fastest"],
        ["--straggler", "1.2"],
        ["--time", "3.0"],
        ["--eta", "0.5"],
        ["--eta", "0.5", "--carbon-intensity", "500", "400"],
        ["--power-cap", "900"],
        ["--switch-latency", "0.015"],
        ["--switch-latency", "0.015", "--max-changes-per-s", "2"],
    ],
)
def test_every_policy_has_its_option(tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: list[str]) -> None:
    """Each makes a plan that keeps its bound."""
    frontier = str(tmp_path / "frontier.json")
    cli.main([*SOLVE, "--json", "-o", frontier])
    capsys.readouterr()
    assert cli.main(["plan", frontier, "--json", *policy]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["bound_energy_j"] <= plan["energy_j"] * (1 + 1e-9)


def test_a_plan_tells_how_often_clocks_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what executing it takes; a person reads it in words."""
    frontier = str(tmp_path / "frontier.json")
    cli.main([*SOLVE, "--json", "-o", frontier])
    capsys.readouterr()
    switching = ["--switch-latency", "0.015", "--max-changes-per-s", "1"]
    assert cli.main(["plan", frontier, "--json", *switching]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert 2 <= plan["changes_per_iteration"] <= plan["executed_time_s"]
    assert plan["granularity"] == ("phase" if plan["changes_per_iteration"] <= 3 else "instruction")
    assert (plan["executed_time_s"], plan["executed_energy_j"]) == (plan["iteration_time_s"], plan["energy_j"])
    assert cli.main(["plan", frontier, *switching]) == 0
    assert "if clocks changed at once" in " ".join(capsys.readouterr().out.split())
    assert cli.main(["plan", frontier, "--max-changes-per-s", "-1"]) == 2
    assert "--max-changes-per-s -1.0 must be 0 or more" in capsys.readouterr().err


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved", "zb-h1"])
def test_every_schedule_solves(capsys: pytest.CaptureFixture[str], schedule: str) -> None:
    """Also those whose chunks or parts the profile does not have."""
    assert cli.main([*SOLVE, "--schedule", schedule, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["saving"] > 0


def test_compare_draws_the_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table names everybody, and the three figures are written."""
    assert cli.main(["compare", *SOLVE[1:], "-o", str(tmp_path / "figures")]) == 0
    table = capsys.readouterr().out
    for name in ("All clocks at maximum", "Zeus, global", "Zeus, per stage", "EnvPipe", "Perseus, this plan"):
        assert name in table
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["frontier.html", "frontier.png", "timeline.png"]


def test_compare_with_the_published_frontier(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The published saving of Table 6 stands in its row, ours above it."""
    profile = published / "stage_profile" / "gpt3-175b+a100_sxm_bf16.csv"
    frontier = published / "published_frontier" / "a100_sxm_gpt3-175b_bf16_mb12.csv"
    arguments = ["-m", "12", "--blocking-power", "83.64", "--trust-profile", "--published", str(frontier), "--json"]
    assert cli.main(["compare", str(profile), *arguments]) == 0
    savings = {row["name"]: row["saving"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert savings["Perseus, published"] == pytest.approx(0.152, abs=0.004)
    assert savings["Perseus, this plan"] > savings["Perseus, published"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["solve", "nowhere.csv", "-m", "8", "--blocking-power", "80"], "nowhere.csv: cannot be read"),
        ([*SOLVE[:3], "0", *SOLVE[4:]], "num_microbatches is 0"),
        ([*SOLVE[:5], "-3"], "blocking power -3.0 W"),
        ([*SOLVE, "--schedule", "spiral"], "invalid choice"),
        ([*SOLVE, "--schedule", "interleaved", "-m", "7"], "7 microbatches"),
        ([*SOLVE, "-o", "no/such/folder/f.json"], "cannot be written"),
        (["plan", str(OWN_PROFILE)], "is not JSON"),
        (["plot", str(OWN_PROFILE), "-o", "x.png"], "is not JSON"),
        (["simulate", "--gpus", "nowhere.json", "--", "true"], "nowhere.json"),
        ([], "required"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments: list[str], words: str) -> None:
    """On standard error, nothing on standard output, no traceback."""
    refused = run(*arguments)
    assert refused.returncode == 2
    assert words in refused.stderr
    assert len([line for line in refused.stderr.splitlines() if not line.startswith("note:")]) == 1
    assert refused.stdout == ""


def test_the_planner_needs_neither_torch_nor_drawing() -> None:
    """Importing the command line pulls in no torch, no pynvml and no matplotlib."""
    code = "import perseus_core.cli, sys; print([m for m in ('torch', 'pynvml', 'matplotlib') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"


def test_make_demo_names_data_that_exists() -> None:
    """The profile that the demo takes without the measured data is in the repository."""
    makefile = (OWN_PROFILE.parents[2] / "Makefile").read_text()
    assert (OWN_PROFILE.parents[2] / "configs/profiles/gpt3-175b_a100_8stages.csv").is_file()
    assert "configs/profiles/gpt3-175b_a100_8stages.csv" in makefile
    assert PUBLISHED.name in makefile
