"""What the ranks of the tests' jobs do. Each function runs on every rank; what it returns goes back as JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from perseus_core.gpu.simulated import open_node
from perseus_ds import session_of
from perseus_ds.simulated_work import occupy_simulated_gpus
from tests.deepspeed import until
from tests.deepspeed.until import iterations_until, phase_of, plan_of, under_plans
from tests.recording_session import RecordingSession

# What DeepSpeed and our hooks import when training starts: the server of jobs does it once.
IMPORTED_LATER = (
    "torch._dynamo",
    "deepspeed.ops",
    "deepspeed.module_inject.auto_ep_config",
    "perseus_ds.start",
    "perseus_core.runtime.opening",
)

WIDTH = 8


def start() -> None:
    """What DeepSpeed wants on the CPU."""
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")


def stop() -> None:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def tied_linear(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return x @ layer.weight


def make_engine(
    config: dict[str, Any], stages: int, *, model_parallel: int = 1, tied: bool = False, checkpointing: bool = False
) -> Any:
    """A pipeline of linear layers."""
    torch.manual_seed(7)
    layers: list[Any] = [LayerSpec(torch.nn.Linear, WIDTH, WIDTH) for _ in range(2 * stages)]
    if tied:
        layers[0] = TiedLayerSpec("ends", torch.nn.Linear, WIDTH, WIDTH, bias=False)
        layers[-1] = TiedLayerSpec("ends", torch.nn.Linear, WIDTH, WIDTH, bias=False, forward_fn=tied_linear)
    data_parallel = torch.distributed.get_world_size() // stages // model_parallel
    model = PipelineModule(
        layers,
        topology=PipeModelDataParallelTopology(num_pp=stages, num_mp=model_parallel, num_dp=data_parallel),
        loss_fn=torch.nn.functional.mse_loss,
        partition_method="uniform",
        activation_checkpoint_interval=1 if checkpointing else 0,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def data(engine: Any) -> Any:
    generator = torch.Generator().manual_seed(engine.grid.data_parallel_id)
    dtype = next(engine.module.parameters()).dtype
    while True:
        yield torch.randn(2, WIDTH, generator=generator).to(dtype), torch.randn(2, WIDTH, generator=generator).to(dtype)


def batch_config(microbatches: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": microbatches,
        "steps_per_print": 10_000,
        **more,
    }


def train(engine: Any, batches: Any) -> None:
    """The first training batch, which is not followed, and the first that is."""
    for _ in range(2):
        engine.train_batch(batches)


def record() -> list[RecordingSession]:
    """Has every session that would be opened replaced by a recording one; returns them as they come."""
    from perseus_ds import start as perseus_start

    sessions: list[RecordingSession] = []

    def open_recording(engine: Any, settings: Any, pipe_schedule: Any) -> RecordingSession:
        sessions.append(RecordingSession())
        return sessions[-1]

    perseus_start.open_engine_session = open_recording  # type: ignore[assignment]
    return sessions


ENABLED = {"perseus": {"enabled": True}}
BF16 = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}


def record_many_engines() -> dict[str, Any]:
    """Batches of engines of many kinds, one after the other, on 4 ranks; returns what was recorded of each."""
    start()
    sessions = record()
    recorded: dict[str, Any] = {}

    def run(name: str, stages: int, config: dict[str, Any], *, evaluate: bool = False, **model: Any) -> None:
        engine = make_engine({**config, **ENABLED}, stages, **model)
        batches = data(engine)
        if evaluate:
            engine.eval_batch(batches)  # before the session is opened
        train(engine, batches)
        if evaluate:
            engine.eval_batch(batches, num_micro_batches=3)
        engine.set_train_batch_size(engine.train_batch_size() * 2)
        engine.train_batch(batches)
        recorded[name] = {"stage": engine.stage_id, "iterations": sessions[-1].iterations}
        engine.destroy()
        recorded[name]["closed"] = sessions[-1].closed

    run("pp4", 4, batch_config(6), evaluate=True)
    run("pp4 of 2 microbatches", 4, batch_config(2))
    run("pp2 x dp2, bf16, zero-1", 2, batch_config(4, **BF16))
    run("pp2 x mp2", 2, batch_config(4), model_parallel=2)
    run("tied", 4, batch_config(4), tied=True)
    run("checkpointing", 4, batch_config(4, pipeline={"use_reentrant": False}), checkpointing=True)
    run("pp1 x dp4", 1, batch_config(4))
    recorded["dualpipev"] = record_dualpipev(sessions)
    recorded["exhausted"] = record_exhausted_data(sessions)
    stop()
    return recorded


def make_dualpipev_engine(config: dict[str, Any], stages: int) -> Any:
    """A pipeline of linear layers in a V."""
    from deepspeed.runtime.pipe.dualpipev import DualPipeVModule

    torch.manual_seed(7)
    module = DualPipeVModule(
        [LayerSpec(torch.nn.Linear, WIDTH, WIDTH) for _ in range(2 * stages)],
        num_stages=stages,
        loss_fn=torch.nn.functional.mse_loss,
        partition_method="uniform",
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


def record_dualpipev(sessions: list[RecordingSession]) -> dict[str, Any]:
    from perseus_ds.extraction import schedule_factory

    engine = make_dualpipev_engine({**batch_config(8), **ENABLED}, 4)
    train(engine, data(engine))
    extracted = schedule_factory(engine._train_schedule())(8).stages[engine.stage_id]
    engine.destroy()
    return {
        "iterations": sessions[-1].iterations,
        "extracted": [[i.chunk, i.microbatch, i.kind.value] for i in extracted],
    }


def record_exhausted_data(sessions: list[RecordingSession]) -> dict[str, Any]:
    """A pipeline of one stage, so that the others need not be told that the data have run out."""
    engine = make_engine({**batch_config(4), **ENABLED}, 1)
    batches = data(engine)
    train(engine, batches)
    try:
        engine.train_batch(iter([next(batches)]))
    except StopIteration:
        error = "StopIteration"
    engine.destroy()
    return {"error": error, "ended": sessions[-1].iterations[-1]["ended"]}


# Wide tolerances: on a busy machine processes run late, and these tests are about what happens, not how well.
QUICK = {
    "enabled": True,
    "profile_cache": "off",
    "warmup_iterations": 1,
    "baseline_iterations": 3,
    "profile_clocks": 2,
    "profile_iterations": 1,
    "watch_iterations": 3,
    "tolerance": 0.5,
    "slow_gpu": 0.95,
}


@contextmanager
def occupied_gpus() -> Iterator[None]:
    """Passes occupy the simulated GPUs, of engines that are made meanwhile."""
    from deepspeed.runtime.pipe.engine import PipelineEngine

    classes = [PipelineEngine, *PipelineEngine.__subclasses__()]
    before = [(instructions, dict(instructions)) for c in classes if (instructions := vars(c).get("_INSTRUCTION_MAP"))]
    occupy_simulated_gpus()
    try:
        yield
    finally:
        for instructions, functions in before:
            instructions.update(functions)


def losses_under_plan(config: dict[str, Any], stages: int, iterations: int) -> tuple[list[float], int]:
    """Losses of a job until so many of its iterations have run under its plan, and the number of its newest plan."""
    engine = make_engine(config, stages)
    batches = data(engine)
    values: list[float] = []
    plans: list[int] = []
    for _ in iterations_until(lambda: under_plans(plans) >= iterations):
        values.append(engine.train_batch(batches).item())
        plans.append(plan_of(session_of(engine)))
    engine.destroy()
    return values, max(plans)


def losses(config: dict[str, Any], stages: int, iterations: int) -> list[float]:
    """Losses of a job."""
    engine = make_engine(config, stages)
    batches = data(engine)
    values = [engine.train_batch(batches).item() for _ in range(iterations)]
    engine.destroy()
    return values


def losses_with_and_without(under_plan: int) -> dict[str, Any]:
    """Losses in some layouts, with the block until a plan has run for so many iterations, and as many without it."""
    start()
    compared = {}
    for name, stages, config in (
        ("pp4", 4, batch_config(4)),
        ("pp2 x dp2", 2, batch_config(4)),
        ("pp2 x dp2, bf16, zero-1", 2, batch_config(4, **BF16)),
    ):
        with occupied_gpus():
            under, plan = losses_under_plan({**config, "perseus": QUICK}, stages, under_plan)
        compared[name] = {"with": under, "plan": plan, "without": losses(config, stages, len(under))}
    stop()
    return compared


def train_under_a_plan(
    config: dict[str, Any], stages: int, under_plan: int, *, dualpipev: bool = False, monitored: str = ""
) -> dict[str, Any]:
    """A whole job; returns the session's view after each iteration and at the end.

    Args:
        config: DeepSpeed's.
        stages: of the pipeline.
        under_plan: how many iterations run under the plan.
        dualpipev: whether it is a V.
        monitored: the job goes on until this file is there, too.
    """
    start()
    occupy_simulated_gpus()
    engine = make_dualpipev_engine(config, stages) if dualpipev else make_engine(config, stages)
    batches = data(engine)
    phases: list[str] = []
    plans: list[int] = []

    def is_enough() -> bool:
        return until.under_newest_plan(plans) >= under_plan and (not monitored or Path(monitored).exists())

    for _ in iterations_until(is_enough):
        engine.train_batch(batches)
        phases.append(phase_of(session_of(engine)))
        plans.append(plan_of(session_of(engine)))
    session = session_of(engine)
    status = dataclasses.asdict(session.status())
    status["phase"] = status["phase"].value
    microbatches = config["gradient_accumulation_steps"]
    planned_mhz = until.planned_clocks_mhz(session, microbatches) if plans[-1] else []
    result = {"stage": engine.stage_id, "phases": phases, "plans": plans, "status": status, "planned_mhz": planned_mhz}
    stop()
    return result


def faults() -> dict[str, Any]:
    """One thing after another that must not hurt the training; returns what was seen of each."""
    start()
    occupy_simulated_gpus()
    seen: dict[str, Any] = {}
    config = {**batch_config(4), "perseus": QUICK}

    # Engines without a pipeline
    for name, block in (("no pipeline", QUICK), ("no pipeline, not enabled", {"enabled": False})):
        model = torch.nn.Linear(WIDTH, WIDTH)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        plain, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={**config, "perseus": block})
        loss = plain(torch.ones(2, WIDTH)).sum()
        plain.backward(loss)
        seen[name] = loss.item()

    reference = losses(batch_config(4), 2, 8)

    # A typo in the block
    try:
        make_engine({**batch_config(4), "perseus": {"enabled": True, "max_slowdwon": 0.1}}, 2)
    except Exception as error:
        seen["typo"] = str(error)

    # An exception inside our hook
    engine = make_engine(config, 2)
    batches = data(engine)
    values = []
    for iteration in range(8):
        if iteration == 4:
            session = session_of(engine)
            session.begin_instruction = _raise
        values.append(engine.train_batch(batches).item())
    seen["broken hook"] = {
        "same losses": values == reference,
        "hooks are off": "_INSTRUCTION_MAP" not in vars(engine) and "_exec_schedule" not in vars(engine),
    }
    engine.destroy()

    # A second engine beside one that is followed
    first, second = make_engine(config, 2), make_engine(config, 2)
    firsts, seconds = data(first), data(second)
    values = []
    for _ in range(4):
        first.train_batch(firsts)
        values.append(second.train_batch(seconds).item())
    seen["second engine"] = {
        "same losses": values == reference[:4],
        "followed": [session_of(first) is not None, session_of(second) is not None],
    }
    first.destroy()
    second.destroy()

    # A DeepSpeed that differs
    from deepspeed.runtime.pipe.engine import PipelineEngine

    execute_schedule = PipelineEngine._exec_schedule
    PipelineEngine._exec_schedule = lambda self, pipe_schedule: execute_schedule(self, pipe_schedule)
    seen["differs"] = losses(config, 2, 4) == reference[:4]
    PipelineEngine._exec_schedule = execute_schedule
    stop()
    return seen


def _raise(*_: Any, **__: Any) -> None:
    raise RuntimeError("broken on purpose")


def job_without_plan(perseus: dict[str, Any]) -> dict[str, Any]:
    """A job of 2 ranks until its session has measured only for a while; returns the phases it was in."""
    start()
    occupy_simulated_gpus()
    engine = make_engine({**batch_config(4), "perseus": perseus}, 2)
    batches = data(engine)
    phases: list[str] = []
    for _ in iterations_until(lambda: phases.count("measure only") >= 4):
        engine.train_batch(batches)
        phases.append(phase_of(session_of(engine)))
    stop()
    return {"phases": phases}


def killed_job(perseus: dict[str, Any]) -> None:
    """Rank 1 of 2 is killed at the beginning of a batch as soon as its clock is locked."""
    start()
    occupy_simulated_gpus()
    engine = make_engine({**batch_config(4), "perseus": perseus}, 2)
    gpu = open_node().gpus[engine.local_rank]
    batches = data(engine)
    for _ in iterations_until(lambda: False):
        locked_mhz = gpu.state().locked_mhz
        if engine.global_rank == 1 and locked_mhz:
            print(f"killed while its clock is locked to {locked_mhz}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        engine.train_batch(batches)


def checkpointed_job(perseus: dict[str, Any], checkpoint: str, resume: bool) -> dict[str, Any]:
    """A job of 2 ranks until its plan runs, that goes on from a checkpoint or makes one at its end."""
    start()
    occupy_simulated_gpus()
    engine = make_engine({**batch_config(4), "perseus": perseus}, 2)
    batches = data(engine)
    if resume:
        engine.load_checkpoint(checkpoint)
    phases: list[str] = []
    plans: list[int] = []
    for _ in iterations_until(lambda: under_plans(plans) >= 2):
        engine.train_batch(batches)
        phases.append(phase_of(session_of(engine)))
        plans.append(plan_of(session_of(engine)))
    if not resume:
        engine.save_checkpoint(checkpoint)
    stop()
    return {"phases": phases, "plans": plans}


def run_configs(paths: list[str]) -> dict[str, Any]:
    """Every ready-made config as it is, but for the size of its batch; returns what was understood of it."""
    start()
    occupy_simulated_gpus()
    os.chdir(os.environ["PERSEUS_TEST_FOLDER"])  # files that a config names lie where the job runs
    seen = {}
    for path in paths:
        config = json.loads(Path(path).read_text())
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
            config.pop(key, None)
        config.update(batch_config(4))
        engine = make_engine(config, 2)
        batches = data(engine)
        is_open = functools.partial(_is_open, engine)
        values = [engine.train_batch(batches).item() for _ in iterations_until(is_open, least=3)]
        session = session_of(engine)
        settings = session._settings
        seen[path] = {
            "losses": values,
            "phase": session.status().phase.value,
            "max_slowdown": settings.max_slowdown,
            "measure_only": settings.measure_only,
        }
        engine.destroy()
    stop()
    return seen


def _is_open(engine: Any) -> bool:
    return phase_of(session_of(engine)) not in ("", "opening")
