from __future__ import annotations

from dataclasses import replace

import pytest

from plora.models.spec import ModelSpec
from plora.profiler import (
    GPUS,
    MemoryModel,
    MemorySample,
    Profile,
    RoundSample,
    estimate,
    fit_profile,
    load_profile,
    profile_folder,
    profile_key,
    save_profile,
)
from plora.profiler.memory import Saved
from plora.profiler.store import MOST_ROUNDS, PROFILE_VERSION

MEMORY = MemoryModel(ModelSpec.preset("Qwen/Qwen2.5-7B"))
TIME = estimate(GPUS["h100"], MEMORY, (1, 2))
KEY = profile_key("NVIDIA H100 80GB HBM3", MEMORY, "2.13.0")
PROFILE = Profile(
    KEY,
    {1: replace(TIME.cost(1), floor=0.5, estimated=False)},
    Saved(1.1, 5),
    "2026-11-21",
    (RoundSample(100, 800, 1, 1e6, 1, 0.5, 20.0, 1e4), RoundSample(900, 800, 2, 1e6, 1, 0.9)),
    (MemorySample(10**9, 8, 1024, 10**10, 11 * 10**9, labels=300),),
    {"save": 0.25},
)


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
        profile_key("NVIDIA H100 80GB HBM3", replace(MEMORY, graph_tokens=512), "2.13.0"),
        profile_key("NVIDIA H100 80GB HBM3", replace(MEMORY, moments="8bit"), "2.13.0"),
        profile_key("NVIDIA H100 80GB HBM3", replace(MEMORY, activation_checkpointing=3), "2.13.0"),
        profile_key("NVIDIA H100 80GB HBM3", MEMORY, "2.13.0", "cuda"),
        profile_key("NVIDIA H100 80GB HBM3", replace(MEMORY, spec=replace(MEMORY.spec, name="b")), "2.13.0"),
    ]
    assert all(load_profile(key, tmp_path) is None for key in others)
    assert len({key.filename for key in [KEY, *others]}) == 11


def test_applying_a_profile_keeps_estimates_of_what_was_not_measured():
    memory, time = PROFILE.apply(MEMORY, TIME)
    assert memory.calibration == Saved(1.1, 5)
    assert time.cost(1).floor == 0.5
    assert time.cost(2) == TIME.cost(2)
    assert time.source == "measured 2026-11-21"


@pytest.mark.parametrize("text", ["", "{}", "[1]", f'{{"version": {PROFILE_VERSION}, "key": 3}}'])
def test_a_damaged_file_is_named(tmp_path, text):
    path = save_profile(PROFILE, tmp_path)
    path.write_text(text)
    with pytest.raises(ValueError, match=r"the stored profile .*H100.* is damaged .* delete it"):
        load_profile(KEY, tmp_path)


def test_a_profile_of_another_version_is_measured_anew(tmp_path):
    path = save_profile(PROFILE, tmp_path)
    path.write_text(path.read_text().replace(f'"version": {PROFILE_VERSION}', '"version": 2'))
    assert load_profile(KEY, tmp_path) is None


def test_later_measurements_join_the_earlier_ones_and_the_oldest_go():
    prior = TIME.cost(1)
    sizes = [128 * 2**i for i in range(6)]

    def rounds(factor):
        plain = [RoundSample(tokens, 8 * tokens, 1, 2e7, 1, 1.0) for tokens in sizes]
        return [replace(each, seconds=factor * each.predicted(prior)) for each in plain]

    first = fit_profile(KEY, MEMORY, prior, rounds(2.0), PROFILE.peaks, "2026-11-21")
    assert first.costs[1].per_token == pytest.approx(2 * prior.per_token, rel=1e-3)
    assert first.peaks == PROFILE.peaks
    second = fit_profile(KEY, MEMORY, prior, rounds(4.0), [], "2026-11-22", before=first, extras={"start": 9.0})
    assert len(second.rounds) == 12
    assert 2 * prior.per_token < second.costs[1].per_token < 4 * prior.per_token
    assert second.memory == first.memory
    for _ in range(20):
        second = fit_profile(KEY, MEMORY, prior, rounds(4.0), [], "2026-11-23", before=second)
    assert len(second.rounds) == MOST_ROUNDS
    assert second.costs[1].per_token == pytest.approx(4 * prior.per_token, rel=1e-3)
    # What was measured beside rounds is no matter of their speed.
    assert (first.costs[1].start, second.costs[1].start) == (prior.start, 9.0)


def test_many_rounds_of_a_job_count_as_a_few():
    prior = TIME.cost(1)
    alike = [RoundSample(1000 + i, 8000, 4, 2e7, 1, 0.5) for i in range(50)]
    straggler = RoundSample(1003, 8000, 4, 2e7, 1, 60.0)
    profile = fit_profile(KEY, MEMORY, prior, [*alike, straggler], [], "2026-11-22")
    (kept,) = profile.rounds
    assert (kept.adapters, kept.seconds) == (4, 0.5)
    assert kept.tokens == pytest.approx(1024, rel=0.01)


def test_profiles_lie_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("PLORA_CACHE", str(tmp_path))
    assert profile_folder() == tmp_path / "profiles"
