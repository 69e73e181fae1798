from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from optuna.trial import TrialState
from safetensors.torch import load_file
from transformers import AutoTokenizer

from plora.search.study import open_study
from tests.engine import oracle, tiny
from tests.engine.conftest import Finished, run

Settings = Callable[..., tiny.Tree]
SHORT = {"trial": {"rank": 2, "lr": 1e-3, "max_steps": 2}, "search": {"trials": [{"lr": 2e-3}, {"lr": 4e-3}]}}
LETTERS = "tests.engine.tiny.shares_letters"


def answered(finished: Finished, split: str) -> dict[str, list[float]]:
    """The scores in the predictions files, by trial."""
    files = finished.layout.trials.glob(f"*/predictions_{split}.jsonl")
    return {path.parent.name: [line["score"] for line in tiny.read_lines(path)] for path in files}


def is_within_noise(first: list[float], second: list[float]) -> bool:
    """Whether their mean difference is at most two standard errors of the paired differences."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    return abs(statistics.mean(differences)) <= 2 * statistics.stdev(differences) / math.sqrt(len(differences))


def test_only_the_best_by_loss_default_and_base_answer(by_answers: Finished) -> None:
    assert by_answers.result.best is not None
    assert by_answers.result.best.name == "t002"
    val = answered(by_answers, "val")
    assert set(val) == {"t002", "default", "base"}
    for name, scores in val.items():
        assert len(scores) == 3  # of the six, as max_examples says
        assert by_answers.rows[name]["objective"] == sum(scores) / 3
    assert by_answers.rows["t002"]["objective"] == 1.0
    assert by_answers.rows["base"]["objective"] == by_answers.rows["default"]["objective"] == 0.0
    assert not any(row["tied"] for row in by_answers.rows.values())
    assert all(math.isnan(by_answers.rows[name]["objective"]) for name in ("t001", "t003"))
    assert list(by_answers.rows)[3:] == ["t003", "t001"]  # after those with an objective, by validation loss


def test_the_whole_test_split_is_answered_once_by_winner_default_and_base(by_answers: Finished) -> None:
    assert {name: len(scores) for name, scores in answered(by_answers, "test").items()} == {
        "t002": 4, "default": 4, "base": 4,
    }  # fmt: skip
    assert by_answers.rows["t002"]["test_score"] == 1.0


def test_trials_that_did_not_answer_are_pruned_in_the_study(by_answers: Finished) -> None:
    study = open_study(by_answers.layout.root)
    assert {trial.user_attrs["name"]: trial.state for trial in study.trials} == {
        "default": TrialState.COMPLETE, "t001": TrialState.PRUNED, "t002": TrialState.COMPLETE,
        "t003": TrialState.PRUNED,
    }  # fmt: skip
    learner = study.trials[2]
    assert learner.value == 1.0
    assert learner.user_attrs["scores"]["val_loss"] == pytest.approx(by_answers.rows["t002"]["val_loss"])
    assert "no answers" in study.trials[1].user_attrs["reason"]
    assert study.best_trial.user_attrs["name"] == "t002"


def test_predictions_are_what_peft_generates(by_answers: Finished, model: Path) -> None:
    tuned = oracle.peft_model(model, by_answers.layout.adapter("t002")).float()
    tokenizer = AutoTokenizer.from_pretrained(by_answers.layout.adapter("t002"))
    for line in tiny.read_lines(by_answers.layout.predictions("t002")):
        question = line["prompt"].removeprefix("user\n\n").removesuffix("assistant\n\n")
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        stop = tokenizer.convert_tokens_to_ids("<|eot_id|>")
        with torch.no_grad():
            out = tuned.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, eos_token_id=stop)
        assert tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True) == line["prediction"]


def test_only_the_winner_is_exported_and_in_bf16_if_asked(by_answers: Finished) -> None:
    (weights,) = by_answers.layout.root.rglob("adapter_model.safetensors")
    assert weights.parent == by_answers.layout.adapter("t002")
    assert {x.dtype for x in load_file(weights).values()} == {torch.bfloat16}
    assert [name for name, row in by_answers.rows.items() if isinstance(row["adapter_dir"], str)] == ["t002"]


def test_a_callable_is_the_objective_of_all_trials(settings: Settings) -> None:
    generation = {"top_k": None, "max_new_tokens": 4}
    objective = {"metric": LETTERS, "direction": "maximize"}
    done = run(settings(**SHORT, objective=objective, evaluation={"generation": generation}))
    val = answered(done, "val")
    assert {name: len(scores) for name, scores in val.items()} == dict.fromkeys(("default", "t001", "t002", "base"), 6)
    for name, scores in val.items():
        assert done.rows[name]["objective"] == pytest.approx(sum(scores) / 6)
    lines = tiny.read_lines(done.layout.predictions("base"))
    expected = [len(set(each["prediction"]) & set(each["reference"])) / len(set(each["reference"])) for each in lines]
    assert [each["score"] for each in lines] == expected
    assert any(expected)
    best = done.result.best.name  # type: ignore[union-attr]
    tied = {name for name in ("default", "t001", "t002") if name != best and is_within_noise(val[name], val[best])}
    assert {name for name, row in done.rows.items() if row["tied"]} == tied
    assert tied
    assert open_study(done.layout.root).metric_names == [LETTERS]


def test_bases_of_two_data_sets_answer_their_own_questions_once(settings: Settings, data: Path) -> None:
    changes = tiny.two_datasets(data) | {"packing": {"max_adapters": 2}, "export": {"keep": 0}}
    changes["objective"] = {"metric": LETTERS, "direction": "maximize"}
    done = run(settings(**changes, evaluation={"generation": {"top_k": 2, "max_new_tokens": 4}}))
    val, test = answered(done, "val"), answered(done, "test")
    assert {"base-questions", "base-orders", "default"} <= set(val)
    assert 4 <= len(val) <= 5
    for name, scores in val.items():
        assert len(scores) == 6
        assert done.rows[name]["objective"] == pytest.approx(sum(scores) / 6)
    for name, asked in (("base-questions", "What is 12?"), ("base-orders", "Say 12")):
        assert asked in tiny.read_lines(done.layout.predictions(name))[0]["prompt"]
    best = done.result.best
    assert best is not None
    assert set(test) == {best.name, "default", f"base-{best.settings['dataset']}"}


def test_answers_watched_while_training_are_told_once_and_an_answer_rule_may_be_a_callable(settings: Settings) -> None:
    generation = {"top_k": 1, "max_new_tokens": 4, "every": 0.5, "answer": LETTERS, "max_examples": 2}
    done = run(settings(**SHORT, objective={"metric": "exact_match"}, evaluation={"generation": generation}))
    study = open_study(done.layout.root)
    for trial in study.trials:
        name = trial.user_attrs["name"]
        evals = [line for line in tiny.read_lines(done.layout.metrics(name)) if line["kind"] == "eval"]
        assert [line["step"] for line in evals if "exact_match" in line] == [1, 2]
        assert trial.state is TrialState.COMPLETE
        assert trial.value == done.rows[name]["objective"] == pytest.approx(evals[-1]["exact_match"])
    best = max((trial.value, -trial.number) for trial in study.trials)
    assert done.result.best is not None
    assert done.result.best.objective == best[0]
    assert set(answered(done, "val")) <= {done.result.best.name, "default", "base"}


def test_answers_watched_beside_a_loss_do_not_take_its_place(settings: Settings, by_loss: Finished) -> None:
    generation = {"max_new_tokens": 4, "every": 0.5}
    done = run(settings(search={"trials": tiny.MIXED[:1]}, evaluation={"every": None, "generation": generation}))
    watched = [line for line in tiny.read_lines(done.layout.metrics("t001")) if line["kind"] == "eval"]
    assert [(line["step"], "val_loss" in line) for line in watched] == [(2, False), (4, True)]
    assert done.rows["t001"]["val_loss"] == pytest.approx(by_loss.rows["t001"]["val_loss"], rel=1e-5)
    last = tiny.read_lines(done.layout.metrics("t001"))[-1]
    assert last["exact_match"] == 0.0
    assert last["val_loss"] == pytest.approx(done.rows["t001"]["val_loss"])


def test_label_accuracy_ranks_a_classification(settings: Settings, data: Path) -> None:
    words = ["yes", "no", "maybe"]
    dataset = {"_component_": "plora.data.classification", "source": str(data / "train.jsonl")}
    dataset |= {"text_columns": ["question"], "label_column": "label", "label_words": words}
    learner = {"rank": 8, "lr": 3e-2, "batch_size": 12, "max_steps": 25, "target_modules": "all-linear"}
    done = run(
        settings(dataset=dataset, search={"trials": [learner]}, objective={"metric": "label_accuracy"}),
        trial__max_steps=1,
    )
    assert done.result.best is not None
    assert done.result.best.name == "t001"
    assert done.rows["t001"]["objective"] == done.rows["t001"]["test_score"] == 1.0
    assert done.rows["base"]["objective"] < 1.0
    assert not math.isnan(done.rows["base"]["test_score"])
    assert {trial.state for trial in open_study(done.layout.root).trials} == {TrialState.COMPLETE}
