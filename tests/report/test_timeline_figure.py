"""Timelines: as many boxes as instructions, in the right places, on axes that can be compared."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from perseus_core.planning.baselines import all_max
from perseus_core.planning.plan import make_plan
from perseus_core.planning.policy import max_slowdown
from perseus_core.planning.schedule import interleaved, one_f_one_b, zb_h1
from perseus_core.report.timeline_figure import draw_before_and_after, draw_timeline
from tests.report.conftest import make_profile


def panels(figure):
    return [axes for axes in figure.axes if axes.get_ylabel() == "Stage"]


def labelled(axes, label):
    return [artist for artist in axes.get_children() if artist.get_label() == label]


def box_corners(axes):
    (boxes,) = labelled(axes, "instructions")
    return np.array([path.vertices[:4] for path in boxes.get_paths()])


def test_one_box_per_instruction_from_start_to_end(plan):
    """Every instruction has a box that spans its time in the row of its stage."""
    (axes,) = panels(draw_timeline(plan))
    planned = [p for order in plan.stages for p in order]
    for corners, p in zip(box_corners(axes), planned, strict=True):
        assert corners[:, 0].min() == pytest.approx(p.start_s)
        assert corners[:, 0].max() == pytest.approx(p.start_s + p.duration_s)
        assert round(corners[:, 1].mean()) == p.instruction.stage


def test_only_backwards_carry_a_bar(plan):
    """Forward and backward differ by a bar, not by colour alone."""
    (axes,) = panels(draw_timeline(plan))
    bars = sum(len(collection.get_paths()) for collection in labelled(axes, "backward bars"))
    assert bars == plan.schedule.num_stages * plan.schedule.num_microbatches


@pytest.mark.parametrize(("colour", "label"), [("clock", "SM clock [MHz]"), ("power", "Power of one GPU [W]")])
def test_colour_bar_names_quantity_and_unit(plan, colour, label):
    """The colour bar says what the colours are, and in which unit."""
    assert label in [axes.get_ylabel() for axes in draw_timeline(plan, colour=colour).axes]


def test_equal_clocks_have_equal_colours(plan):
    """The colour of a box follows from its clock alone."""
    (axes,) = panels(draw_timeline(plan))
    (boxes,) = labelled(axes, "instructions")
    clocks = [clock for of_stage in plan.clocks_mhz for clock in of_stage]
    colours = {(clock, tuple(face)) for clock, face in zip(clocks, boxes.get_facecolors().tolist(), strict=True)}
    assert len(colours) == len(set(clocks))


def test_before_and_after_share_axis_and_colours(frontier):
    """A slower plan under the baseline: one time axis that holds both, one colour scale."""
    problem = frontier.problem
    slower = make_plan(frontier, max_slowdown(0.2))
    before, after = panels(draw_before_and_after(problem, all_max(problem), slower))
    assert before.get_xlim() == after.get_xlim() == (0, pytest.approx(slower.iteration_time_s))
    fastest = slower.clocks_mhz[0].index(1400)
    (faces_before,), (faces_after,) = labelled(before, "instructions"), labelled(after, "instructions")
    assert faces_before.get_facecolors()[fastest].tolist() == faces_after.get_facecolors()[fastest].tolist()


def test_critical_path_is_drawn_from_start_to_end(plan):
    """The line of the critical path begins at 0 and ends with the iteration."""
    (axes,) = panels(draw_timeline(plan))
    (line,) = labelled(axes, "critical path")
    assert line.get_xdata()[0] == 0
    assert line.get_xdata()[-1] == pytest.approx(plan.iteration_time_s)


def test_numbers_are_left_out_where_boxes_are_too_narrow(solved):
    """With 12 microbatches every box has its number, with 400 none has."""
    few, many = (make_plan(solved(one_f_one_b(2, count))) for count in (12, 400))
    (few_axes,), (many_axes,) = panels(draw_timeline(few)), panels(draw_timeline(many))
    assert len(few_axes.texts) == 2 * 2 * 12
    assert not many_axes.texts


def test_chunks_stand_at_different_heights(solved):
    """Interleaved: boxes of the second chunk stand lower in their row than those of the first."""
    schedule = interleaved(2, 4, 2)
    plan = make_plan(solved(schedule, profile=make_profile(2).divided_into_chunks(2)))
    (axes,) = panels(draw_timeline(plan))
    height = {
        (i.stage, i.chunk, i.kind): corners[:, 1].max()
        for i, corners in zip(schedule.instructions, box_corners(axes), strict=True)
    }
    for stage, _, kind in height:
        assert height[stage, 1, kind] > height[stage, 0, kind]


def test_input_and_weight_gradients_differ(solved):
    """Zero bubble: the bar of the input part is below its box, that of the weight part above."""
    schedule = zb_h1(2, 4)
    plan = make_plan(solved(schedule, profile=make_profile(2).with_split_backward()))
    (axes,) = panels(draw_timeline(plan))
    below, above = (
        np.array([path.vertices[:4, 1].mean() % 1 for path in bars.get_paths()])
        for bars in labelled(axes, "backward bars")
    )
    # Rows are 1 high with their middle at whole numbers.
    assert len(below) == len(above) == 8
    assert (below < 0.5).all()
    assert (above > 0.5).all()


def test_time_outside_the_pipeline_is_marked(solved):
    """The iteration does not end with its last instruction: the rest is there, and named."""
    plan = make_plan(solved(outside_time_s=0.02))
    figure = draw_timeline(plan)
    (axes,) = panels(figure)
    (span,) = labelled(axes, "outside the pipeline")
    assert span.get_width() == pytest.approx(0.02)
    assert "outside the pipeline" in [text.get_text() for text in figure.texts]


def test_one_stage_and_one_clock(solved):
    """Nothing to choose and nobody to wait for is still a picture."""
    plan = make_plan(solved(one_f_one_b(1, 2), profile=make_profile(1, (1400,))))
    (axes,) = panels(draw_timeline(plan))
    assert len(box_corners(axes)) == 4
