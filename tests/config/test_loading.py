from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plora.config import ConfigError, load, shipped
from plora.search.settings import DEFAULTS, SETTINGS

METRIC = "os.path.join"  # any callable will do


def changed(base: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """``base`` with the value at ``path`` replaced."""
    head, _, rest = path.partition(".")
    inner = base.get(head)
    return {**base, head: changed(inner if isinstance(inner, dict) else {}, rest, value) if rest else value}


# (what is changed in a right configuration, a part of the message)
BAD = [
    ("outputdir", "x", r"outputdir.*did you mean 'output_dir'"),
    ("model.dtyp", "bf16", r"model\.dtyp: unknown key; did you mean 'dtype'"),
    ("trial.learning_rat", 1e-3, r"trial\.learning_rat"),
    ("trial.gradient_accumulation_steps", 4, r"batch_size is examples per optimizer step"),
    ("search.space.gradient_accumulation_steps", [1, 2], r"batch_size is examples per optimizer step"),
    ("search.space.lr.hihg", 1.0, r"search\.space\.lr\.hihg: unknown key; did you mean 'high'"),
    ("evaluation.generation.max_token", 3, r"did you mean 'max_new_tokens'"),
    ("output_dir", 3, r"output_dir = 3: must be text"),
    ("model", "Qwen", r"model = 'Qwen': must be a mapping"),
    ("model.source", None, r"model\.source = None: must be text"),
    ("model.dtype", "bfloat16", r"did you mean 'bf16'"),
    ("model.activation_checkpointing", "yes", r"must be true or false, or a number of layers from 1, or 'auto'"),
    ("model.activation_checkpointing", 0, r"or a number of layers from 1"),
    ("packing.optimizer_state", "8 bit", r"one of exact, 8bit; did you mean '8bit'"),
    ("model._component_", "no_such_package_here.f", r"no package 'no_such_package_here'"),
    ("model._component_", "f", r"dotted name"),
    ("tokenizer.chat_template", "nowhere.jinja", r"no such file"),
    ("tokenizer.max_seq_len", "long", r"whole number"),
    ("tokenizer.too_long", "cut", r"drop, truncate, error"),
    ("device", "gpu", r"auto, cpu, cuda"),
    ("log_level", "LOUD", r"DEBUG"),
    ("seed", -1, r"seed = -1"),
    ("trial.lr", 0, r"trial\.lr = 0: must be a number greater than 0"),
    ("trial.lr", -1e-4, r"greater than 0"),
    ("trial.lr", "2e-4x", r"must be a number greater than 0, not text"),
    ("trial.lr", float("nan"), r"trial\.lr"),
    ("trial.lr", float("inf"), r"trial\.lr"),
    ("trial.rank", 0, r"trial\.rank = 0: must be a whole number from 1 to 256"),
    ("trial.rank", 257, r"from 1 to 256"),
    ("trial.rank", 8.5, r"whole number"),
    ("trial.rank", True, r"trial\.rank = True"),
    ("trial.dropout", 1.0, r"less than 1"),
    ("trial.batch_size", 0, r"at least 1"),
    ("trial.epochs", 0, r"trial\.epochs = 0"),
    ("trial.schedule", "cosin", r"did you mean 'cosine'"),
    ("trial.betas", [0.9], r"two numbers"),
    ("trial.betas", [0.9, 1.0], r"less than 1"),
    ("trial.target_modules", ["q_prj"], r"did you mean 'q_proj'"),
    ("trial.target_modules", ["xyzzy"], r"no linear layer named 'xyzzy'"),
    ("trial.target_modules", ["lm_head"], r"output head.*stays frozen"),
    ("trial.target_modules", ["embed_tokens"], r"embedding.*stays frozen"),
    ("trial.target_modules", ["w1"], r"torchtune's name.*gate_proj"),
    ("trial.target_modules", "q_proj", r"a list of layer names"),
    ("trial.target_modules", [], r"a list of layer names"),
    ("trial.dataset", "other", r"no data set of this name"),
    ("trial", {"alpha": 16, "alpha_over_rank": 2}, r"alpha: cannot be given beside alpha_over_rank"),
    ("trial", {"epochs": 1, "max_steps": 2}, r"cannot be given beside"),
    ("trial", {"warmup_fraction": 0.1, "warmup_steps": 2}, r"cannot be given beside"),
    ("search.sampler", "grdi", r"search\.sampler"),
    ("search.sampler", {"_component_": "optuna.samplers.RandomSampler", "sede": 3}, r"does not accept"),
    ("search.sampler", "grid", r"search\.space\.lr: a grid needs a list"),
    ("search.sampler", "list", r"search\.trials: is missing"),
    ("search.n_trials", 0, r"search\.n_trials = 0"),
    ("search.n_trials", 10**12, r"search\.n_trials = 1000000000000"),
    ("search.n_trials", None, r"search\.n_trials: is missing"),
    ("search.trials", [{"rank": 4}], r"cannot be given beside search\.trials"),
    ("search", {"trials": [{"rank": 4}, {"rank": 4}]}, r"search\.trials\[1\].*same settings as search\.trials\[0\]"),
    ("search", {"trials": [{"rank": 16}]}, r"same settings as the default trial"),
    ("search", {"trials": [{"rank": 16, "alpha": 32}]}, r"same settings as the default trial"),
    ("search", {"trials": [{"rank": 4}], "n_trials": 9}, r"make it 2, or remove it"),
    ("search", {"trials": {"rank": 4}}, r"must be a list such as"),
    ("search", {"trials": [{"rnak": 4}]}, r"search\.trials\[0\]\.rnak.*did you mean 'rank'"),
    ("search.space.rank", [], r"empty list"),
    ("search.space.rank", [8, 0], r"search\.space\.rank = 0"),
    ("search.space.rank", {"low": 0, "high": 8}, r"search\.space\.rank\.low = 0"),
    ("search.space.rank", {"low": 8}, r"search\.space\.rank\.high: is missing"),
    ("search.space.rank", {"low": 8, "high": 4}, r"swap them"),
    ("search.space.rank", {"low": 4, "high": 8, "step": 1.5}, r"whole number"),
    ("search.space.rank", {"low": 4, "high": 8, "step": 0}, r"greater than 0"),
    ("search.space.rank", {"low": 4, "high": 8, "step": 2, "log": True}, r"cannot be combined"),
    ("search.space.dropout", {"low": 0, "high": 0.5, "log": True}, r"greater than 0 where log"),
    ("search.space.schedule", {"low": 0, "high": 1}, r"cannot be a range"),
    ("search.space.dataset", {"low": 0, "high": 1}, r"data set names, not a range"),
    ("search.space.dataset", ["dataset", "other"], r"'other': there is no data set"),
    ("search.space.target_modules", [["q_proj"], ["v_prj"]], r"did you mean 'v_proj'"),
    ("search.space", {"alpha": [1, 2], "alpha_over_rank": [1, 2]}, r"cannot be given beside"),
    ("dataset", None, r"dataset: is missing"),
    ("datasets", {"a": {"source": "x"}}, r"cannot be given beside dataset"),
    ("dataset._component_", "no_such_package_here.f", r"no package"),
    ("dataset_val", "validation", r"dataset_val = 'validation': must be a mapping"),
    ("objective.metric", "exact_match", r"needs evaluation\.generation"),
    ("objective.metric", "accuracy", r"did you mean 'label_accuracy'"),
    ("objective.metric", "os.path.jion", r"did you mean 'join'"),
    ("objective.metric", "no_such_package_here.f", r"no module 'no_such_package_here'"),
    ("objective.metric", "os.sep", r"not callable"),
    ("objective.metric", METRIC, r"objective\.direction: is missing"),
    ("objective.direction", "up", r"minimize, maximize"),
    ("evaluation.every", 0, r"evaluation\.every = 0"),
    ("evaluation.every", 1.5, r"from 0\.0001 to 1"),
    ("evaluation.every", 1e-9, r"from 0\.0001 to 1"),
    ("evaluation.generation.answer", "(", r"not a regular expression"),
    ("evaluation.generation.top_k", 0, r"top_k = 0"),
    ("export.keep", "some", r"or 'all'"),
    ("export.dtype", "fp16", r"bf16, fp32"),
    ("packing.memory_fraction", 1.1, r"memory_fraction = 1\.1"),
    ("packing.solver", "highs", r"did you mean 'HiGHS'"),
    ("packing.tokens_per_microbatch", 0, r"or 'auto'"),
    ("metric_logger", [{"project": "x"}], r"metric_logger\[0\]\._component_: is missing"),
    ("metric_logger", {"_component_": "no_such_package_here.F"}, r"no package"),
    ("model.revision", "${nowhere.at.all}", r"model\.revision: cannot be worked out"),
    ("model.revision", "???", r"model\.revision: is \?\?\?"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD, ids=[f"{path}={value}"[:60] for path, value, _ in BAD])
def test_bad_input_is_named(raw: dict[str, Any], path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(changed(raw, path, value))


def test_the_right_configuration_is_right(raw: dict[str, Any]) -> None:
    config = load(raw)
    assert [trial.name for trial in config.trials] == ["default", "t001", "t002", "t003"]
    assert [trial.number for trial in config.trials] == [0, 1, 2, 3]
    assert not config.warnings
    assert len({trial.lr for trial in config.trials}) == 4


def test_all_mistakes_come_at_once_and_each_once(raw: dict[str, Any]) -> None:
    bad = {
        **raw,
        "model": {"dtype": "int3", "source": "${nowhere}"},
        "trial": {"rank": 0, "lr": -1, "gradient_accumulation_steps": 2},
        "serach": {},
        "evaluation": {"every": 7},
        "dataset_test": 3,
    }
    with pytest.raises(ConfigError) as caught:
        load(bad, ["packing.solver=glpk", "nonsense"])
    paths = [mistake.path for mistake in caught.value.mistakes]
    assert sorted(paths) == sorted(
        [
            "command line",
            "model.source",
            "model.dtype",
            "trial.rank",
            "trial.lr",
            "trial.gradient_accumulation_steps",
            "serach",
            "evaluation.every",
            "dataset_test",
            "packing.solver",
        ]
    )
    lines = str(caught.value).splitlines()
    assert lines[0] == "10 mistakes in the configuration:"
    assert [line.split(".")[0].strip() for line in lines[1:]] == [str(number) for number in range(1, 11)]


def test_a_mistake_is_found_within_five_seconds(tmp_path: Path, raw: dict[str, Any]) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump({**raw, "trial": {"rank": 0}}))
    program = (
        f"import time\nfrom plora.config import load\ntry:\n    load({str(file)!r})\n"
        "except ValueError as error:\n    print(error)\nprint(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "trial.rank = 0" in done.stdout
    # The process's own time: the machine that tests run on may be busy.
    assert float(done.stdout.splitlines()[-1]) < 5


def test_the_search_puts_the_other_way_of_saying_it_out_of_force(raw: dict[str, Any]) -> None:
    raw["trial"] = {"rank": 8, "alpha": 5.0, "epochs": 3, "warmup_fraction": 0.5}
    raw["search"]["space"] = {"alpha_over_rank": [4, 2], "max_steps": [7, 9], "warmup_steps": [3]}
    default, *searched = load(raw).trials
    assert (default.adapter.alpha, default.epochs, default.max_steps) == (5.0, 3.0, None)
    assert (default.warmup_fraction, default.warmup_steps) == (0.5, None)
    assert searched
    for trial in searched:
        assert trial.adapter.alpha in (16.0, 32.0)
        assert trial.epochs is None
        assert trial.max_steps in (7, 9)
        assert trial.warmup_steps == 3


def test_data_options_reach_the_trials_data(raw: dict[str, Any]) -> None:
    raw["dataset_val"] = {"split": "val"}
    raw["search"] = {"trials": [{"dataset.max_examples": 5}, {"dataset": {"max_examples": 6}}]}
    config = load(raw)
    assert [config.data_of(trial)[0].get("max_examples") for trial in config.trials] == [None, 5, 6]
    assert config.data_of(config.trials[1])[1:] == ({"split": "val"}, None)


def test_several_data_sets_may_have_their_own_validation(raw: dict[str, Any]) -> None:
    del raw["dataset"]
    raw["datasets"] = {"a": {"source": "x", "val": {"split": "dev"}}, "b": {"source": "y"}, "c": {"source": "z"}}
    raw["dataset_val"] = {"split": "validation"}
    raw["search"] = {"trials": [{"dataset": "b"}]}
    config = load(raw)
    assert config.data_of(config.trials[0]) == ({"source": "x"}, {"split": "dev"}, None)
    assert config.data_of(config.trials[1]) == ({"source": "y"}, {"split": "validation"}, None)
    assert config.warnings == ("datasets.c: no trial uses it",)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("objective.direction", "maximize", "puts the worst val_loss first"),
        ("search.space.rank", [8, 16, 8], "listed twice"),
        ("search.space.rank", {"low": 8, "high": 8}, "holds one value"),
        ("search.space.rank", {"low": 8, "high": 21, "step": 8}, "end at 16"),
        ("search.space", {"lr": [2e-4, 1e-3]}, "only 2 different trials"),
        ("search", {}, "default trial is the only one"),
        ("search.sampler", "optuna.samplers.TPESampler", "learns from results"),
        ("search", {"sampler": "grid", "n_trials": 3, "space": {"rank": [1, 2, 3, 4]}}, "random part"),
    ],
)
def test_what_has_no_effect_is_a_warning(raw: dict[str, Any], path: str, value: Any, message: str) -> None:
    (warning,) = load(changed(raw, path, value)).warnings
    assert message in warning


def test_data_at_hand_is_looked_at(raw: dict[str, Any], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1 + 1", "answer": "2"}\n')
    (tmp_path / "empty.jsonl").touch()
    columns = {"input": "question", "output": "answr"}
    del raw["dataset"]
    raw["datasets"] = {
        "a": {"source": str(rows), "column_map": columns},
        "b": {"source": str(tmp_path / "empty.jsonl")},
        "c": {"_component_": "plora.data.dates", "split": "dev"},
        "d": {"source": str(rows), "colum_map": {}},
    }
    raw["trial"] = {"rank": 0}
    with pytest.raises(ConfigError) as caught:
        load(raw)
    text = str(caught.value)
    assert "trial.rank = 0" in text
    assert "datasets.a.column_map.output: there is no column 'answr'" in text
    assert "datasets.b: " in text
    assert "datasets.c: there is no split 'dev'" in text
    assert "datasets.d.colum_map: unknown key" in text


def test_label_accuracy_needs_label_words(raw: dict[str, Any]) -> None:
    raw["objective"] = {"metric": "label_accuracy"}
    raw["dataset"] = {"source": "nyu-mll/glue", "name": "cola"}
    with pytest.raises(ConfigError, match=r"dataset\._component_: must be plora\.data\.classification"):
        load(raw)


def test_overrides(raw: dict[str, Any]) -> None:
    raw["dataset_test"] = {"split": "test"}
    overrides = [
        "trial.rank=4",
        "~dataset_test",
        "search.space.rank=[1, 2]",
        "seed=3",
        "model.revision=${model.source}",
    ]
    config = load(raw, [*overrides, "search.space.lr.high=1e-4"])
    assert config.trials[0].adapter.rank == 4
    assert config.dataset_test is None
    assert {trial.adapter.rank for trial in config.trials[1:]} <= {1, 2}
    assert config.trials[0].seed == 3
    assert config.model.revision == "a/model"
    assert all(trial.lr <= 1e-4 for trial in config.trials[1:])


def test_overrides_as_a_mapping(raw: dict[str, Any], tmp_path: Path) -> None:
    config = load(raw, {"trial.rank": 4, "search": {"n_trials": 2}, "output_dir": tmp_path / "other"})
    assert config.trials[0].adapter.rank == 4
    assert len(config.trials) == 2
    assert config.output_dir == tmp_path / "other"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trial.rank", "write key=value"),
        ("--seed=3", "write key=value"),
        ("~trial.rank", "no such key to remove"),
        ("~nothing", "no such key to remove; there are output_dir, model"),
        ("trial.betas=[0.9", "not valid YAML"),
        ("search.trials.0.lr=1", "can only be replaced as a whole"),
        ("trial..lr=1", "single dots"),
        ("search.trials=[{rank:4}]", "write a space after the colon"),
    ],
)
def test_bad_overrides(raw: dict[str, Any], override: str, message: str) -> None:
    raw["search"] = {"trials": [{"rank": 4}]}
    with pytest.raises(ConfigError, match=message):
        load(raw, [override])


def test_a_sweep_is_never_overwritten(raw: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    load(raw)
    (tmp_path / "run" / "study.db").touch()
    with pytest.raises(ConfigError, match=r"output_dir.*already holds a sweep.*another directory"):
        load(raw)
    with pytest.raises(ConfigError, match="already holds a sweep"):
        load(raw, ["plan_only=true"])  # its plan.json is of the sweep that ran
    assert load(raw, new_sweep=False).output_dir == tmp_path / "run"


def test_an_output_dir_that_cannot_be_made(
    raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file, not a directory"):
        load(raw, {"output_dir": str(tmp_path / "file" / "run")})
    with pytest.raises(ConfigError, match="is a file, not a directory"):
        load(raw, {"output_dir": str(tmp_path / "file" / "run"), "plan_only": True})
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match="no permission"):
        load(raw)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2\n", "must be a mapping"),
        ("", "must be a mapping"),
        ("just words", "just words: unknown key"),
        ("seed: 1\nseed: 2\n", r"not valid YAML.*duplicate"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(file)


def test_missing_files_name_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"no such file.*plora/quickstart"):
        load("nowhere.yaml")
    with pytest.raises(ConfigError, match="did you mean 'plora/quickstart'"):
        load("plora/quikstart")


@pytest.mark.parametrize("name", shipped.names())
def test_every_shipped_configuration_loads(name: str, tmp_path: Path) -> None:
    config = load(name, [f"output_dir={tmp_path / 'run'}"])
    assert len(config.trials) >= 8
    assert not config.warnings
    text = shipped.text_of(name)
    opening = text[: text.index("\n\n")]
    assert f"tune run plora_sweep --config {name}" in opening
    assert "output_dir=" in opening


def test_the_written_configuration_loads_to_the_same_sweep(tmp_path: Path) -> None:
    config = load("plora/qwen2_5_7b_gsm8k", [f"output_dir={tmp_path / 'run'}"])
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(commit="abc123"))
    again = load(file)
    assert again.model.revision == "abc123"
    assert again.trials == config.trials
    assert again.evaluation == config.evaluation


def test_defaults_are_settings_and_pass_their_own_checks() -> None:
    for name, value in DEFAULTS.items():
        assert SETTINGS[name].check(value) == value


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SECTIONS = ["seed", "model", "tokenizer", "dataset", "objective", "evaluation", "export", "packing", "metric_logger"]
TRIALS = ["trial", "trial.rank", "trial.lr", "trial.betas", "trial.target_modules", "evaluation.generation"]
SEARCHES = ["search", "search.space", "search.space.lr", "search.space.rank", "search.trials", "search.sampler"]
KEYS = st.sampled_from([*SECTIONS, *TRIALS, *SEARCHES, "search.n_trials"])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=KEYS, value=JUNK)
def test_anything_at_all_loads_or_is_a_config_error(raw: dict[str, Any], path: str, value: Any) -> None:
    try:
        config = load(changed(raw, path, value))
    except ConfigError:
        return
    assert config.trials[0].name == "default"
