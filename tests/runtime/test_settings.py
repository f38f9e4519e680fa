from __future__ import annotations

from typing import Any

import pytest

from perseus_core.errors import InputError
from perseus_core.planning.frontier import Frontier
from perseus_core.planning.problem import PipelineProblem
from perseus_core.runtime.settings import Settings


def test_most_users_write_only_enabled() -> None:
    """Everything else has a default."""
    settings = Settings.from_mapping({"enabled": True})
    assert settings.enabled
    assert settings.policy_name == "no_slowdown"


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"enabeld": True}, 'config "perseus.enabeld" is not known; did you mean "enabled"?'),
        ({"max_slowdown": 1.2}, 'config "perseus.max_slowdown": 1.2 is not in [0, 1); 0.05 means 5 %'),
        ({"max_slowdown": "5%"}, 'config "perseus.max_slowdown": "5%" is not in [0, 1); 0.05 means 5 %'),
        ({"enabled": "yes"}, 'config "perseus.enabled": "yes" must be true or false'),
        ({"policy": "zues"}, 'config "perseus.policy": "zues" is not a policy; did you mean "zeus"?'),
        ({"policy": "power_cap"}, 'config "perseus.power_cap_w" is missing; policy "power_cap" needs it'),
        ({"eta": 0.5}, 'config "perseus.eta" is set, but policy "no_slowdown" does not use it'),
        (
            {"policy": "min_energy", "max_slowdown": 0.1},
            'config "perseus.max_slowdown" is set, but policy "min_energy"',
        ),
        ({"straggler_slowdown": 0.9}, 'config "perseus.straggler_slowdown": 0.9 is below 1'),
        ({"profile_clocks": 1}, 'config "perseus.profile_clocks": 1 must be a whole number, 2 or more'),
        ({"switch_latency_s": "fast"}, 'config "perseus.switch_latency_s": "fast" must be "auto" or seconds'),
        ({"max_clock_changes_per_s": "few"}, 'config "perseus.max_clock_changes_per_s": "few" must be "auto" or a'),
        ({"gpu_measurements": 3}, 'config "perseus.gpu_measurements": 3 must be text'),
        ({"profile_cache": None}, 'config "perseus.profile_cache": null must be text'),
        ({"max_slowdown": float("nan")}, 'config "perseus.max_slowdown": NaN is not in [0, 1)'),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(block: dict[str, Any], message: str) -> None:
    """With the key, the value and the remedy."""
    with pytest.raises(InputError) as refusal:
        Settings.from_mapping(block)
    assert str(refusal.value).startswith(message)


def test_the_message_names_the_place_in_the_users_own_file() -> None:
    """Adapters call the block by different names."""
    with pytest.raises(InputError, match=r'config "--perseus-config\.tolerance"'):
        Settings.from_mapping({"tolerance": 2}, "--perseus-config")


def test_max_slowdown_alone_is_a_policy(frontier: Frontier[PipelineProblem]) -> None:
    """Nobody should have to name the policy as well."""
    time_s = frontier.fastest_time_s
    assert Settings(max_slowdown=0.05).pick(frontier, time_s) == pytest.approx(1.05 * time_s)


@pytest.mark.parametrize(
    "block",
    [
        {"policy": "min_energy"},
        {"policy": "zeus", "eta": 1.0},
        {
            "policy": "carbon",
            "eta": 1.0,
            "carbon_intensity_g_per_kwh": 400,
            "reference_carbon_intensity_g_per_kwh": 400,
        },
        {"policy": "power_cap", "power_cap_w": 700.0},
        {},
    ],
)
def test_every_policy_picks_a_point_of_the_frontier(block: dict[str, Any], frontier: Frontier[PipelineProblem]) -> None:
    """And the ones that count only energy pick the point of least energy."""
    time_s = Settings.from_mapping(block).pick(frontier, frontier.fastest_time_s)
    assert frontier.fastest_time_s <= time_s <= frontier.min_energy_time_s
    if block.get("policy") == "min_energy" or block.get("eta") == 1.0:
        assert time_s == frontier.min_energy_time_s
