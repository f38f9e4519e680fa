"""What the ranks of the tests' jobs do. Each function runs on every rank; what it returns goes back as JSON."""

from __future__ import annotations

import argparse
import functools
import os
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, rerun_state_machine
from megatron.core.pipeline_parallel import schedules

import perseus_megatron
from demo.megatron_gpt import Sizes, Training
from perseus_core.gpu.simulated import open_node
from perseus_megatron import activation, training_hooks
from perseus_megatron.flags import settings_of
from perseus_megatron.schedule_hooks import combined_1f1b
from perseus_megatron.simulated_work import occupy_simulated_gpus
from tests.conftest import REPOSITORY
from tests.deepspeed.until import agreed, iterations_until, phase_of, plan_of, planned_clocks_mhz, under_plans
from tests.megatron import cpu_megatron, faults
from tests.recording_session import RecordingSession

# What our hooks import when training starts: the server of jobs does it once.
IMPORTED_LATER = ("perseus_megatron.session_opening", "perseus_core.runtime.opening")

TEXT = REPOSITORY / "LICENSE"
FIGURES = {"iteration_time_s", "energy_j", "saving"}


def start() -> None:
    """What Megatron wants on the CPU."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    cpu_megatron.install()


def stop() -> None:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def record() -> list[dict[str, Any]]:
    """Has every session that would be opened replaced by a recording one; returns what each was opened with."""
    from perseus_megatron import following, session_opening

    opened: list[dict[str, Any]] = []

    def open_recording(settings: Any, layout: Any, *sizes: Any, metric: Any) -> RecordingSession:
        opened.append({"layout": layout, "sizes": sizes[1:], "session": RecordingSession()})
        return opened[-1]["session"]

    following.has_gpus_for = lambda device: True  # type: ignore[assignment]
    session_opening.open_training_session = open_recording  # type: ignore[assignment]
    return opened


def record_layouts() -> dict[str, Any]:
    """Trains and evaluates in many layouts, one after the other; returns what was recorded of each."""
    start()
    opened = record()
    recorded: dict[str, Any] = {}

    def run(name: str, sizes: Sizes, microbatches: tuple[int, ...]) -> None:
        training = Training(sizes, TEXT)
        followed = perseus_megatron.enable({"enabled": True}, training.model)
        training.evaluate(microbatches[0])  # before the session is opened
        training.step(microbatches[0])
        for number in microbatches:
            training.step(number)
        training.evaluate(microbatches[0])
        followed.close()
        recorded[name] = {
            "stage": opened[-1]["layout"].stage,
            "pipeline": opened[-1]["layout"].pipeline,
            "sizes": opened[-1]["sizes"],
            "iterations": opened[-1]["session"].iterations,
            "closed": opened[-1]["session"].closed,
        }
        parallel_state.destroy_model_parallel()

    run("pp4", Sizes(4), (6, 2, 9))
    run("pp4 uneven", Sizes(4, layers_per_chunk=2, layers_at_ends=1), (5,))
    run("pp4 vpp2", Sizes(4, chunks=2), (4, 8))
    run("pp2 dp2", Sizes(2), (4, 6))
    run("pp2 dp2 vpp2", Sizes(2, chunks=2), (4, 6))
    run("pp2 tp2", Sizes(2, tensor_parallel=2), (3,))
    run("pp2 cp2", Sizes(2, context_parallel=2), (3,))
    run("pp1", Sizes(1), (3, 1))
    if combined_1f1b() is not None:
        run("pp2 vpp2 ep2", Sizes(2, chunks=2, expert_parallel=2), (4, 6))
    stop()
    return recorded


def record_reruns(microbatches: int) -> dict[str, Any]:
    """Trains two steps; Megatron's rerun machine doubts the loss of the second, and so has it computed twice."""
    start()
    reference = Training(Sizes(2), TEXT)
    losses_once = [reference.step(microbatches) for _ in range(2)]
    parallel_state.destroy_model_parallel()

    opened = record()
    rerun_state_machine.initialize_rerun_state_machine(mode=rerun_state_machine.RerunMode.VALIDATE_RESULTS)
    machine: Any = rerun_state_machine.get_rerun_state_machine()
    training = Training(Sizes(2), TEXT)
    training.data = [rerun_state_machine.RerunDataIterator(data) for data in training.data]
    followed = perseus_megatron.enable({"enabled": True}, training.model)
    losses = []
    for _ in range(2):
        with followed.step():
            while machine.should_run_forward_backward(training.data):
                loss = training.compute_gradients(microbatches)
                doubt = {"rejection_func": lambda loss: True, "message": "loss", "fatal": False}
                machine.validate_result(torch.tensor(loss), **doubt)
            machine.should_checkpoint_and_exit()
            training.optimizer.step()
        losses.append(loss)
    followed.close()
    stop()
    return {"iterations": opened[0]["session"].iterations, "losses": losses, "losses_once": losses_once}


def train(
    sizes: dict[str, int],
    microbatches: int,
    settings: dict[str, Any],
    *,
    iterations: int = 1,
    planned_iterations: int = 0,
    until_phase: str = "",
    fault: str = "",
    evaluate_every: int = 0,
    also_without: bool = False,
) -> dict[str, Any]:
    """Trains on simulated GPUs.

    Args:
        sizes: of the model and the job.
        microbatches: of an iteration.
        settings: the `perseus` block.
        iterations: how many at least.
        planned_iterations: goes on until so many have run under a plan, and what was measured under it has been told.
        until_phase: goes on until the session has been in this phase for some iterations.
        fault: name of a function of `tests.megatron.faults`: what happens as soon as all ranks' clocks are locked. The
            training does not end before.
        evaluate_every: iterations.
        also_without: trains the same afterwards without us.
    """

    def losses_of(training: Training, number: int) -> list[float]:
        losses = []
        for iteration in range(number):
            losses.append(training.step(microbatches))
            if evaluate_every and iteration % evaluate_every == 0:
                training.evaluate(microbatches)
        return losses

    start()
    rank = torch.distributed.get_rank()
    is_last = rank == torch.distributed.get_world_size() - 1
    training = Training(Sizes(**sizes), TEXT)
    hooks = occupy_simulated_gpus()
    losses: list[float] = []
    plans: list[int] = []
    phases: list[str] = []
    figures: list[list[Any]] = []
    faults_at: list[int] = []
    metric = (lambda name, value: figures.append([name, value])) if is_last else None
    followed = perseus_megatron.enable(settings, training.model, metric=metric)
    gpu = open_node().gpus[int(os.environ["LOCAL_RANK"])]

    def is_enough() -> bool:
        if fault and not faults_at:
            return False
        if until_phase and phases.count(until_phase) < 3:
            return False
        if not planned_iterations:
            return True
        return under_plans(plans) >= planned_iterations and (not is_last or {name for name, _ in figures} >= FIGURES)

    for iteration in iterations_until(is_enough, least=iterations):
        if fault and not faults_at and agreed(bool(gpu.state().locked_mhz)):
            faults_at.append(iteration)
            getattr(faults, fault)(followed)
        with followed.step():
            losses.append(training.step(microbatches))
        if evaluate_every and iteration % evaluate_every == 0:
            training.evaluate(microbatches)
        plans.append(plan_of(followed.session))
        phases.append(phase_of(followed.session))
    stage = parallel_state.get_pipeline_model_parallel_rank()
    result: dict[str, Any] = {
        "rank": rank,
        "stage": stage,
        "losses": losses,
        "plans": plans,
        "phases": phases,
        "figures": figures,
        "faults_at": faults_at,
        "planned_mhz": planned_clocks_mhz(followed.session, microbatches) if plans[-1] else [],
        "is_followed": followed.is_followed,
    }
    followed.close()
    if also_without:
        parallel_state.destroy_model_parallel()
        hooks.take_off()
        result["losses_without"] = losses_of(Training(Sizes(**sizes), TEXT), len(losses))
    stop()
    return result


def run_argument_files(paths: list[str]) -> dict[str, Any]:
    """Trains a few iterations under the flags of each file; returns what was made of them."""
    start()
    os.chdir(REPOSITORY)
    training_hooks.hook_training = lambda settings: None  # there is no `megatron.training` to hook
    seen: dict[str, Any] = {}
    for path in paths:
        parser = argparse.ArgumentParser()
        activation.add_flags(parser)
        settings = settings_of(parser.parse_args(Path(path).read_text().split()))
        training = Training(Sizes(2), TEXT)
        followed = perseus_megatron.enable(settings, training.model)
        is_open = functools.partial(_is_open, followed)
        losses = [training.step(2) for _ in iterations_until(is_open, least=3)]
        session: Any = followed.session
        seen[path] = {
            "losses": losses,
            "phase": session.status().phase.value,
            "max_slowdown": settings.max_slowdown,
            "measure_only": settings.measure_only,
        }
        followed.close()
        parallel_state.destroy_model_parallel()
    stop()
    return seen


def _is_open(followed: Any) -> bool:
    return phase_of(followed.session) not in ("", "opening")


def train_without_gpus() -> dict[str, Any]:
    """Three iterations on the CPU, with no simulated GPUs."""
    start()
    training = Training(Sizes(2), TEXT)
    followed = perseus_megatron.enable({"enabled": True}, training.model)
    for _ in range(3):
        training.step(2)
    stop()
    hooked = hasattr(schedules.forward_step, "__wrapped__")
    return {"is_followed": followed.is_followed, "hooked": hooked}
