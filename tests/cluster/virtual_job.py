"""A training job in virtual time: pipelines of stages of tensor-parallel GPUs, and the hosts that give them work.

As with CUDA the hosts run ahead: a rank's host gives its GPU a whole iteration while the one before still runs, and the
marks that it puts on the stream are reached when the GPU gets there. The GPUs of a tensor-parallel group share their
marks, because they begin and end every instruction together.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from perseus_core.gpu.slices import Slices
from perseus_core.planning.dag import data_dependencies
from perseus_core.planning.schedule import Instruction, InstructionType, Kind, Schedule
from perseus_core.runtime.adapter import FollowedSession
from perseus_core.runtime.measure.events import EventSource, NotRecorded
from tests.cluster.virtual_gpu import OUTSIDE, WAITING, VirtualGpu, Work
from tests.cluster.virtual_threads import EventQueue, Mark, VirtualThreads

# A group's past is forgotten when it is this long; it takes a look at each of its GPUs.
_REMEMBERED_ACTIVITIES = 500


class VirtualEvents(EventSource):
    """Marks on one rank's stream: `EventSource` in virtual time.

    Attributes:
        next: the mark for what the host does at this moment.
        is_captured: somebody captures a CUDA graph on the stream.
        is_lost: nobody knows where the GPU's time lies on the host's clock.
        counting: has the GPU count cycles.
    """

    __slots__ = ("counting", "is_captured", "is_lost", "next")

    def __init__(self) -> None:
        """A mark that nobody reaches, until the host works."""
        self.next = Mark()
        self.is_captured = self.is_lost = False
        self.counting: Slices | None = None

    def record(self) -> Mark:
        """See `EventSource`."""
        if self.is_captured:
            raise NotRecorded("a CUDA graph is captured there")
        return self.next

    @property
    def knows_host_time(self) -> bool:
        """See `EventSource`."""
        return not self.is_lost

    def slices(self, gpu_uuid: str) -> Slices | None:
        """See `EventSource`."""
        return self.counting


@dataclass
class Rank:
    """One rank of the job.

    Attributes:
        number: global rank.
        stage: of the pipeline.
        pipeline: its data-parallel rank.
        gpu: what it computes on.
        threads: its side threads.
        events: marks on its stream.
        session: what it tells of its training; none where it never opens one.
    """

    number: int
    stage: int
    pipeline: int
    gpu: VirtualGpu
    threads: VirtualThreads
    events: VirtualEvents = field(default_factory=VirtualEvents)
    session: FollowedSession | None = None


@dataclass(frozen=True)
class _Step:
    """One instruction of a stage, and what it has to do with the other stages of its pipeline.

    Attributes:
        call: chunk, microbatch and kind, as told to a session.
        type: number of its instruction type.
        place: number of the instruction in the pipeline.
        needs: the numbers of those on other stages whose results it waits for.
        next_stages: the stages that wait for its result.
    """

    call: tuple[int, int, Kind]
    type: int
    place: int
    needs: tuple[int, ...]
    next_stages: tuple[int, ...]


def instruction_types(schedule: Schedule, stage: int) -> list[InstructionType]:
    """Of one stage, in the order in which they are numbered here."""
    return sorted({i.type for i in schedule.stages[stage]})


def steps_of(schedule: Schedule) -> list[list[_Step]]:
    """Each stage's instructions in order."""
    places = {instruction: place for place, instruction in enumerate(schedule.instructions)}
    needs: dict[Instruction, list[int]] = {i: [] for i in places}
    next_stages: dict[Instruction, set[int]] = {i: set() for i in places}
    for before, after in data_dependencies(schedule):
        if before.stage != after.stage:
            needs[after].append(places[before])
            next_stages[before].add(after.stage)
    return [
        [
            _Step(
                (i.chunk, i.microbatch, i.kind),
                instruction_types(schedule, stage).index(i.type),
                places[i],
                tuple(needs[i]),
                tuple(sorted(next_stages[i])),
            )
            for i in order
        ]
        for stage, order in enumerate(schedule.stages)
    ]


class VirtualStage:
    """The tensor-parallel group of one stage of one pipeline."""

    def __init__(self, job: VirtualJob, ranks: Sequence[Rank], work: Work, stage: int, pipeline: int) -> None:
        """Has no work yet.

        Args:
            job: which it is part of.
            ranks: the group.
            work: what the group's GPUs share.
            stage: which of its pipeline's.
            pipeline: which of the job's.
        """
        self.ranks = ranks
        self.pipeline = pipeline
        self._job = job
        self._queue = job.queue
        self._gpus = [rank.gpu for rank in ranks]
        self._work = work
        self._stage = stage
        self._steps: Sequence[_Step] = ()
        self._given: list[list[Mark]] = []
        self.num_given = 0
        self._marks: list[Mark] = []
        self._position = 0
        self._is_computing = False
        self._end = 0
        for gpu in self._gpus:
            gpu.on_change = self._times_have_changed

    # The hosts

    def give_iteration(self) -> None:
        """Each rank's host goes through the next iteration."""
        shape = self._job.shape_of(self.num_given)
        self.num_given += 1
        calls = [step.call for step in shape.steps[self._stage]]
        marks = [Mark() for _ in range(2 * len(calls) + 2)]
        num_microbatches = shape.schedule.num_microbatches
        for rank in self.ranks:
            session = rank.session
            if session is None:
                continue
            self._queue.rank = rank.number
            events = rank.events
            events.next = marks[0]
            session.begin_iteration(num_microbatches)
            place = 1
            for chunk, microbatch, kind in calls:
                events.next = marks[place]
                session.begin_instruction(chunk, microbatch, kind)
                events.next = marks[place + 1]
                session.end_instruction()
                place += 2
            events.next = marks[place]
            session.end_iteration()
        self._given.append(marks)

    # The GPUs

    def begin_iteration(self) -> None:
        """The GPUs begin what was given next."""
        self._marks = self._given.pop(0)
        self._steps = self._job.shape_of(self._job.num_ended).steps[self._stage]
        self._marks[0].reach(self._queue.now_s)
        self._position = 0
        self._go_on_if_possible()

    def go_outside(self) -> None:
        """All pipelines have ended their instructions: what follows is done by all together."""
        self._work.begin(self._queue.now_s, OUTSIDE)

    def end_iteration(self) -> None:
        """The iteration ends."""
        self._marks[-1].reach(self._queue.now_s)
        self._work.begin(self._queue.now_s, WAITING)
        if len(self._work.begins) > _REMEMBERED_ACTIVITIES:
            for gpu in self._gpus:
                gpu.catch_up()
            self._work.forget()

    def go_on_if_possible(self) -> None:
        """Another stage has got further."""
        if not self._is_computing and self._marks:
            self._go_on_if_possible()

    def _go_on_if_possible(self) -> bool:
        """Begins the next instruction, unless it has to wait for another stage; returns whether it has begun."""
        if self._position == len(self._steps):
            return False
        step = self._steps[self._position]
        done = self._job.done[self.pipeline]
        for place in step.needs:
            if not done[place]:
                return False
        now_s = self._queue.now_s
        self._is_computing = True
        self._marks[2 * self._position + 1].reach(now_s)
        factor = self._job.time_factor()
        self._work.begin(now_s, step.type, factor)
        slowest_s = max([gpu.duration_s(step.type) for gpu in self._gpus])
        self._end = self._queue.call_at(now_s + factor * slowest_s, self._end_instruction)
        if self._position == self._job.give_next_at:
            self._job.give_next(self)
        return True

    def _times_have_changed(self) -> None:
        """The clock of a GPU has changed while it computes."""
        if self._is_computing:
            self._end = self._queue.call_at(max([gpu.end_of_present_s() for gpu in self._gpus]), self._end_instruction)

    def _end_instruction(self) -> None:
        if self._queue.number != self._end:
            return  # it takes another time by now
        step = self._steps[self._position]
        self._job.done[self.pipeline][step.place] = True
        self._is_computing = False
        self._marks[2 * self._position + 2].reach(self._queue.now_s)
        self._position += 1
        if not self._go_on_if_possible():
            self._work.begin(self._queue.now_s, WAITING)
            if self._position == len(self._steps):
                self._job.stage_is_done()
        for stage in step.next_stages:
            self._job.pipelines[self.pipeline][stage].go_on_if_possible()


@dataclass(frozen=True)
class _Shape:
    """What iterations run from one on.

    Attributes:
        from_iteration: counted from 0.
        schedule: of every pipeline.
        steps: of each stage.
    """

    from_iteration: int
    schedule: Schedule
    steps: list[list[_Step]]


class VirtualJob:
    """All pipelines. They end every iteration together.

    Attributes:
        queue: what happens.
        schedule: of every pipeline, of the first iterations.
        pipelines: each a stage after the other.
        done: for each pipeline, which of its instructions have ended in this iteration.
        give_next_at: a stage's hosts give it the next iteration when it begins this instruction, counted from 0.
        tail_s: from the last instruction's end to the iteration's.
        num_ended: iterations that have ended.
        ended_at_s: when they did.
        stop_after: the queue stops when so many have ended.
    """

    def __init__(
        self, queue: EventQueue, schedule: Schedule, *, tail_s: float, time_noise: float, random_numbers: random.Random
    ) -> None:
        """No pipelines yet.

        Args:
            queue: what happens.
            schedule: of every pipeline.
            tail_s: from the last instruction's end to the iteration's.
            time_noise: by how much one execution's time differs from another's, relative standard deviation.
            random_numbers: for this.
        """
        self.queue = queue
        self.schedule = schedule
        self.pipelines: list[list[VirtualStage]] = []
        self.done: list[bytearray] = []
        self.give_next_at = min(len(order) for order in schedule.stages) // 2
        self.num_ended = 0
        self.ended_at_s: list[float] = []
        self.stop_after = -1
        self.tail_s = tail_s
        self._factors = [max(0.5, 1 + time_noise * random_numbers.gauss(0, 1)) for _ in range(9973)]
        self._factor = 0
        self._num_stages_done = 0
        self._shapes = [_Shape(0, schedule, steps_of(schedule))]

    def add_stage(self, ranks: Sequence[Rank], work: Work) -> None:
        """Adds the next stage, of the present pipeline until that has all, else of a new one."""
        if not self.pipelines or len(self.pipelines[-1]) == self.schedule.num_stages:
            self.pipelines.append([])
            self.done.append(bytearray())
        stages = self.pipelines[-1]
        stages.append(VirtualStage(self, ranks, work, len(stages), len(self.pipelines) - 1))

    @property
    def stages(self) -> list[VirtualStage]:
        """Those of all pipelines."""
        return [stage for stages in self.pipelines for stage in stages]

    def start(self) -> None:
        """Gives the first iteration to all, and begins it."""
        for stage in self.stages:
            stage.give_iteration()
        self._begin()

    def shape_of(self, iteration: int) -> _Shape:
        """What an iteration runs."""
        return next(shape for shape in reversed(self._shapes) if shape.from_iteration <= iteration)

    def change(self, schedule: Schedule) -> None:
        """Another schedule, of the same stages, from the next iteration on that no host has given yet."""
        next_iteration = max(stage.num_given for stage in self.stages)
        self._shapes.append(_Shape(next_iteration, schedule, steps_of(schedule)))
        self.give_next_at = min(self.give_next_at, min(len(order) for order in schedule.stages) // 2)

    def time_factor(self) -> float:
        """The next execution's time over the profile's."""
        self._factor = (self._factor + 1) % len(self._factors)
        return self._factors[self._factor]

    def give_next(self, stage: VirtualStage) -> None:
        """The hosts of a stage give it the next iteration."""
        self.queue.call_at(self.queue.now_s, stage.give_iteration)

    def stage_is_done(self) -> None:
        """One more stage has ended its instructions."""
        self._num_stages_done += 1
        if self._num_stages_done == len(self.pipelines) * self.schedule.num_stages:
            for stage in self.stages:
                stage.go_outside()
            self.queue.call_at(self.queue.now_s + self.tail_s, self._end)

    def _begin(self) -> None:
        self._num_stages_done = 0
        num_instructions = len(self.shape_of(self.num_ended).schedule.instructions)
        self.done = [bytearray(num_instructions) for _ in self.pipelines]
        for stage in self.stages:
            stage.begin_iteration()

    def _end(self) -> None:
        self.num_ended += 1
        self.ended_at_s.append(self.queue.now_s)
        for stage in self.stages:
            stage.end_iteration()
        self._begin()
        if self.num_ended == self.stop_after:
            self.queue.stop()
