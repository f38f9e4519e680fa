from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from perseus_core.errors import InputError
from perseus_core.gpu.simulated import Description, create_node


def test_a_relative_profile_is_looked_for_beside_the_description(describe: Callable[..., Path]) -> None:
    """The description can be moved together with its profile."""
    path = describe()
    assert Description.load(path).profile == path.parent / "profile.csv"


def test_clocks_can_be_given_as_a_span(describe: Callable[..., Path]) -> None:
    """Highest, lowest and step mean the whole list, both ends included."""
    description = Description.load(describe(supported_clocks_mhz={"highest": 1000, "lowest": 940, "step": 30}))
    assert description.supported_clocks_mhz == (1000, 970, 940)


def test_blocking_power_is_linear_in_the_clock(describe: Callable[..., Path]) -> None:
    """Half way between the clocks it is half way between the powers."""
    description = Description.load(
        describe(
            supported_clocks_mhz=[1000, 750, 500], blocking_power_w={"at_lowest_clock": 40, "at_highest_clock": 80}
        )
    )
    assert [description.blocking_power_at(clock) for clock in (1000, 750, 500)] == [80, 60, 40]


def test_underscore_keys_are_comments(describe: Callable[..., Path]) -> None:
    """A note on where the figures come from does no harm."""
    assert Description.load(describe(_source="modelled")).num_gpus == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ...}, '"name" is missing'),
        ({"num_gpus": 0}, '"num_gpus" is 0; it must be a whole number from 1'),
        ({"num_gpus": True}, '"num_gpus" is True'),
        ({"supported_clocks_mhz": []}, '"supported_clocks_mhz" is empty'),
        ({"supported_clocks_mhz": [500, 1000]}, "falling order"),
        ({"supported_clocks_mhz": {"highest": 1000}}, '"supported_clocks_mhz.lowest" is None'),
        ({"blocking_power_w": {"at_lowest_clock": 3}}, "must be a number, or hold"),
        ({"blocking_power_w": "84"}, "\"blocking_power_w\" is '84'"),
        ({"power_limit_w": float("nan")}, '"power_limit_w" is nan'),
        ({"power_limit_w": 20}, '"power_limit_w" is 20'),
        ({"noise": {"tmie": 0.1}}, "must be an object with energy, power, time"),
        ({"noise": {"time": -0.1}}, '"noise.time" is -0.1'),
        ({"stages": [0]}, '"stages" has 1 entries for 2 GPUs'),
        ({"clock_latency": 3}, '"clock_latency" is not a field'),
        ({"profile": 3}, '"profile" is 3'),
        ({"energy_counter_period_s": 0}, '"energy_counter_period_s" is 0'),
    ],
)
def test_a_wrong_field_is_named(describe: Callable[..., Path], changes: dict[str, object], message: str) -> None:
    """The error names the file, the field and the value."""
    path = describe(**changes)
    with pytest.raises(InputError) as caught:
        Description.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_what_is_not_json_is_refused(tmp_path: Path) -> None:
    """A profile given in place of a description gives one sentence, not a traceback of the parser."""
    path = tmp_path / "a.json"
    path.write_text("stage,instruction")
    with pytest.raises(InputError, match="is not JSON"):
        Description.load(path)
    path.write_text(json.dumps([1]))
    with pytest.raises(InputError, match="is not a JSON object"):
        Description.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        Description.load(tmp_path / "absent.json")


def test_a_stage_that_the_profile_lacks_is_refused(describe: Callable[..., Path], tmp_path: Path) -> None:
    """The mapping of GPUs to stages must fit the profile."""
    with pytest.raises(InputError, match="names stage 2, but profile"):
        create_node(describe(stages=[0, 2]), tmp_path)
