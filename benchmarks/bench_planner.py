"""How good plans are, and how long planning takes, on instances like PLoRA's.

    python benchmarks/bench_planner.py [--json FILE] [--case TEXT] [--quick]

120 configurations (learning rate and alpha, batch 1..32, rank 8..128; one epoch each) of Qwen2.5 3B/7B/14B/32B and
Llama 3.2 3B / 3.1 8B on 8 A100-40GB, 8 A10 and 8 H100, and 500 configurations on 64 H100. Times are predictions from
data sheets; sequences of 1024 tokens as in the paper, and "four data sets" with the lengths and sizes of GSM8K, MRPC,
CoLA and WNLI. Providers: our plan; its greedy start; PLoRA's planner as published (rank-weighted throughput,
event-driven); and the baselines of plora.planner.baselines.
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from plora.models.spec import ModelSpec
from plora.planner import Load, Problem, plan_on
from plora.planner.job_planner import plan_jobs
from plora.planner.jobs import Workshop, makespan
from plora.planner.solver import choose_solver
from plora.profiler import GPUS, MemoryModel
from plora.training.graphs import launch_bound_tokens
from records import Records

MODELS = {
    "qwen2_5_3b": "Qwen/Qwen2.5-3B",
    "qwen2_5_7b": "Qwen/Qwen2.5-7B",
    "qwen2_5_14b": "Qwen/Qwen2.5-14B",
    "qwen2_5_32b": "Qwen/Qwen2.5-32B",
    "llama3_2_3b": "meta-llama/Llama-3.2-3B",
    "llama3_1_8b": "meta-llama/Llama-3.1-8B",
}
RANKS = (8, 16, 32, 64, 128)
BATCHES = (1, 2, 4, 8, 16, 32)
# Tokens per example on average, of the longest, and training examples.
PAPER = (1024, 1024, 7473)
DATA_SETS = ((190, 512, 7473), (70, 160, 3668), (25, 64, 8551), (45, 128, 635))


@dataclass(frozen=True)
class Case:
    """An instance: model, device kind, their number, configurations, and whether they share one data set."""

    model: str
    gpu: str
    count: int
    configs: int
    mixed: bool = False

    @property
    def name(self) -> str:
        data = "four data sets" if self.mixed else "1024 tokens"
        return f"{self.model}/{self.configs} configs/{self.count} x {self.gpu}/{data}"

    def loads(self) -> list[Load]:
        """The configurations; learning rate and alpha do not concern the planner, so kinds repeat."""
        settings = list(itertools.islice(itertools.cycle(itertools.product(RANKS, BATCHES)), self.configs))
        choose = random.Random(17)
        loads = []
        for number, (rank, batch) in enumerate(settings):
            mean, longest, examples = choose.choice(DATA_SETS) if self.mixed else PAPER
            steps = -(-examples // batch)
            loads.append(Load(f"t{number:03d}", rank, steps, float(batch * mean), longest))
        return loads


def cases() -> Iterator[Case]:
    for model, gpu in itertools.product(MODELS, ("a100_40gb", "a10", "h100")):
        yield Case(model, gpu, 8, 120)
    for gpu in ("a100_40gb", "a10", "h100"):
        yield Case("qwen2_5_7b", gpu, 8, 120, mixed=True)
    yield Case("qwen2_5_7b", "h100", 64, 500)
    yield Case("qwen2_5_7b", "h100", 64, 500, mixed=True)


def measure(case: Case) -> list[tuple[str, str, float, str]]:
    """Provider, metric, value and unit of everything measured on a case."""
    spec = ModelSpec.preset(MODELS[case.model])
    memories = [
        MemoryModel(spec, "bf16", activation_checkpointing=checkpointing, compiled=True, graph_tokens=graphs)
        for checkpointing in (False, True)
        for graphs in (launch_bound_tokens(spec), 0)
    ]
    began = time.perf_counter()
    problem, plan = plan_on(
        case.loads(), memories, GPUS[case.gpu], case.count, time_limit=15 if case.count <= 8 else 40
    )
    seconds = time.perf_counter() - began
    rows = [
        ("plora", "makespan_s", plan.makespan, "s"),
        ("plora", "gap", plan.gap, "1"),
        ("plora", "plan_s", seconds, "s"),
        ("lower_bound", "makespan_s", plan.lower_bound, "s"),
        ("greedy", "makespan_s", plan.candidates["greedy"], "s"),
    ]
    rows += [(name, "makespan_s", end, "s") for name, end in plan.baselines.items()]
    end, took = as_published(problem)
    return [*rows, ("plora_as_published", "makespan_s", end, "s"), ("plora_as_published", "plan_s", took, "s")]


def as_published(problem: Problem) -> tuple[float, float]:
    """Makespan and planning time of PLoRA's own planner: its objective, its job planner."""
    began = time.perf_counter()
    placed = plan_jobs(
        Workshop(replace(problem, objective="rank_throughput")),
        solver=choose_solver("auto"),
        deadline=time.monotonic() + 20,
    )
    end = makespan(placed) if placed else float("nan")
    return end, time.perf_counter() - began


def show(results: dict[str, list[tuple[str, str, float, str]]]) -> None:
    table = Table(title="Predicted makespans relative to our plan; gap to the lower bound; seconds to plan")
    columns = ("greedy", "plora_as_published", "best_one_at_a_time", "sequential_packed", "min_gpu", "max_gpu")
    for heading in ("case", "makespan (s)", "gap", "plan (s)", *columns):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for name, rows in results.items():
        values = {(provider, metric): value for provider, metric, value, _ in rows}
        ours = values["plora", "makespan_s"]
        table.add_row(
            name,
            f"{ours:,.0f}",
            f"{values['plora', 'gap']:.2%}",
            f"{values['plora', 'plan_s']:.1f}",
            *(f"{values[column, 'makespan_s'] / ours:.2f}x" for column in columns),
        )
    Console(width=170).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the records here")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="three cases only")
    options = parser.parse_args()
    chosen = [case for case in cases() if options.case in case.name]
    if options.quick:
        chosen = chosen[:3]
    results = {case.name: measure(case) for case in chosen}
    show(results)
    records = Records("planner", f"planned on {os.cpu_count()} cores, {platform.machine()}")
    for name, rows in results.items():
        for provider, metric, value, unit in rows:
            records.add(name, provider, metric, value, unit, "makespans predicted with data-sheet cost models")
    records.write(options.json)


if __name__ == "__main__":
    main()
