"""What ranks send to rank 0, and what it makes of everybody's bytes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from perseus_core.errors import InputError
from perseus_core.planning.schedule import InstructionType, Kind
from perseus_core.runtime.measure.energy import ChunkKind, PowerEstimate
from perseus_core.runtime.measure.recorder import Step
from perseus_core.runtime.measure.stage_gpu import UNKNOWN_GPU, StageGpu, kind_of, kind_of_all
from perseus_core.runtime.measure.stage_measurements import (
    ClockMeasurements,
    InstructionMeasurement,
    StageMeasurements,
    SweepRows,
    merge,
)
from perseus_core.runtime.measure.stretch import Stretch
from perseus_core.runtime.replan.rank_report import JobReport, RankReport, traced_orders

FORWARD = InstructionType(2, 0, Kind.FORWARD)
ORDER: tuple[Step, ...] = tuple((0, m, kind) for m in range(8) for kind in (Kind.FORWARD, Kind.BACKWARD))
CLOCKS_MHZ = (1410, 1290, 1170, 1050, 930, 810, 720, 630)


def sweep(stage: int, *, slower: float = 1.0, clocks_mhz: Sequence[int] = CLOCKS_MHZ) -> StageMeasurements:
    return StageMeasurements(
        stage,
        tuple(
            ClockMeasurements(
                clock_mhz,
                tuple(
                    InstructionMeasurement(
                        ChunkKind(0, kind), slower * share / clock_mhz, 0.001, 16, PowerEstimate(300.0, 3.0, 1.0)
                    )
                    for kind, share in ((Kind.FORWARD, 50.0), (Kind.BACKWARD, 100.0))
                ),
                PowerEstimate(80.0, 2.0, 0.5),
                PowerEstimate(150.0, 10.0, 0.2),
                0.2,
                2,
            )
            for clock_mhz in clocks_mhz
        ),
    )


def stretched(rank: int, *stretches: Stretch) -> bytes:
    """The report of a rank of stage 2."""
    return RankReport(rank, StageMeasurements(2, ()), stretches).encode()


def test_what_ranks_measured_arrives_as_it_was() -> None:
    """In any order and any number of pieces; a rank without a sweep counts as one of its stage."""
    measured = [sweep(0), sweep(1, clocks_mhz=(1410, 900)), sweep(0, slower=1.1), StageMeasurements(1, ())]
    reports = [RankReport(rank, of_rank).encode() for rank, of_rank in enumerate(measured)]
    for contents in ([b"".join(reports)], [reports[3] + reports[1], b"", reports[2] + reports[0]]):
        job = JobReport.decode(contents)
        assert (job.num_ranks, job.num_stages) == (4, 2)
        assert merge(job.sweeps) == merge(SweepRows.of(measured))


def test_a_whole_sweep_is_less_than_a_kilobyte() -> None:
    """Sixteen thousand of them go to one rank."""
    assert len(RankReport(16383, sweep(15)).encode()) <= 1000


def test_a_rank_that_reports_twice_counts_once() -> None:
    """An append that was tried again may arrive twice, also in another piece; it would weigh on mean energies."""
    once = [RankReport(0, sweep(0)).encode(), RankReport(1, sweep(0, slower=1.2)).encode()]
    job = JobReport.decode([once[1] + once[0] + once[1], once[1]])
    assert job.num_ranks == 2
    assert merge(job.sweeps) == merge(JobReport.decode(once).sweeps)


def test_of_the_ranks_of_a_stage_the_slowest_counts() -> None:
    """The pipeline waits for it. Each type and clock is a thing of its own."""
    other = Stretch(FORWARD._replace(kind=Kind.BACKWARD, chunk=1), 1290, 0.9, 4, held_down=True)
    reports = [stretched(rank, Stretch(FORWARD, 1410, factor, 8)) for rank, factor in enumerate((1.125, 1.25, 1.0))]
    job = JobReport.decode([*reports, stretched(3, other, Stretch(FORWARD, 1290, 1.5, 8))])
    assert job.stretches == {
        (FORWARD, 1410): Stretch(FORWARD, 1410, 1.25, 8),
        (FORWARD, 1290): Stretch(FORWARD, 1290, 1.5, 8),
        (other.type, 1290): Stretch(other.type, 1290, pytest.approx(0.9), 4, held_down=True),
    }


def test_few_executions_say_nothing() -> None:
    """One interrupted instruction must not change the plan."""
    job = JobReport.decode([stretched(0, Stretch(FORWARD, 1410, 9.0, 3)), stretched(1, Stretch(FORWARD, 1410, 1.5, 4))])
    assert [stretch.factor for stretch in job.stretches.values()] == [1.5]


@pytest.mark.parametrize("num_steps", [1, 5, 16])
def test_one_order_of_a_stage_is_taken_where_it_is_not_as_said(num_steps: int) -> None:
    """The other stages do as they are said to."""
    traced = ORDER[::-1][:num_steps]
    reports = [RankReport(rank, StageMeasurements(rank % 3, ())) for rank in range(3)]
    reports += [RankReport(rank, StageMeasurements(1, ()), traced=traced) for rank in (3, 4)]
    job = JobReport.decode([report.encode() for report in reports])
    assert job.traced == {1: traced}
    assert traced_orders(job, [ORDER] * 3) == [ORDER, traced, ORDER]
    with pytest.raises(InputError, match="in which order stage 0"):
        traced_orders(job, [])


def test_where_all_do_as_said_there_is_no_other_order() -> None:
    """Nor is one where nothing is said at all."""
    job = JobReport.decode([RankReport(0, sweep(0)).encode()])
    assert traced_orders(job, [ORDER]) is None
    assert traced_orders(job, []) is None


def test_the_longest_pipeline_time_counts() -> None:
    """Only a stage that begins first and ends last sees all of the pipeline."""
    reports = [RankReport(r, StageMeasurements(r, ()), pipeline_time_s=s).encode() for r, s in enumerate((1.5, 2.5, 0))]
    assert JobReport.decode(reports).pipeline_time_s == 2.5


def test_more_chunks_than_can_be_sent_are_refused() -> None:
    """Before anything is sent."""
    with pytest.raises(InputError, match="chunk 256"):
        RankReport(0, sweep(0), traced=((256, 0, Kind.FORWARD),)).encode()


def test_the_gpus_of_each_stage_are_known() -> None:
    """Their clocks from the first rank that tells them; a stage with GPUs of two kinds has a kind of its own."""
    a100, h100 = kind_of("A100", 400.0), kind_of("H100", 700.0)
    many = tuple(range(1980, 200, -15))
    told = [
        StageGpu(a100),
        StageGpu(h100),
        StageGpu(a100, (1410, 1395)),
        StageGpu(h100, many),
        StageGpu(a100, (1400,)),
        StageGpu(a100),
    ]
    reports = [RankReport(r, StageMeasurements(r % 2, ()), gpu=gpu).encode() for r, gpu in enumerate(told)]
    stage0, stage1 = JobReport.decode(reports).gpus
    assert stage0 == StageGpu(a100, (1410, 1395))
    assert stage1.supported_clocks_mhz == many
    assert stage1.kind == kind_of_all([a100, h100]) not in (a100, h100, 0)
    assert JobReport.decode([RankReport(0, sweep(0)).encode()]).gpus == (UNKNOWN_GPU,)


ONE = RankReport(17, sweep(0), (Stretch(FORWARD, 1410, 1.5, 8),), ORDER, 1.0).encode()
ROW_BYTES = len(RankReport(0, StageMeasurements(0, ())).encode())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not begin with a report"),
        (ONE[:-1], "not whole rows"),
        (ONE[:-ROW_BYTES], "rank 17 is not whole"),
        (ONE[ROW_BYTES:], "does not begin with a report"),
        (ONE[:-ROW_BYTES] + ONE, "rank 17 is not whole"),
        (b'{"stage": 0, "measurements":' * ROW_BYTES, "does not begin with a report"),
        (b"\1" + ONE[1:4] + b"old " + ONE[8:], "does not begin with a report"),
        (ONE[:ROW_BYTES] + b"\x77" + ONE[ROW_BYTES + 1 :], "rank 17 has a row of unknown kind"),
    ],
)
def test_what_is_no_report_is_refused(content: bytes, message: str) -> None:
    """Cut off in a row, between rows or in the middle; of another version; something else."""
    with pytest.raises(InputError, match=message):
        JobReport.decode([content])


def test_numbers_that_cannot_be_name_their_rank() -> None:
    """Of thousands one is wrong, and somebody has to find it."""
    spoilt = RankReport(5, sweep(0, slower=float("nan"))).encode()
    with pytest.raises(InputError, match="rank 5 has a time_s that is not finite"):
        JobReport.decode([RankReport(4, sweep(0)).encode() + spoilt])


def test_whatever_arrives_is_read_or_refused() -> None:
    """One byte in a thousand is another, or some are missing: never another error."""
    draw = random.Random(1)
    whole = ONE + RankReport(3, sweep(1)).encode()
    for _ in range(300):
        content = bytearray(whole[: draw.choice((len(whole), draw.randrange(len(whole))))])
        for _ in range(draw.randint(1, 3)):
            if content:
                content[draw.randrange(len(content))] = draw.randrange(256)
        try:
            merge(JobReport.decode([bytes(content)]).sweeps)
        except InputError as error:
            assert str(error)


def test_as_many_ranks_as_there_are() -> None:
    """Sixteen stages of 1024 ranks; of each stage one is 20 % slower, and one executes another order."""
    table = np.frombuffer(RankReport(0, sweep(0)).encode(), np.uint8)
    contents = []
    for stage in range(16):
        of_stage = np.tile(table, (1023, 1))
        ranks = np.arange(1024 * stage, 1024 * stage + 1023, dtype="<u4")
        of_stage[:, 8:12] = ranks.view(np.uint8).reshape(-1, 4)
        of_stage[:, 20] = stage
        slowest = RankReport(1024 * stage + 1023, sweep(stage, slower=1.2), traced=ORDER)
        contents.append(of_stage.tobytes() + slowest.encode())
    job = JobReport.decode(contents)
    assert (job.num_ranks, job.num_stages) == (16384, 16)
    assert job.traced == dict.fromkeys(range(16), ORDER)
    measurements = merge(job.sweeps).profile.measurements
    assert len(measurements) == 16 * 2 * 8
    share = {Kind.FORWARD: 50, Kind.BACKWARD: 100}
    assert [m.time_s for m in measurements] == pytest.approx(
        [1.2 * share[m.type.kind] / m.clock_mhz for m in measurements]
    )
