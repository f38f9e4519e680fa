"""What rank 0 tells all ranks, as it goes through the store."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from perseus_core.runtime.ranks.order import Baseline, News, Order, Phase, Reason
from perseus_core.runtime.ranks.plan_summary import PlanSummary

NUMBERS = st.integers(0, 2**32 - 1)
FIGURES = st.floats(allow_nan=False, allow_infinity=False)
PLANS = st.builds(PlanSummary, NUMBERS, NUMBERS, *[FIGURES] * 7)


@given(
    st.builds(
        Order,
        number=NUMBERS,
        phase=st.sampled_from(Phase),
        from_iteration=NUMBERS,
        plans=st.lists(PLANS, max_size=3).map(tuple),
        offered=NUMBERS,
        collection=NUMBERS,
        reason=st.sampled_from(Reason),
        baseline=st.none() | st.builds(Baseline, NUMBERS, FIGURES, FIGURES),
        speaker=st.integers(-1, 2**31),
    )
)
def test_an_order_arrives_as_it_was_given(order: Order) -> None:
    """All of it: whoever missed others needs nothing else, and figures are the same on all ranks to the last digit."""
    assert Order.decode(order.encode()) == order


@given(NUMBERS, NUMBERS, NUMBERS)
def test_news_are_a_few_bytes(round_number: int, order: int, figures: int) -> None:
    """Every rank reads them about once a second."""
    news = News(round_number, order, figures)
    assert News.decode(news.encode()) == news
    assert len(news.encode()) == 12


def test_a_plan_is_for_its_number_of_microbatches() -> None:
    """An iteration of another number has none."""
    of_eight, of_four = (PlanSummary(number, m, *[1.0] * 7) for number, m in ((3, 8), (4, 4)))
    order = Order(plans=(of_eight, of_four), baseline=Baseline(8, 1.0))
    assert (order.plan_for(8), order.plan_for(4), order.plan_for(2)) == (of_eight, of_four, None)
    assert order.plan_for(order.usual_microbatches) is of_eight


def test_before_there_is_a_baseline_no_number_of_microbatches_is_usual() -> None:
    """Not even that of an evaluation, 0."""
    assert Order().usual_microbatches == -1
    assert Order().plan_for(0) is None
