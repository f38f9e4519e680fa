from __future__ import annotations

from pathlib import Path

from perseus_ds.checkpoint import FILE
from tests.deepspeed.conftest import MakeNode, on
from tests.deepspeed.launcher import launch
from tests.deepspeed.scenarios import QUICK


def test_resumed_job_goes_on_with_its_plan(make_node: MakeNode, tmp_path: Path) -> None:
    """The plan travels in DeepSpeed's checkpoint: the resumed job runs under it without profiling again."""
    environment = on(make_node(0.03, clock_latency_s=0.001, energy_counter_period_s=0.01))
    job = {"perseus": QUICK, "checkpoint": str(tmp_path / "checkpoint")}
    first = launch("checkpointed_job", 2, tmp_path / "1", environment=environment, resume=False, **job)
    before = first.results_of_all()[0]
    assert "profile" in before["phases"]
    assert before["plans"][-1] >= 1
    assert (tmp_path / "checkpoint" / f"global_step{len(before['plans'])}" / FILE).exists()

    second = launch("checkpointed_job", 2, tmp_path / "2", environment=environment, resume=True, **job)
    for rank in second.results_of_all():
        assert "profile" not in rank["phases"]
        assert rank["plans"][-1] >= 1
