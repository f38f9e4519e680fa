"""Powers from the counter, against truths in closed form."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from perseus_core.runtime.measure.energy import Iteration, Powers, Span, solve_powers, undisturbed

from .synthetic_counter import BACKWARD, FORWARD, Piece, lay_out, read_counter, stage_in_1f1b


def solve(iterations: list[list[Piece]], **counter: object) -> Powers:
    powers = solve_powers(lay_out(iterations), read_counter(iterations, **counter))  # type: ignore[arg-type]
    assert powers is not None
    return powers


def noisy(seed: int, num_iterations: int, **stage: object) -> tuple[list[list[Piece]], np.random.Generator]:
    random = np.random.default_rng(seed)
    return [stage_in_1f1b(noise=0.01, random=random, **stage) for _ in range(num_iterations)], random  # type: ignore[arg-type]


def test_exact_readings_give_exact_powers() -> None:
    """Without noise and with a counter looked at all the time, the truth comes out."""
    powers = solve([stage_in_1f1b()] * 3, look_every_s=0.0001)
    assert powers.instructions[FORWARD].power_w == pytest.approx(300, rel=2e-3)
    assert powers.instructions[BACKWARD].power_w == pytest.approx(340, rel=2e-3)
    assert powers.waiting.power_w == pytest.approx(80, rel=0.01)
    assert powers.outside.power_w == pytest.approx(150, rel=0.05)


@pytest.mark.parametrize("period_s", [0.02, 0.1])
def test_two_noisy_iterations_suffice(period_s: float) -> None:
    """1 % noise, a counter of 20 or 100 ms looked at every 5 ms: well within 5 %, in 30 tries."""
    for seed in range(30):
        iterations, random = noisy(seed, 2)
        powers = solve(iterations, period_s=period_s, random=random)
        assert powers.instructions[FORWARD].power_w == pytest.approx(300, rel=0.045)
        assert powers.instructions[BACKWARD].power_w == pytest.approx(340, rel=0.03)
        assert powers.waiting.power_w == pytest.approx(80, rel=0.2)


def test_standard_errors_are_honest() -> None:
    """Over many tries the errors are as large as the standard errors say, and there is no bias to speak of."""
    scores, errors = [], []
    for seed in range(100):
        iterations, random = noisy(seed, 2)
        powers = solve(iterations, random=random)
        for instruction_type, truth_w in ((FORWARD, 300.0), (BACKWARD, 340.0)):
            estimate = powers.instructions[instruction_type]
            scores.append((estimate.power_w - truth_w) / estimate.standard_error_w)
            errors.append(estimate.power_w / truth_w - 1)
    assert 0.6 < np.std(scores) < 1.5
    assert abs(np.mean(errors)) < 0.003


def test_a_thread_that_runs_late_costs_precision_and_no_truth() -> None:
    """Looks that come 30 ms late now and then are passed over."""
    errors = []
    for seed in range(30):
        iterations, random = noisy(seed, 3)
        powers = solve(iterations, late_share=0.1, random=random)
        errors.append(powers.instructions[FORWARD].power_w / 300 - 1)
    assert abs(np.mean(errors)) < 0.015
    assert np.abs(errors).max() < 0.07


def test_a_stage_that_never_waits_says_that_it_does_not_know() -> None:
    """Instructions are measured as well as ever; the waiting power has a standard error of a third of theirs."""
    iterations, random = noisy(1, 3, waits_s=0.0)
    powers = solve(iterations, random=random)
    assert powers.instructions[FORWARD].power_w == pytest.approx(300, rel=0.04)
    assert powers.waiting.observed_s == pytest.approx(0.0, abs=1e-9)
    assert powers.waiting.standard_error_w > 80


def test_instructions_in_step_with_the_counter_share_their_mean() -> None:
    """Forward and backward of 50 ms under a counter of 100 ms cannot be told apart: the energy of both together can."""
    pieces: list[Piece] = [(t, 0.05, watts) for _ in range(20) for t, watts in ((FORWARD, 290.0), (BACKWARD, 310.0))]
    powers = solve([pieces] * 3)
    forward, backward = powers.instructions[FORWARD], powers.instructions[BACKWARD]
    assert (forward.power_w + backward.power_w) / 2 == pytest.approx(300, rel=0.01)
    assert forward.standard_error_w > 5


def test_a_counter_that_falls_costs_one_interval() -> None:
    """A reset or wrap of the counter in the middle changes nothing else."""
    iterations = [stage_in_1f1b()] * 3
    readings = read_counter(iterations)
    middle = len(readings) // 2
    fallen = readings[:middle] + [
        replace(r, energy_j=r.energy_j - readings[middle].energy_j) for r in readings[middle:]
    ]
    whole, after_reset = (solve_powers(lay_out(iterations), r) for r in (readings, fallen))
    assert whole is not None
    assert after_reset is not None
    assert after_reset.num_intervals == whole.num_intervals - 1
    assert after_reset.instructions[FORWARD].power_w == pytest.approx(300, rel=0.04)


def test_a_disturbed_execution_is_left_out() -> None:
    """The interpreter pauses for 300 ms within a forward: the GPU idles, and the span says forward."""
    iterations = [stage_in_1f1b() for _ in range(3)]
    paused: list[Piece] = list(iterations[1])
    at = next(i for i, (what, _, _) in enumerate(paused) if what == FORWARD)
    paused.insert(at + 1, ("pause", 0.3, 60.0))
    truth = [iterations[0], paused, iterations[2]]
    seen = lay_out(truth)
    spans = list(seen[1].spans)
    spans[0] = spans[0]._replace(end_s=spans[0].end_s + 0.3)
    seen[1] = replace(seen[1], spans=tuple(spans))
    powers = solve_powers(seen, read_counter(truth))
    assert powers is not None
    assert powers.instructions[FORWARD].power_w == pytest.approx(300, rel=0.03)


def test_what_lies_between_iterations_that_do_not_follow_each_other_is_ignored() -> None:
    """An evaluation at another power between two measured iterations leaves no trace."""
    evaluation: list[Piece] = [("evaluation", 3.0, 500.0)]
    truth = [stage_in_1f1b(), evaluation, stage_in_1f1b()]
    first, _, last = lay_out(truth)
    powers = solve_powers([first, last], read_counter(truth))
    assert powers is not None
    assert powers.instructions[BACKWARD].power_w == pytest.approx(340, rel=0.03)
    assert powers.outside.power_w < 250


def test_too_few_readings_give_no_answer() -> None:
    """An iteration shorter than the counter's period tells nothing."""
    iteration = Iteration(0, 0.0, 0.02, (Span(FORWARD, 0.0, 0.01),))
    assert solve_powers([iteration], []) is None


def test_a_pause_is_told_from_noise() -> None:
    """Far from the median both absolutely and in deviations; few executions are all believed."""
    assert undisturbed([1.0, 1.01, 0.99, 1.0, 1.5]).tolist() == [True, True, True, True, False]
    assert undisturbed([1.0, 1.01, 0.99, 1.0, 1.05]).all()
    assert undisturbed([1.0, 2.0, 3.0]).all()


@pytest.mark.parametrize("offset_s", [0.02, 1.5, -0.3])
def test_of_an_iteration_whose_place_in_time_is_not_known_only_durations_count(offset_s: float) -> None:
    """However far off it is: powers are those of the others, and its executions count among the durations."""
    pieces = [stage_in_1f1b()] * 5
    iterations, readings = lay_out(pieces), read_counter(pieces, look_every_s=0.0001)
    far = iterations[2]
    spans = tuple(Span(span.type, span.begin_s + offset_s, span.end_s + offset_s) for span in far.spans)
    iterations[2] = replace(far, begin_s=far.begin_s + offset_s, end_s=far.end_s + offset_s, spans=spans)
    misled = solve_powers(iterations, readings)
    iterations[2] = replace(iterations[2], on_host_time=False)
    powers = solve_powers(iterations, readings)
    assert powers is not None
    assert misled is not None
    assert abs(powers.waiting.power_w - 80) < 1.5 < abs(misled.waiting.power_w - 80)
    assert powers.instructions[FORWARD].power_w == pytest.approx(300, rel=2e-3)
    assert powers.outside.power_w == pytest.approx(150, rel=0.05)
    assert len(powers.durations_s[FORWARD]) == 5 * 8
    assert powers.durations_s[FORWARD] == pytest.approx(0.06)


def test_where_no_iteration_has_its_place_in_time_there_are_no_powers() -> None:
    """None is better than a wrong one."""
    pieces = [stage_in_1f1b()] * 3
    iterations = [replace(iteration, on_host_time=False) for iteration in lay_out(pieces)]
    assert solve_powers(iterations, read_counter(pieces)) is None


def test_a_counter_that_looks_away() -> None:
    """Told how much of its period it measures, powers are right; otherwise their scatter is a good part wider."""
    told_errors, untold_errors = [], []
    for seed in range(20):
        iterations, random = noisy(seed, 6)
        readings = read_counter(iterations, window_s=0.025, random=random)
        for errors, window_s in ((told_errors, 0.025), (untold_errors, 0.0)):
            powers = solve_powers(lay_out(iterations), readings, window_s)
            assert powers is not None
            errors += [powers.instructions[FORWARD].power_w / 300 - 1, powers.waiting.power_w / 80 - 1]
    assert abs(np.mean(told_errors)) < 0.02
    assert np.std(told_errors) < 0.4 * np.std(untold_errors)
