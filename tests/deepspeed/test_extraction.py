from __future__ import annotations

from dataclasses import replace

import pytest
from deepspeed.runtime.pipe.schedule import DualPipeVSchedule, InferenceSchedule, TrainSchedule

from perseus_core.errors import InputError
from perseus_core.planning.dag import ComputationDag
from perseus_core.planning.schedule import Instruction, Kind, Placement, Schedule, one_f_one_b
from perseus_ds.extraction import schedule_factory


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_microbatches", [1, 2, 5, 8, 17])
def test_train_schedule_is_1f1b(num_stages: int, num_microbatches: int) -> None:
    """DeepSpeed's schedule, read from any stage, is canonical 1F1B on all stages."""
    schedule = schedule_factory(TrainSchedule(3, num_stages, num_stages - 1))(num_microbatches)
    assert schedule == one_f_one_b(num_stages, num_microbatches)


def test_dualpipev_has_two_chunks() -> None:
    """DualPipeV runs every microbatch forward and backward through two chunks on every stage."""
    schedule = schedule_factory(DualPipeVSchedule(8, 4, 0))(10)
    assert (schedule.name, schedule.num_chunks) == ("dualpipev", 2)
    for stage, order in enumerate(schedule.stages):
        everything = {
            Instruction(stage, chunk, microbatch, kind)
            for chunk in range(2)
            for microbatch in range(10)
            for kind in (Kind.FORWARD, Kind.BACKWARD)
        }
        assert set(order) == everything


@pytest.mark.parametrize("num_stages", [2, 4, 8])
def test_dualpipev_lies_in_a_v(num_stages: int) -> None:
    """It takes less time than 1F1B with the same layers on each stage; taken for a loop it would wait for itself."""
    num_microbatches = 2 * num_stages + 1

    def time_s(schedule: Schedule, layers: int) -> float:
        dag = ComputationDag.of(schedule)
        return dag.iteration_time_s([layers * (1 if i.kind is Kind.FORWARD else 2) for i in dag.instructions])

    schedule = schedule_factory(DualPipeVSchedule(num_microbatches, num_stages, 0))(num_microbatches)
    work_s = 2 * num_microbatches * (1 + 2)
    assert work_s < time_s(schedule, 1) < time_s(one_f_one_b(num_stages, num_microbatches), 2)
    with pytest.raises(InputError, match="cycle"):
        ComputationDag.of(replace(schedule, placement=Placement.LOOP))


def test_a_number_that_deepspeed_refuses_is_refused() -> None:
    """DualPipeV wants two microbatches per stage at least."""
    with pytest.raises(InputError, match="micro-batches"):
        schedule_factory(DualPipeVSchedule(8, 4, 0))(7)


def test_inference_has_forwards_only() -> None:
    """An inference schedule is forwards alone, in order."""
    schedule = schedule_factory(InferenceSchedule(4, 2, 0))(4)
    assert schedule.stages[1] == tuple(Instruction(1, 0, microbatch, Kind.FORWARD) for microbatch in range(4))
