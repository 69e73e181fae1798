"""What a reader copies from the README works: its Python runs, its YAML loads, its commands name what exists."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from omegaconf import OmegaConf

import plora
from plora.checkpoint.layout import SweepLayout
from plora.config import load, shipped
from plora.config.components import COMPONENT, resolve
from plora.config.loading import KEYS
from plora.config.schema import DEFAULT_LOADER, DEFAULT_TOKENIZER
from plora.data.prompts import COMPONENTS
from plora.planner.preview import duration
from plora.report.results import TrialSummary, to_dataframe
from plora.report.sweep_result import SweepResult
from plora.search.settings import DATA_PREFIX, DEFAULTS, SETTINGS, Setting, setting_named

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fences(language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """The command lines of the shell blocks, as words."""
    lines = [line for block in fences("bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


# Read as plora reads them: plain YAML takes 2e-4 for text.
SNIPPETS: list[Any] = [OmegaConf.to_container(OmegaConf.create(block)) for block in fences("yaml")]
WHOLE = [snippet for snippet in SNIPPETS if {"output_dir", "model"} <= set(snippet)]
PARTS = [snippet for snippet in SNIPPETS if snippet not in WHOLE]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def components_of(node: Any) -> list[str]:
    """Every dotted name under ``_component_``."""
    if isinstance(node, dict):
        own = [node[COMPONENT]] if COMPONENT in node else []
        return own + [name for value in node.values() for name in components_of(value)]
    return [name for value in node for name in components_of(value)] if isinstance(node, list) else []


def with_part(part: dict[str, Any]) -> dict[str, Any]:
    """The whole example with a part of another snippet in place of its own."""
    whole = dict(WHOLE[0])
    if "datasets" in part:
        del whole["dataset"]
    return {**whole, **part}


@pytest.mark.parametrize("raw", [*WHOLE, *map(with_part, PARTS)], ids=lambda raw: "+".join(raw))
def test_yaml_loads(raw: dict[str, Any], tmp_path: Path) -> None:
    config = load(raw, {"output_dir": str(tmp_path / "run")})
    assert len(config.trials) > 1
    for name in components_of(raw):
        assert name in COMPONENTS or callable(resolve(name)), name


def test_the_whole_example_has_every_section_and_no_warning(tmp_path: Path) -> None:
    assert len(WHOLE) == 1
    assert set(KEYS) - {"datasets", "hardware"} == set(WHOLE[0])
    (tmp_path / "my.yaml").write_text(next(block for block in fences("yaml") if "output_dir:" in block))
    config = load(tmp_path / "my.yaml", [f"output_dir={tmp_path / 'run'}"])
    assert config.warnings == ()
    assert (config.model.component, config.tokenizer.component) == (DEFAULT_LOADER, DEFAULT_TOKENIZER)


def test_sweep_snippet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that checks the configuration and returns a real result, but trains nothing."""
    asked = []

    def sweep(config: Any, **overrides: Any) -> SweepResult:
        asked.append(load(config, {key.replace("__", "."): value for key, value in overrides.items()}))
        ranked = [TrialSummary(0, "default", val_loss=1.0, adapter_dir=tmp_path)]
        return SweepResult(to_dataframe(ranked), ranked[0], optuna.create_study(), asked[0].output_dir)

    monkeypatch.setattr(plora, "sweep", sweep)
    (code,) = [block for block in fences("python") if "plora.sweep(" in block]
    names: dict[str, Any] = {}
    exec(code, names)
    assert [config.trials[0].max_steps for config in asked] == [60]
    assert list(names["table"]["trial"]) == ["default"]
    assert isinstance(names["study"], optuna.Study)


def test_training_loop_snippet(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    (code,) = [block for block in fences("python") if "pack_adapters" in block]
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(code, names)
    history, model, tiny = names["history"], names["model"], names["tiny"]
    for slot in (0, 1):
        assert history[19][slot] < history[0][slot] - 0.02
    # The new adapter starts at the base's loss, the one beside it goes on.
    assert history[20][0] > history[19][0]
    assert history[20][1] < history[0][1]
    assert not hasattr(model, "plora")

    tokens = names["data"][0]
    model.eval()
    with torch.no_grad():
        plain = model(tokens).logits
        loaded = peft.PeftModel.from_pretrained(model, tmp_path / "adapters" / "first").eval()
        loss = loss_of(loaded(tokens).logits, tokens)
    assert loaded.config.hidden_size == tiny.hidden_size
    # Its last training loss was measured before its last step.
    assert loss.item() < history[19][0] + 0.01 < loss_of(plain, tokens).item()


def loss_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The snippet's loss."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def test_the_planner_s_picture_is_what_its_snippet_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = [block for block in fences("python") if "plan_on" in block]
    (shown,) = [block for block in fences("text") if block.startswith("Plan for")]
    names: dict[str, Any] = {}
    exec(code, names)
    printed = [line.rstrip() for line in capsys.readouterr().out.rstrip().splitlines()]
    assert printed == shown.splitlines(), "run the snippet under 'What the planner decides' and paste what it prints"
    plan, cost = names["plan"], names["problem"].time.cost(1)
    assert cost.floor == pytest.approx(0.011, abs=5e-4)
    assert round(cost.floor / (cost.per_token + cost.per_label)) == 177
    section = README.partition("## What the planner decides")[2].partition("\n## ")[0]
    for said in (f"before {duration(plan.lower_bound)}", "14.2 GiB", "10.8 GiB", "78.4 GiB", "1.28 times here"):
        assert said in section, said
    assert round(plan.baselines["best_one_at_a_time"] / plan.makespan, 2) == 1.28
    memory = names["memory"]
    sizes = memory.base_bytes(), memory.adapter_bytes(256), plan.free_bytes
    assert [f"{size / 2**30:.1f}" for size in sizes] == ["14.2", "10.8", "78.4"]


SHOWN = (("memory", "median"), ("memory", "max"), ("time", "median"), ("time", "max"))


def test_the_gains_of_packing_are_those_of_the_stored_figures() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "planner.json").read_text())
    ends = {(row["case"], row["provider"]): row["value"] for row in rows if row["metric"] == "makespan_s"}
    gains: dict[tuple[bool, str], list[float]] = {}
    for case in {case for case, _ in ends if "/120 configs/" in case}:
        for provider in ("best_one_at_a_time", "min_gpu"):
            gains.setdefault(("1024" in case, provider), []).append(ends[case, provider] / ends[case, "plora"])
    section = " ".join(README.partition("## What the planner decides")[2].partition("\n## ")[0].split())
    for key, low, high in (
        ((True, "best_one_at_a_time"), "1.00", "1.03"),
        ((True, "min_gpu"), "1.3", "2.8"),
        ((False, "best_one_at_a_time"), "1.16", "1.37"),
        ((False, "min_gpu"), "1.8", "7.8"),
    ):
        assert f"{low} to {high}" in section
        for text, value in ((low, min(gains[key])), (high, max(gains[key]))):
            assert f"{value:.{len(text.partition('.')[2])}f}" == text, key


def test_the_errors_of_the_cost_model_are_the_stored_ones() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "cost_model_cpu.json").read_text())
    errors = {(row["provider"], row["metric"]): f"{row['value']:.1%}" for row in rows if "error" in row["provider"]}
    section = " ".join(README.partition("## What the planner decides")[2].partition("\n## ")[0].split())
    own = errors["machine's own error", "median"]
    memory, time = ([errors[f"{what} error", metric] for metric in ("median", "max")] for what in ("memory", "time"))
    assert f"memory is off by {memory[0]} in the median and {memory[1]} at most" in section
    assert f"step times by {time[0]} and {time[1]}" in section
    assert f"differs from itself by {own}" in section
    assert f"{sum(row['metric'] == 'step' and row['provider'] == 'measured' for row in rows)} packs" in section


def test_the_errors_on_a_gpu_are_the_stored_ones() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "cost_model_h100.json").read_text())
    errors = {
        (row["case"], row["provider"], row["metric"]): f"{row['value']:.1%}" for row in rows if row["unit"] == "1"
    }
    section = " ".join(README.partition("## What the planner decides")[2].partition("\n## ")[0].split())
    seven, half = (
        [errors[f"qwen2.5-{size}", f"{what} error", metric] for what, metric in SHOWN] for size in ("7b", "0.5b")
    )
    assert (
        f"for Qwen2.5-7B the peak of memory is off by {seven[0]} in the median and {seven[1]} at most, step times by "
        f"{seven[2]} in the median and {seven[3]} at most; for Qwen2.5-0.5B by {half[0]} and {half[1]}, "
        f"{half[2]} and {half[3]}"
    ) in section
    rows = json.loads((ROOT / "benchmarks" / "results" / "cost_model_recomputed_h100.json").read_text())
    errors = {(row["case"], row["provider"], row["metric"]): row["value"] for row in rows if row["unit"] == "1"}
    sizes = [f"qwen2.5-{size}-instruct" for size in ("7b", "0.5b")]
    memory = max(errors[case, "memory error", "max"] for case in sizes)
    seven, half = (f"{errors[case, 'time error', 'max']:.1%}" for case in sizes)
    shown = f"recomputed in backward memory is off by {memory:.1%} at most, step times by {seven} and {half}"
    assert shown in section


def test_no_python_is_left_untested() -> None:
    assert len(fences("python")) == 3


def test_commands_name_what_exists(tmp_path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    seen = set()
    for words in commands():
        seen.add(words[0])
        if words[0] == "make":
            assert words[1] in targets
        elif words[:2] == ["plora", "cp"]:
            assert shipped.copy(words[2], tmp_path / words[3]).is_file()
        elif "--config" in words:
            assert words[:2] == ["plora", "run"] or words[:3] == ["tune", "run", "plora_sweep"]
            at = words.index("--config")
            load(words[at + 1], words[at + 2 :])
        else:
            assert words in (["plora", "ls"], ["pip", "install", "."])
    assert seen == {"make", "pip", "plora", "tune"}


def test_every_shipped_configuration_is_named_and_no_other() -> None:
    # A path such as plora/quickstart, not a folder of the repository.
    named = set(re.findall(r"(?<![\w/.])plora/[a-z]\w*(?![\w/])", README))
    assert named == set(shipped.names())


def test_dotted_names_and_files_exist() -> None:
    for name in set(re.findall(r"`(plora(?:\.\w+)+)`", README)):
        assert name in COMPONENTS or resolve(name) is not None
    for file in set(re.findall(r"(?:python |\]\()((?:benchmarks/)?[\w/]+\.(?:py|md)|LICENSE)", README)):
        assert (ROOT / file).is_file(), file


def table_of_settings() -> dict[str, tuple[str, str]]:
    """Default and range of each setting in the README's table, by name."""
    _, _, section = README.partition("### What can be searched")
    rows = [line.strip("|").split("|") for line in section.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    return {name.strip(" `"): (default.strip(" `"), ranged.strip()) for name, default, _, ranged in rows}


def test_table_of_settings_is_complete_and_true() -> None:
    table = table_of_settings()
    assert set(table) == {*SETTINGS, f"{DATA_PREFIX}<option>"}
    for name, (default, ranged) in table.items():
        setting = setting_named(name.replace("<", "").replace(">", ""))
        assert isinstance(setting, Setting)
        assert (ranged == "yes") is (setting.number is not None), name
        if name in DEFAULTS:
            read: Any = OmegaConf.to_container(OmegaConf.create(f"x: {default}"))
            assert setting.check(read["x"]) == DEFAULTS[name], name
        else:
            assert default in ("", "the sweep's", "the first"), name


def test_output_directory_is_told_as_it_is(tmp_path: Path) -> None:
    (listing,) = [block for block in fences("text") if block.startswith("output_dir/")]
    layout = SweepLayout(tmp_path)
    paths = [layout.config, layout.plan, layout.study, layout.results, layout.predictions_table]
    paths += [layout.report, layout.events, layout.log]
    named = re.findall(r"^  ([\w.]+)\s", listing, flags=re.MULTILINE)
    assert named == [path.name for path in paths]
    for path in (layout.metrics("t"), layout.predictions("t"), layout.predictions("t", "test")):
        assert re.search(rf"^  trials/<name>/ .*\b{path.name}\b", listing, flags=re.MULTILINE)
    for path in (layout.trials, layout.checkpoints):
        assert re.search(rf"^  {path.name}/", listing, flags=re.MULTILINE)
    assert "trials/<name>/adapter/" in listing
    assert layout.adapter("t").relative_to(tmp_path).as_posix() == "trials/t/adapter"


def test_the_performance_table_is_made_from_the_stored_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = importlib.import_module("table").markdown(ROOT / "benchmarks" / "results" / "step_h100.json")
    assert table in README, "run `python benchmarks/table.py benchmarks/results/step_h100.json` and paste its output"
