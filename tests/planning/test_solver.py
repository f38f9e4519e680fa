"""The solvers: what they answer satisfies the conditions of optimality, and an independent linear program agrees."""

from __future__ import annotations

import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array

from perseus_core.errors import InputError
from perseus_core.planning.curves import TradeoffCurve
from perseus_core.planning.dag import Dag
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.problem import PipelineProblem, Problem
from perseus_core.planning.profile import Measurement, Profile
from perseus_core.planning.schedule import InstructionType, Kind, Schedule, interleaved, one_f_one_b, zb_h1
from perseus_core.planning.solver import solve, solve_at, trace
from perseus_core.planning.steady_state import long_frontier, solve_long

PROFILES = Path(__file__).parents[3] / "shared/data/sosp24/stage_profile"


@st.composite
def curves(draw: st.DrawFn) -> TradeoffCurve:
    """A convex falling curve of one to five clocks; whole numbers, so that slopes and path lengths often tie."""
    steps = draw(st.lists(st.integers(1, 4), max_size=4))
    slopes = sorted(draw(st.lists(st.integers(1, 6), min_size=len(steps), max_size=len(steps))), reverse=True)
    steep = draw(st.sampled_from([1, 1, 1, 1e-4, 1e5]))
    times = np.cumsum([draw(st.integers(1, 6)), *steps]).astype(float)
    costs = 1 + steep * np.append(np.cumsum((np.array(slopes) * steps)[::-1])[::-1], 0)
    return TradeoffCurve(tuple(range(1500, 1500 - len(times), -1)), tuple(times), tuple(costs), 0.0)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any DAG of one to nine instructions, with latencies or without, and curves that several may share."""
    n = draw(st.integers(1, 9))
    pairs = [(i, j) for j in range(n) for i in range(j)]
    chosen = draw(st.lists(st.sampled_from(pairs), max_size=16)) if pairs else []
    latency = draw(st.lists(st.sampled_from([0.0, 0.0, 1.0, 0.3]), min_size=len(chosen), max_size=len(chosen)))
    before, after = np.array(chosen, np.int32).reshape(-1, 2).T
    of = tuple(draw(st.lists(curves(), min_size=1, max_size=4)))
    curve_of = draw(st.lists(st.integers(0, len(of) - 1), min_size=n, max_size=n))
    power = draw(st.sampled_from([0.0, 0.0, 0.5, 3.0]))
    return Problem(Dag(n, before, after, np.array(latency)), of, np.array(curve_of), power)


def least_energy_j(problem: Problem, iteration_time_s: float) -> float:
    """The same problem as a linear program: a start, a duration and a cost above every segment for each instruction."""
    n, dag = problem.dag.num_instructions, problem.dag
    rows: list[tuple[dict[int, float], float]] = []
    for before, after, latency in zip(dag.predecessor, dag.successor, dag.latency_s, strict=True):
        rows.append(({before: 1.0, n + before: 1.0, after: -1.0}, -latency))
    bounds: list[tuple[float, float]] = [(0, iteration_time_s)] * n
    for i in range(n):
        rows.append(({i: 1.0, n + i: 1.0}, iteration_time_s))
        curve = problem.curves[problem.curve_of[i]]
        times, costs = np.asarray(curve.times_s)[curve.hull], curve.effective_energies_j[curve.hull]
        bounds.append((times[0], times[-1]))
        for slope, time, cost in zip(np.diff(costs) / np.diff(times), times, costs, strict=False):
            rows.append(({n + i: slope, 2 * n + i: -1.0}, slope * time - cost))
    bounds += [(float(problem.curves[c].effective_energies_j[-1]), np.inf) for c in problem.curve_of]
    row, column, value = zip(*((r, c, v) for r, (terms, _) in enumerate(rows) for c, v in terms.items()), strict=True)
    matrix = coo_array((value, (row, column)), shape=(len(rows), 3 * n)).tocsr()
    objective = np.repeat([0.0, 0.0, 1.0], n)
    answer = linprog(objective, matrix, [limit for _, limit in rows], bounds=bounds, method="highs")
    assert answer.status == 0, answer.message
    return float(problem.iteration_energy_j(answer.fun, iteration_time_s))


def some_times_s(frontier: Frontier[Problem], count: int) -> NDArray[np.float64]:
    return np.linspace(frontier.fastest_time_s, frontier.min_energy_time_s, count)


@given(problems())
def test_frontier_is_convex_and_falls(problem: Problem) -> None:
    """Times rise, energies do not, and each second saves less than the one before."""
    frontier = solve(problem)
    scale = abs(frontier.energies_j).max()
    assert (np.diff(frontier.times_s) > 0).all()
    assert (np.diff(frontier.energies_j) <= 1e-12 * scale).all()
    # Least steep at the slow end.
    power_w = frontier.marginal_power_w
    assert (np.diff(power_w) <= 1e-9 * (power_w.max(initial=0) + problem.blocking_power_w)).all()


@given(problems())
def test_flow_proves_the_fastest_point(problem: Problem) -> None:
    """The flow is conserved, keeps the bounds that each duration sets, and its value is the slope."""
    frontier, proof = trace(problem)
    nodes = proof.sink + 1
    balance = np.bincount(proof.head, proof.flow_w, nodes) - np.bincount(proof.tail, proof.flow_w, nodes)
    tolerance = 1e-9 * max(1.0, proof.flow_w.max())
    assert abs(balance[: proof.source]).max() <= tolerance
    assert (proof.flow_w >= 0).all()
    if len(frontier.times_s) > 1:
        slope_w = frontier.marginal_power_w[0] + problem.blocking_power_w
        assert balance[proof.sink] >= slope_w * (1 - 1e-6) - tolerance
    between = proof.moments_s[proof.head] - proof.moments_s[proof.tail]
    instructions = problem.dag.num_instructions
    edges = slice(instructions, instructions + len(problem.dag.predecessor))
    slack = between[edges] - problem.dag.latency_s
    assert (slack >= -1e-9).all()
    assert (proof.flow_w[edges][slack > 1e-9] == 0).all()
    for i in range(instructions):
        curve = problem.curves[problem.curve_of[i]]
        times, costs = np.asarray(curve.times_s)[curve.hull], curve.effective_energies_j[curve.hull]
        slopes = np.concatenate([[np.inf], -np.diff(costs) / np.diff(times), [0.0]])
        assert between[i] >= times[0] - 1e-9
        left, right = np.searchsorted(times, between[i] - 1e-9), np.searchsorted(times, between[i] + 1e-9)
        assert slopes[right] - tolerance <= proof.flow_w[i] <= slopes[left] + tolerance


@given(problems())
def test_cut_value_is_the_slope_everywhere(problem: Problem) -> None:
    """Stopped early, the flow that is left carries the marginal power of the segment where it stopped."""
    frontier = solve(problem)
    for k in range(min(3, len(frontier.times_s) - 1)):
        middle_s = (frontier.times_s[k] + frontier.times_s[k + 1]) / 2
        proof = trace(problem, until_s=middle_s)[1]
        value = proof.flow_w[proof.head == proof.sink].sum()
        # Waiting costs the blocking power; the flow is what lengthening saves beyond that.
        assert value == pytest.approx(frontier.marginal_power_w[k] + problem.blocking_power_w, rel=1e-6)


@given(problems())
def test_durations_take_their_time_and_energy(problem: Problem) -> None:
    """At stored vertices the critical path is T and the curves add up to the energy."""
    frontier = solve(problem, plan_tolerance=0.0)
    for k in frontier.stored:
        durations = frontier.durations_s(frontier.times_s[k])
        assert problem.dag.iteration_time_s(durations) == pytest.approx(frontier.times_s[k], rel=1e-6)
        energy = problem.iteration_energy_j(problem.effective_energy_j(durations), frontier.times_s[k])
        assert float(energy) == pytest.approx(frontier.energies_j[k], rel=1e-6)


@given(problems())
@settings(max_examples=60)
def test_linear_program_agrees(problem: Problem) -> None:
    """An independent solver of another formulation finds the same energy at several times."""
    frontier = solve(problem)
    for time_s in some_times_s(frontier, 4):
        assert frontier.energy_j(time_s) == pytest.approx(least_energy_j(problem, time_s), rel=1e-6, abs=1e-6)


@given(problems(), st.floats(0.0, 1.0))
def test_a_stop_ends_on_the_same_frontier(problem: Problem, share: float) -> None:
    """`until_s` gives the part of the whole frontier that is not faster."""
    whole = solve(problem)
    time_s = whole.fastest_time_s + share * (whole.min_energy_time_s - whole.fastest_time_s)
    part = solve(problem, until_s=time_s)
    assert part.fastest_time_s == pytest.approx(time_s, rel=1e-12)
    for t in some_times_s(part, 5):
        assert part.energy_j(t) == pytest.approx(whole.energy_j(t), rel=1e-9)


@given(problems(), st.sampled_from([1e-3, 1e-6, 1e9]))
def test_unit_of_energy_does_not_matter(problem: Problem, unit: float) -> None:
    """Millijoules, megajoules or less: the same times, the same plans."""
    other = replace(
        problem,
        curves=tuple(replace(c, energies_j=tuple(unit * e for e in c.energies_j)) for c in problem.curves),
        blocking_power_w=unit * problem.blocking_power_w,
    )
    a, b = solve(problem), solve(other)
    for time_s in some_times_s(a, 5):
        assert b.energy_j(max(time_s, b.fastest_time_s)) == pytest.approx(unit * a.energy_j(time_s), rel=1e-9)
    assert b.min_energy_time_s == pytest.approx(a.min_energy_time_s, rel=1e-9)


@given(problems())
def test_slow_end_is_where_lengthening_stops_to_pay(problem: Problem) -> None:
    """Before T* each second saves energy; beyond it none does."""
    frontier = solve(problem)
    power, slowest_s = problem.blocking_power_w, problem.dag.iteration_time_s(problem.slowest_s)
    assert (frontier.marginal_power_w >= -1e-9 * max(1.0, power)).all()
    beyond_s = 1.001 * frontier.min_energy_time_s
    if beyond_s < slowest_s:
        least = least_energy_j(problem, beyond_s)
        assert least >= frontier.energies_j[-1] * (1 - 1e-7)


@given(problems(), st.floats(0.0, 1.2))
def test_one_point_agrees_with_the_frontier(problem: Problem, share: float) -> None:
    """`solve_at` finds the frontier's energy within the gap that it proves, with durations that keep the time."""
    frontier = solve(replace(problem, blocking_power_w=0.0))
    time_s = frontier.fastest_time_s + share * (frontier.min_energy_time_s - frontier.fastest_time_s)
    point = solve_at(frontier.problem, time_s, gap=1e-9)
    exact = frontier.energy_j(time_s)
    scale = max(1e-3, abs(point.energy_j))
    assert point.bound_j - 1e-8 * scale <= exact <= point.energy_j + 1e-8 * scale
    assert point.energy_j - point.bound_j <= 1e-7 * scale
    assert problem.dag.iteration_time_s(point.durations_s) <= time_s * (1 + 1e-12)


def test_one_instruction_walks_its_curve() -> None:
    """Without a pipeline the frontier is the curve itself."""
    curve = TradeoffCurve((3, 2, 1), (1.0, 2.0, 4.0), (10.0, 5.0, 1.0), 0.0)
    alone = Problem(Dag(1, np.empty(0), np.empty(0), np.empty(0)), (curve,), np.zeros(1), 0.0)
    frontier = solve(alone)
    assert frontier.times_s == pytest.approx([1.0, 2.0, 4.0])
    assert frontier.energies_j == pytest.approx([10.0, 5.0, 1.0])
    assert solve_at(alone, 3.0).energy_j == pytest.approx(3.0)


def test_nothing_to_choose_is_one_point() -> None:
    """With one clock each, the fastest point is also the cheapest."""
    fixed = TradeoffCurve((1410,), (1.0,), (10.0,), 0.0)
    chain = Problem(Dag(2, np.array([0]), np.array([1]), np.array([0.5])), (fixed,), np.zeros(2), 2.0)
    frontier = solve(chain)
    assert frontier.times_s == pytest.approx([2.5])
    assert frontier.energies_j == pytest.approx([25.0])
    assert solve_at(chain).energy_j == pytest.approx(25.0)


def test_slopes_may_differ_by_nine_orders() -> None:
    """A raw, noisy table's absurdly steep segment hides none of the others."""
    wild = TradeoffCurve((4, 3, 2, 1), (1.0, 1.0 + 1e-9, 2.0, 3.0), (12.0, 11.0, 10.5, 10.4), 0.0)
    chain = Problem(Dag(2, np.array([0]), np.array([1]), np.zeros(1)), (wild,), np.zeros(2), 0.0)
    frontier = solve(chain)
    for time_s in (2.5, 3.5, 5.0, 6.0):
        assert frontier.energy_j(time_s) == pytest.approx(least_energy_j(chain, time_s), rel=1e-6)


def pipeline(num_stages: int, num_microbatches: int) -> PipelineProblem:
    """Stages that differ by some per cent, nine clocks each."""
    lines = [
        (
            stage,
            kind,
            clock,
            work * (1 + 0.01 * (stage * 7 % 5)) * 1410 / clock,
            work * (100 + (1 + 0.01 * stage) * (clock / 300) ** 3),
        )
        for stage in range(num_stages)
        for kind, work in (("forward", 1.0), ("backward", 2.0))
        for clock in range(1410, 1005, -45)
    ]
    profile = Profile(tuple(Measurement(InstructionType(s, 0, Kind(k)), c, t, e) for s, k, c, t, e in lines))
    return PipelineProblem.of(profile, one_f_one_b(num_stages, num_microbatches), 20.0)


def long_run() -> PipelineProblem:
    """One that the solver works on for a tenth of a second or more."""
    return pipeline(16, 96)


@pytest.mark.parametrize("slowdown", [None, 1.1])
def test_long_iterations_are_unrolled_right(slowdown: float | None) -> None:
    """What is made of a short iteration's middle is as cheap as the frontier of the whole."""
    whole = solve(pipeline(3, 40))
    time_s = None if slowdown is None else slowdown * whole.fastest_time_s
    point = solve_long(lambda m: pipeline(3, m), 40, time_s, gap=1e-8)
    assert point.energy_j == pytest.approx(whole.energy_j(point.iteration_time_s), rel=1e-7)
    assert point.gap <= 1e-7


def test_two_short_frontiers_give_the_long_one() -> None:
    """At one marginal power, each further microbatch adds the same time and the same energy."""
    shorter, short, long = (solve(pipeline(3, m)) for m in (24, 36, 72))
    times_s, energies_j = long_frontier(shorter, short, 72)
    assert times_s[[0, -1]] == pytest.approx([long.fastest_time_s, long.min_energy_time_s], rel=1e-9)
    exact = [long.energy_j(max(time_s, long.fastest_time_s)) for time_s in times_s]
    assert energies_j == pytest.approx(exact, rel=1e-9)


def test_a_time_out_of_reach_is_refused() -> None:
    """The message names the fastest time."""
    with pytest.raises(InputError, match="fastest is"):
        solve_at(pipeline(2, 4), 1.0)


@pytest.mark.parametrize("solver", [solve, solve_at])
def test_progress_is_reported_and_may_stop_the_run(solver: object) -> None:
    """Shares lie between 0 and 1, and an exception in the callback comes out of the solver."""
    problem = long_run()
    seen: list[float] = []
    solver(problem, progress=seen.append)  # type: ignore[operator]
    assert seen and all(0 <= share <= 1 for share in seen)

    def stop(share: float) -> None:
        raise ZeroDivisionError(share)

    with pytest.raises(ZeroDivisionError):
        solver(problem, progress=stop)  # type: ignore[operator]


def test_interrupt_stops_the_run_and_leaves_the_solver_usable() -> None:
    """Ctrl-C comes out as KeyboardInterrupt within the run."""
    problem = long_run()
    with pytest.raises(KeyboardInterrupt):
        solve(problem, progress=lambda share: signal.raise_signal(signal.SIGINT))
    assert solve(pipeline(2, 4)).fastest_time_s > 0


def test_other_threads_run_meanwhile() -> None:
    """The solver does not hold Python's global lock, and two may solve at once."""
    problem = pipeline(8, 64)
    expected = solve(problem).energies_j
    answers: list[NDArray[np.float64]] = []
    threads = [threading.Thread(target=lambda: answers.append(solve(problem).energies_j)) for _ in range(2)]
    for thread in threads:
        thread.start()
    turns = 0
    while any(thread.is_alive() for thread in threads):
        turns += 1
    for thread in threads:
        thread.join()
    assert turns > 0
    assert all((answer == expected).all() for answer in answers) and len(answers) == 2


@pytest.mark.parametrize(
    ("name", "power_w"), [("gpt3-175b+a100_sxm_bf16.csv", 83.64), ("bloom+a40_bf16.csv", 70.38)], ids=["gpt3", "bloom"]
)
@pytest.mark.parametrize("case", ["1f1b", "interleaved", "zb-h1"])
def test_linear_program_agrees_on_measured_profiles(name: str, power_w: float, case: str) -> None:
    """On published profiles too, for every kind of schedule, with both solvers."""
    if not (PROFILES / name).exists():
        pytest.skip(f"{PROFILES / name} is absent")
    profile = Profile.load(PROFILES / name)
    prepared: dict[str, tuple[Profile, Schedule]] = {
        "1f1b": (profile, one_f_one_b(8, 12)),
        "interleaved": (profile.divided_into_chunks(2), interleaved(8, 16, 2)),
        "zb-h1": (profile.with_split_backward(), zb_h1(8, 12)),
    }
    problem = PipelineProblem.of(*prepared[case], power_w)
    frontier = solve(problem)
    for time_s in some_times_s(frontier, 3):
        least = least_energy_j(problem, time_s)
        assert frontier.energy_j(time_s) == pytest.approx(least, rel=1e-6)
        assert solve_at(problem, time_s, gap=1e-8).bound_j == pytest.approx(least, rel=1e-6)
