from __future__ import annotations

from dataclasses import replace

import pytest

from plora.models.spec import ModelSpec
from plora.profiler import GPUS, MemoryModel, Profile, estimate, load_profile, profile_key, save_profile
from plora.profiler.memory import Saved

MEMORY = MemoryModel(ModelSpec.preset("Qwen/Qwen2.5-7B"))
TIME = estimate(GPUS["h100"], MEMORY, (1, 2))
KEY = profile_key("NVIDIA H100 80GB HBM3", MEMORY, "2.13.0")
PROFILE = Profile(KEY, {1: replace(TIME.cost(1), floor=0.5, estimated=False)}, Saved(1.1, 5), "2026-11-21")


def test_a_profile_comes_back_as_it_was(tmp_path):
    path = save_profile(PROFILE, tmp_path / "profiles")
    assert path.parent == tmp_path / "profiles"
    assert load_profile(KEY, tmp_path / "profiles") == PROFILE
    newer = replace(PROFILE, date="2026-11-22")
    assert save_profile(newer, tmp_path / "profiles") == path
    assert load_profile(KEY, tmp_path / "profiles") == newer
    assert [file.name for file in (tmp_path / "profiles").iterdir()] == [path.name]


def test_every_part_of_the_key_tells_profiles_apart(tmp_path):
    save_profile(PROFILE, tmp_path)
    others = [
        profile_key("NVIDIA A10", MEMORY, "2.13.0"),
        profile_key("NVIDIA H100 80GB HBM3", MEMORY, "2.14.0"),
        profile_key("NVIDIA H100 80GB HBM3", replace(MEMORY, activation_checkpointing=True), "2.13.0"),
        profile_key("NVIDIA H100 80GB HBM3", replace(MEMORY, quantize="nf4"), "2.13.0"),
        profile_key("NVIDIA H100 80GB HBM3", replace(MEMORY, compiled=True), "2.13.0"),
        profile_key("NVIDIA H100 80GB HBM3", replace(MEMORY, spec=replace(MEMORY.spec, name="b")), "2.13.0"),
    ]
    assert all(load_profile(key, tmp_path) is None for key in others)
    assert len({key.filename for key in [KEY, *others]}) == 7


def test_applying_a_profile_keeps_estimates_of_what_was_not_measured():
    memory, time = PROFILE.apply(MEMORY, TIME)
    assert memory.calibration == Saved(1.1, 5)
    assert time.cost(1).floor == 0.5
    assert time.cost(2) == TIME.cost(2)
    assert time.source == "measured 2026-11-21"


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": 1, "key": 3}'])
def test_a_damaged_file_is_named(tmp_path, text):
    path = save_profile(PROFILE, tmp_path)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"the stored profile .*H100.* is damaged .* delete it"):
        load_profile(KEY, tmp_path)


def test_a_profile_of_another_version_is_measured_anew(tmp_path):
    path = save_profile(PROFILE, tmp_path)
    path.write_text(path.read_text().replace('"version": 1', '"version": 0'))
    assert load_profile(KEY, tmp_path) is None
