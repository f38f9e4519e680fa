"""Profiles: what loads, what is refused and how."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from perseus_core.errors import InputError
from perseus_core.planning import profile as profile_module
from perseus_core.planning.profile import Measurement, Profile
from perseus_core.planning.schedule import InstructionType, Kind

HEADER = "stage,instruction,frequency,time,energy"
GOOD = f"{HEADER}\n0,forward,1410,0.05,20\n0,backward,1410,0.1,40\n"


def load(tmp_path: Path, text: str) -> Profile:
    path = tmp_path / "profile.csv"
    path.write_text(text)
    return Profile.load(path)


def test_published_columns_load_as_they_are(published: Path) -> None:
    """The paper's own CSV loads: 8 stages, 38 clocks, forward and backward."""
    profile = Profile.load(published / "stage_profile" / "gpt3-175b+a100_sxm_bf16.csv")
    assert (profile.num_stages, profile.num_chunks, profile.measurements[0].clock_mhz) == (8, 1, 1410)
    assert all(len(profile.of(t)) == 38 for t in profile.types)
    first = profile.of(InstructionType(0, 0, Kind.FORWARD))[0]
    assert (first.clock_mhz, first.time_s) == (1410, 0.05016166687011708)


def test_save_and_load_give_the_same_profile(tmp_path: Path) -> None:
    """Optional columns survive a round trip."""
    kinds = (Kind.FORWARD, Kind.BACKWARD)
    profile = Profile(
        tuple(
            Measurement(InstructionType(stage, chunk, kind), clock, 100 / clock, 30.0, 5, 0.01, None)
            for stage in range(2)
            for chunk in range(2)
            for kind in kinds
            for clock in (1410, 1200)
        )
    )
    profile.save(tmp_path / "p.csv")
    assert Profile.load(tmp_path / "p.csv") == profile


def test_one_clock_is_legal(tmp_path: Path) -> None:
    """A profile of a single clock leaves nothing to choose, and that is fine."""
    assert {m.clock_mhz for m in load(tmp_path, GOOD).measurements} == {1410}


def test_repeated_identical_rows_count_once(tmp_path: Path) -> None:
    """Rows that say the same twice are one measurement."""
    assert len(load(tmp_path, GOOD + "0,forward,1410,0.05,20\n").measurements) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["is empty", HEADER]),
        ("stage,instruction,frequency,time\n", ["line 1", '"energy" is missing']),
        (HEADER + "\n", ["no measurement"]),
        (GOOD + "0,forward,1395,abc,20\n", ["line 4", '"time"', "'abc'"]),
        (GOOD + "0,forward,1395,0,20\n", ["line 4", "time is 0.0", "above 0"]),
        (GOOD + "0,forward,1395,-1,20\n", ["line 4", "time is -1.0"]),
        (GOOD + "0,forward,1395,nan,20\n", ["line 4", "time is nan"]),
        (GOOD + "0,forward,1395,0.05,inf\n", ["line 4", "energy is inf"]),
        (GOOD + "0,forward,13.5,0.05,20\n", ["line 4", '"frequency"', "whole number"]),
        (GOOD + "0,sideways,1395,0.05,20\n", ["line 4", '"instruction"', "forward"]),
        (GOOD + "-1,forward,1395,0.05,20\n", ["line 4", '"stage" is -1']),
        (GOOD + "0,forward,1395,0.05\n", ["line 4", "4 fields"]),
        (GOOD + "0,forward,1410,0.06,20\n", ["1410 MHz", "twice", "0.05", "0.06"]),
        (GOOD + "2,forward,1410,0.05,20\n2,backward,1410,0.1,40\n", ["no stage 1"]),
        (GOOD + "1,forward,1410,0.05,20\n", ["no backward of stage 1"]),
        ("\x00\xff\n", ["profile.csv"]),
    ],
)
def test_bad_profiles_are_refused_in_one_sentence(tmp_path: Path, text: str, words: list[str]) -> None:
    """The message names file, line, field and value."""
    with pytest.raises(InputError) as refused:
        load(tmp_path, text)
    message = str(refused.value)
    assert "\n" not in message
    for word in ["profile.csv", *words]:
        assert word in message


def test_a_huge_file_is_refused_by_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of some hundred million rows is refused before it is read."""
    path = tmp_path / "huge.csv"
    path.touch()
    os.truncate(path, 5 * 2**30)
    monkeypatch.setattr(profile_module, "_read_rows", lambda *_: pytest.fail("the file was read"))
    with pytest.raises(InputError, match="5120 MiB is no profile"):
        Profile.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """The path that cannot be read stands in the message."""
    with pytest.raises(InputError, match=r"nowhere\.csv: cannot be read"):
        Profile.load(tmp_path / "nowhere.csv")


def test_fused_passes_take_what_both_take(own_profile: Profile) -> None:
    """A `forward_backward` of every stage has the time and energy of a forward and a backward at the same clock."""
    fused = own_profile.with_fused_passes()
    assert fused.with_fused_passes() == fused
    assert fused.kinds == {Kind.FORWARD, Kind.BACKWARD, Kind.FORWARD_BACKWARD}
    for stage in range(own_profile.num_stages):
        forward, backward, both = (fused.of(InstructionType(stage, 0, kind)) for kind in sorted(fused.kinds, key=len))
        assert len(both) == len(forward)
        for f, b, fb in zip(forward, backward, both, strict=True):
            assert (fb.clock_mhz, fb.time_s, fb.energy_j) == (f.clock_mhz, f.time_s + b.time_s, f.energy_j + b.energy_j)


def test_division_into_chunks_and_parts_keeps_the_sums(own_profile: Profile) -> None:
    """Chunks and backward parts add up to the whole."""
    divided = own_profile.divided_into_chunks(2).with_split_backward(0.4)
    whole = own_profile.of(InstructionType(1, 0, Kind.BACKWARD))
    for i, m in enumerate(whole):
        parts = [
            divided.of(InstructionType(1, chunk, kind))[i]
            for chunk in range(2)
            for kind in (Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
        ]
        assert sum(p.time_s for p in parts) == pytest.approx(m.time_s)
        assert sum(p.energy_j for p in parts) == pytest.approx(m.energy_j)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD.replace(",", ";"), "separated by semicolons"),
        (GOOD.replace("energy\n", "energy,time\n").replace("20\n", "20,1\n"), r'2 columns "time"'),
        (GOOD.replace("0.05", "50").replace("0.1,", "100,"), "0.4 W.*milliseconds"),
        (GOOD.replace("0.05", "50000").replace("0.1,", "100000,"), "0.0004 W.*microseconds"),
        (GOOD.replace("20\n", "20000\n").replace("40\n", "40000\n"), "4e\\+05 W.*millijoules"),
    ],
)
def test_a_table_in_another_form_is_refused_with_what_it_looks_like(tmp_path: Path, text: str, said: str) -> None:
    """Whoever exports from a spreadsheet, or measures in milliseconds, is told so."""
    with pytest.raises(InputError, match=said):
        load(tmp_path, text)
