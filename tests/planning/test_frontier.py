"""Frontiers: energies and durations for any time, and the file they live in."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perseus_core.errors import InputError
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.frontier_file import load_frontier, save_frontier
from perseus_core.planning.problem import PipelineProblem
from perseus_core.planning.profile import Profile
from perseus_core.planning.schedule import interleaved, one_f_one_b
from perseus_core.planning.solver import solve

AnyFrontier = Frontier[PipelineProblem]


def test_durations_keep_the_time_and_nearly_the_energy(problem: PipelineProblem, frontier: AnyFrontier) -> None:
    """At any time the durations fit in it, and cost at most the tolerance more than the frontier."""
    for share in np.linspace(0, 1, 33):
        time_s = (1 - share) * frontier.fastest_time_s + share * frontier.min_energy_time_s
        durations_s = frontier.durations_s(time_s)
        assert problem.dag.iteration_time_s(durations_s) <= time_s * (1 + 1e-6)
        energy_j = problem.iteration_energy_j(problem.effective_energy_j(durations_s), time_s)
        assert frontier.energy_j(time_s) * (1 - 1e-7) <= energy_j <= frontier.energy_j(time_s) * (1 + 2e-5)


def test_beyond_the_minimum_energy_point_the_pipeline_waits(problem: PipelineProblem, frontier: AnyFrontier) -> None:
    """Two seconds more cost two seconds of blocking power, and the durations stay."""
    slowest_s = frontier.min_energy_time_s
    assert frontier.energy_j(slowest_s + 2) == pytest.approx(frontier.energies_j[-1] + 2 * problem.blocking_power_w)
    assert (frontier.durations_s(slowest_s + 2) == frontier.durations_s(slowest_s)).all()


def test_faster_than_the_fastest_is_refused(frontier: AnyFrontier) -> None:
    """The message says what the fastest is."""
    with pytest.raises(InputError, match="cannot be reached; the fastest is"):
        frontier.energy_j(0.9 * frontier.fastest_time_s)


def test_time_outside_the_pipeline_is_added_once(own_profile: Profile, frontier: AnyFrontier) -> None:
    """It lengthens every iteration, and costs its own energy and waiting."""
    outside = PipelineProblem.of(own_profile, one_f_one_b(4, 8), 83.5, outside_time_s=0.5, outside_energy_j=7.0)
    shifted = solve(outside)
    assert shifted.times_s == pytest.approx(frontier.times_s + 0.5)
    assert shifted.energies_j == pytest.approx(frontier.energies_j + 0.5 * 4 * 83.5 + 7.0)


def test_a_file_gives_back_the_frontier(tmp_path: Path, own_profile: Profile) -> None:
    """Interleaved, with latency and time outside: everything survives."""
    problem = PipelineProblem.of(
        own_profile.divided_into_chunks(2),
        interleaved(4, 8, 2),
        [80.0, 81.0, 82.0, 83.0],
        transfer_latency_s=0.001,
        outside_time_s=0.2,
        outside_energy_j=3.0,
    )
    frontier = solve(problem)
    save_frontier(frontier, tmp_path / "frontier.json")
    loaded = load_frontier(tmp_path / "frontier.json")
    assert loaded.problem.schedule == problem.schedule
    assert loaded.problem.stage_blocking_power_w == problem.stage_blocking_power_w
    for name in ("times_s", "energies_j", "stored", "positions"):
        assert (getattr(loaded, name) == getattr(frontier, name)).all()
    middle_s = (frontier.fastest_time_s + frontier.min_energy_time_s) / 2
    assert (loaded.durations_s(middle_s) == frontier.durations_s(middle_s)).all()
    assert [p.name for p in tmp_path.iterdir()] == ["frontier.json"]


def test_the_file_of_a_long_iteration_is_small(tmp_path: Path, published: Path) -> None:
    """1,536 instructions and every point of the frontier: below a megabyte."""
    profile = Profile.load(published / "stage_profile" / "gpt3-175b+a100_sxm_bf16.csv")
    save_frontier(solve(PipelineProblem.of(profile, one_f_one_b(8, 96), 83.64)), tmp_path / "frontier.json")
    assert (tmp_path / "frontier.json").stat().st_size < 2**20
    assert load_frontier(tmp_path / "frontier.json").positions.shape[1] == 1536


def broken(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.__setitem__(field, value)


@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        (broken("version", 2), ['"version" is 2', "must be 1"]),
        (broken("format", "perseus-plan"), ['"format" is "perseus-plan"']),
        (broken("blocking_power_w", [1.0, 2.0]), ["blocking power", "2 stages"]),
        (broken("blocking_power_w", "much"), ['"blocking_power_w" is "much"', "list"]),
        (broken("outside_time_s", -1), ['"outside_time_s" is -1', "0 or more"]),
        (broken("outside_time_s", None), ['"outside_time_s" is null']),
        (broken("times_s", [3.0, 2.0]), ['"times_s"', "must rise"]),
        (broken("energies_j", [float("nan")]), ['"energies_j" is NaN']),
        (broken("stored", [0]), ['"stored"']),
        (broken("positions", "AAAA"), ['"positions"', "packed array"]),
        (broken("measurements", [[0, 0, "forward", 1410, 0.1]]), ['"measurements"', "rows"]),
        (broken("measurements", [[0, 0, "forwards", 1410, 0.1, 1.0]]), ['"forwards"', "forward"]),
        (lambda document: document["measurements"].clear(), ["no measurement"]),
        (lambda document: document["schedule"]["stages"].pop(), ["4 stages; the schedule has 3"]),
        (lambda document: document["schedule"]["stages"][0].append(["forward", 0, 99]), ["microbatch=99"]),
        (lambda document: document["schedule"].update(placement="x"), ['"placement" is "x"', "one of loop, v"]),
        (lambda document: document.pop("schedule"), ['"schedule" is missing']),
    ],
)
def test_a_broken_file_is_refused_in_one_sentence(
    tmp_path: Path, frontier: AnyFrontier, breakage: Callable[[dict[str, Any]], None], words: list[str]
) -> None:
    """The message names the file, the field and the value."""
    path = tmp_path / "frontier.json"
    save_frontier(frontier, path)
    document = json.loads(path.read_text())
    breakage(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError) as refused:
        load_frontier(path)
    message = str(refused.value)
    assert "\n" not in message
    for word in ["frontier.json", *words]:
        assert word in message


@pytest.mark.parametrize("content", ["", "[]", "{", "\x00", '{"format": 1}'])
def test_what_is_no_document_is_refused(tmp_path: Path, content: str) -> None:
    """Empty, a list, half a document, binary, another thing."""
    path = tmp_path / "frontier.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"frontier\.json"):
        load_frontier(path)


def test_a_frontier_solved_in_a_thread_leaves_the_main_thread_running(published: Path) -> None:
    """The solver holds no lock of the interpreter: training goes on while it works."""
    profile = Profile.load(published / "stage_profile" / "gpt3-175b+a100_sxm_bf16.csv")
    problem = PipelineProblem.of(profile, one_f_one_b(8, 384), 83.64)
    thread = threading.Thread(target=solve, args=(problem,))
    turns = 0
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 20
