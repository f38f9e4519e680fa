"""The documented GPU model, the transformers on it, and the profiles and descriptions made of them."""

from __future__ import annotations

import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perseus_core.errors import InputError
from perseus_core.gpu.model import A40, A100, GPUS, H100, GpuModel, Work
from perseus_core.gpu.simulated.description import Description
from perseus_core.gpu.workload import TRANSFORMERS, Workload
from perseus_core.planning.profile import Profile
from perseus_core.planning.schedule import InstructionType, Kind

CONFIGS = Path(__file__).parents[2] / "configs"
COMMITTED = runpy.run_path(str(CONFIGS / "make_profiles.py"))["COMMITTED"]
GPT3_67B = Workload(TRANSFORMERS["gpt3-6.7b"], num_stages=4, microbatch_size=2)
FORWARD = GPT3_67B.forward(0)
gpus = pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)


@gpus
def test_a_higher_clock_is_never_slower(gpu: GpuModel) -> None:
    """Time never rises with the clock, and falls from the lowest to the highest."""
    time_s = gpu.time_s(FORWARD, gpu.clocks_mhz)  # from the highest clock down
    assert (np.diff(time_s) >= 0).all()
    assert time_s[-1] > 2 * time_s[0]


@gpus
def test_a_higher_clock_never_draws_less_power(gpu: GpuModel) -> None:
    """Power never falls with the clock, working or waiting."""
    assert (np.diff(gpu.power_w(FORWARD, gpu.clocks_mhz)) <= 1e-9).all()
    assert (np.diff(gpu.blocking_power_w(gpu.clocks_mhz)) < 0).all()


@gpus
def test_energy_is_least_at_a_clock_in_between(gpu: GpuModel) -> None:
    """Energy falls from the highest clock to one minimum, then rises to the lowest."""
    energy_j = gpu.energy_j(FORWARD, gpu.clocks_mhz)
    least = int(np.argmin(energy_j))
    assert 0 < least < len(energy_j) - 1
    assert (np.diff(energy_j[: least + 1]) <= 1e-9).all()
    assert (np.diff(energy_j[least:]) > 0).all()


def test_the_a100_resembles_the_published_measurements() -> None:
    """Least energy near 1050-1100 MHz: some 30 % less in some 1.25 times the time."""
    work = Workload(TRANSFORMERS["gpt3-175b"], 8, tensor_parallel=8).forward(0)
    energy_j, time_s = A100.energy_j(work, A100.clocks_mhz), A100.time_s(work, A100.clocks_mhz)
    least = int(np.argmin(energy_j))
    assert 1050 <= A100.clocks_mhz[least] <= 1100
    assert 0.65 < energy_j[least] / energy_j[0] < 0.78
    assert 1.2 < time_s[least] / time_s[0] < 1.35


def test_capped_clocks_all_look_the_same() -> None:
    """An A40 draws its limit from about 1400 MHz on, and no clock above changes its time."""
    high, low = np.array([1740, 1600, 1500]), np.array([1300, 1200])
    assert np.ptp(A40.time_s(FORWARD, high)) == 0
    assert A40.power_w(FORWARD, high) == pytest.approx(A40.power_limit_w)
    assert (A40.power_w(FORWARD, low) < A40.power_limit_w).all()
    assert (A40.time_s(FORWARD, low) > A40.time_s(FORWARD, 1740)).all()


def test_a_lower_power_limit_slows_and_saves() -> None:
    """At 250 W an A100 runs longer, draws 250 W and spends less than at 400 W."""
    limited = replace(A100, power_limit_w=250.0)
    assert limited.power_w(FORWARD, 1410) == pytest.approx(250)
    assert limited.time_s(FORWARD, 1410) > A100.time_s(FORWARD, 1410)
    assert limited.energy_j(FORWARD, 1410) < A100.energy_j(FORWARD, 1410)
    assert limited.effective_clock_mhz(FORWARD, [1410, 900]) == pytest.approx(
        [limited.effective_clock_mhz(FORWARD, 1410), 900]
    )


def test_memory_bound_work_ignores_the_clock() -> None:
    """A copy takes as long at any clock, and is cheapest at the lowest."""
    copy = Work(flop=0, memory_bytes=10e9)
    assert np.ptp(A100.time_s(copy, A100.clocks_mhz)) == 0
    assert A100.time_s(copy, 1410) == pytest.approx(10e9 / A100.memory_bytes_per_s)
    assert int(np.argmin(A100.energy_j(copy, A100.clocks_mhz))) == len(A100.clocks_mhz) - 1


def test_compute_bound_work_scales_with_the_clock() -> None:
    """Without memory traffic, half the clock takes twice as long."""
    product = Work(flop=1e12, memory_bytes=0)
    assert A100.time_s(product, 600) == pytest.approx(2 * A100.time_s(product, 1200))
    assert A100.time_s(product, 705) == pytest.approx(2e12 / (A100.tensor_flop_per_s * A100.efficiency))


@pytest.mark.parametrize(("overlap", "seconds"), [(0, 5), (0.5, 4), (1, 3)])
def test_overlap_hides_the_shorter_of_compute_and_memory(overlap: float, seconds: float) -> None:
    """Two seconds of compute and three of memory traffic take between three and five."""
    gpu = replace(A100, overlap=overlap, efficiency=1.0)
    work = Work(2 * gpu.tensor_flop_per_s, 3 * gpu.memory_bytes_per_s)
    assert gpu.time_s(work, 1410) == pytest.approx(seconds)


def test_voltage_is_flat_then_linear() -> None:
    """V_min up to the knee, V_max at the highest clock, straight in between."""
    knee, top = A100.voltage_knee_mhz, A100.max_clock_mhz
    assert A100.voltage([210, knee, (knee + top) / 2, top]) == pytest.approx(
        [A100.min_voltage, A100.min_voltage, (A100.min_voltage + 1) / 2, 1]
    )


def test_supported_clocks_are_those_of_the_data_sheets() -> None:
    """From the highest down in steps of 15 MHz."""
    assert [(gpu.clocks_mhz[0], gpu.clocks_mhz[-1]) for gpu in (A100, H100, A40)] == [
        (1410, 210),
        (1980, 210),
        (1740, 210),
    ]
    assert set(np.diff(A100.clocks_mhz)) == {-15}
    assert [gpu.power_limit_w for gpu in (A100, H100, A40)] == [400, 700, 300]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tensor_flop_per_s": 0.0}, "tensor_flop_per_s is 0.0; it must be above 0"),
        ({"overlap": 1.5}, "overlap is 1.5"),
        ({"efficiency": 0.0}, "efficiency is 0.0"),
        ({"memory_w": float("nan")}, "memory_w is nan"),
        ({"voltage_knee_mhz": 1410}, "voltage_knee_mhz is 1410"),
    ],
)
def test_refuses_a_gpu_that_cannot_be(change: dict[str, float], message: str) -> None:
    """The sentence names the GPU, the field and its value."""
    with pytest.raises(InputError, match=message):
        replace(A100, **change)


def test_layers_are_divided_evenly_and_none_is_lost() -> None:
    """70 layers on 8 stages: six stages of 9 and two of 8."""
    bloom = Workload(TRANSFORMERS["bloom-176b"], num_stages=8)
    assert [bloom.num_layers(stage) for stage in range(8)] == [9] * 6 + [8] * 2


def test_flop_agree_with_the_usual_formula() -> None:
    """All stages together, forward and backward: 72 b s l h^2 (1 + s / 6h + V / 12hl) (Narayanan et al., SC 2021)."""
    shape = TRANSFORMERS["gpt3-6.7b"]
    b, s, layers, h, v = 2, shape.sequence_length, shape.num_layers, shape.hidden_size, shape.vocabulary_size
    total = sum(GPT3_67B.forward(stage).flop + GPT3_67B.backward(stage).flop for stage in range(4))
    assert total == pytest.approx(72 * b * s * layers * h**2 * (1 + s / (6 * h) + v / (12 * h * layers)))


def test_tensor_parallelism_divides_compute_and_adds_traffic() -> None:
    """Eight GPUs do an eighth of the products each, and have to exchange activations."""
    alone = Workload(TRANSFORMERS["gpt3-175b"], 8).forward(0)
    shared = Workload(TRANSFORMERS["gpt3-175b"], 8, tensor_parallel=8).forward(0)
    assert shared.flop == pytest.approx(alone.flop / 8)
    assert alone.link_bytes == 0 < shared.link_bytes


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"num_stages": 0}, "num_stages is 0"),
        ({"num_stages": 33}, "num_stages is 33, but gpt3-6.7b has 32 layers"),
        ({"num_stages": 4, "microbatch_size": 0}, "microbatch_size is 0"),
    ],
)
def test_refuses_a_workload_that_cannot_be_cut(numbers: dict[str, int], message: str) -> None:
    """The sentence names the number."""
    with pytest.raises(InputError, match=message):
        Workload(TRANSFORMERS["gpt3-6.7b"], **numbers)


def test_a_profile_refuses_a_clock_the_gpu_does_not_have() -> None:
    """1400 MHz is between two supported clocks of an A100."""
    with pytest.raises(InputError, match="clock 1400 MHz is not supported by NVIDIA A100"):
        GPT3_67B.profile(A100, (1400,))


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_profiles_are_what_the_script_makes(name: str, tmp_path: Path) -> None:
    """Byte for byte."""
    COMMITTED[name].profile().save(tmp_path / name)
    assert (tmp_path / name).read_bytes() == (CONFIGS / "profiles" / name).read_bytes()


def test_every_profile_in_the_folder_is_made_by_the_script() -> None:
    """None was left behind by an older script or edited by hand."""
    assert {path.name for path in (CONFIGS / "profiles").iterdir()} == set(COMMITTED)


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_profiles_load_and_are_imbalanced(name: str) -> None:
    """The last stage, with the language-model head, is the slowest; the others are equal."""
    profile = Profile.load(CONFIGS / "profiles" / name)
    assert profile.num_stages == COMMITTED[name].stages
    for kind in (Kind.FORWARD, Kind.BACKWARD):
        fastest_s = [profile.of(InstructionType(stage, 0, kind))[0].time_s for stage in range(profile.num_stages)]
        assert len(set(fastest_s[:-1])) == 1
        assert 1.01 < fastest_s[-1] / fastest_s[0] < 1.25


@gpus
def test_simulated_gpus_are_those_of_the_model(gpu: GpuModel) -> None:
    """The descriptions in configs/gpus agree with the model, and their profile loads."""
    key = next(key for key, model in GPUS.items() if model is gpu)
    description = Description.load(CONFIGS / "gpus" / f"{key}.json")
    assert description.name == gpu.name
    assert description.supported_clocks_mhz == gpu.clocks_mhz
    assert description.power_limit_w == gpu.power_limit_w
    for clock in (gpu.min_clock_mhz, gpu.max_clock_mhz):
        assert description.blocking_power_at(clock) == pytest.approx(float(gpu.blocking_power_w(clock)), abs=0.06)
    profile = Profile.load(description.profile)
    assert profile.num_stages == description.num_gpus
    assert {m.clock_mhz for m in profile.measurements} <= set(gpu.clocks_mhz)
    assert max(m.energy_j / m.time_s for m in profile.measurements) <= description.power_limit_w


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CONFIGS / "make_profiles.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=CONFIGS.parent, env={"PYTHONPATH": "."})


def test_the_script_makes_a_profile(tmp_path: Path) -> None:
    """The file it writes loads, with the stages and clocks asked for."""
    path = tmp_path / "profile.csv"
    done = run_script(
        "--gpu", "h100", "--model", "bloom-176b", "--stages", "16", "--clocks", "1005:1980:75", "-o", str(path)
    )
    assert done.returncode == 0, done.stderr
    profile = Profile.load(path)
    assert profile.num_stages == 16
    assert {m.clock_mhz for m in profile.measurements} == set(range(1005, 1981, 75))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--clocks", "800:1000:15"), "clock 1000 MHz is not supported"),
        (("--clocks", "1000"), "is not LOW:HIGH:STEP"),
        (("--stages", "99"), "num_stages is 99, but gpt3-6.7b has 32 layers"),
    ],
)
def test_the_script_refuses_in_one_sentence(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    """Exit code 2, the reason on standard error, no traceback and no file."""
    path = tmp_path / "profile.csv"
    done = run_script(*arguments, "-o", str(path))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not path.exists()
