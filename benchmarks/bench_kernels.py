"""The packed kernels against their byte floors and plain torch, and a layer's linears against the frozen ones.

    python benchmarks/bench_kernels.py                    # the table
    python benchmarks/bench_kernels.py --json FILE        # and records of it
    python benchmarks/bench_kernels.py --sweep            # the tuned parameters' neighbours, to choose a row by

Times are medians over replays of a CUDA graph that rotates among input sets larger than the L2 cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from records import Records

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the baselines are the tests'

from plora.kernels import cuda, reference, schedule
from tests.kernels.problem import STANDARD_MIX, Problem, ragged

TOKENS = 8192
QWEN_7B = {"q": (3584, 3584), "k": (3584, 512), "v": (3584, 512), "o": (3584, 3584), "gate": (3584, 18944),
           "up": (3584, 18944), "down": (18944, 3584)}  # fmt: skip
LLAMA_8B = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096), "gate": (4096, 14336),
            "up": (4096, 14336), "down": (14336, 4096)}  # fmt: skip
MIXES = {"standard mix": STANDARD_MIX, "128 x r16": [16] * 128}
ROTATED_BYTES = 150e6  # thrice the L2 cache of an H100


def microseconds(calls: list[Callable[[], object]], replays: int = 15) -> float:
    """Median time of one call; the calls do the same to different inputs."""
    each = max(1, -(-12 // len(calls)))
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(each):
            for call in calls:
                call()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:]) * 1e3 / (each * len(calls))


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read and written bytes counted: what floors are computed with.

    The faster of torch's copy and an elementwise kernel.
    """
    source = torch.randn(2**29, device="cuda").bfloat16()
    target = torch.empty_like(source)
    took = min(microseconds([lambda: target.copy_(source)]), microseconds([lambda: torch.neg(source, out=target)]))
    return 2 * source.nbytes / (took * 1e-6)


class Case:
    """The five kernels on ``Problem``s of one width, and plain torch's forms of them."""

    def __init__(self, width: int, ranks: list[int], counts: list[int]) -> None:
        sets = max(1, -(-int(ROTATED_BYTES) // (sum(counts) * width * 2)))
        self.width, self.ranks = width, ranks
        self.problems = [Problem(width, width, ranks, counts, seed=i) for i in range(sets)]
        # hidden, and room for another
        self.state = [(p.random(p.rows, p.columns), p.random(p.rows, p.columns)) for p in self.problems]
        self.out = [torch.empty_like(p.y) for p in self.problems]

    def floors(self, bandwidth: float) -> dict[str, float]:
        """Least microseconds of each kernel: inputs read once, outputs and gradients written once."""
        first = self.problems[0]
        rows = first.tables.rows.diff()[:-1]
        tokens = first.rows * self.width * 2
        factors, hidden = sum(self.ranks) * self.width * 2, int((rows * first.tables.rank).sum()) * 2
        numbers = {
            "down": tokens + factors + hidden,
            "up_add": 2 * tokens + factors + hidden,
            "grad_hidden_and_up": tokens + 3 * factors + 2 * hidden,
            "grad_down": tokens + 2 * factors + hidden,
            "down_add": tokens + factors + hidden,
        }
        return {name: n / bandwidth * 1e6 for name, n in numbers.items()}

    def down(self, i: int, steps: int = 0) -> None:
        p = self.problems[i]
        cuda.down(p.x, p.weight, self.state[i][1], p.work, p.token_index, steps=steps)

    def up_add(self, i: int, steps: int = 0) -> None:
        p = self.problems[i]
        cuda.up(p.y, self.state[i][0], p.weight, self.out[i], p.work, p.token_index, steps=steps)

    def grad_hidden_and_up(self, i: int, clusters: bool | None = None, per_run: int = 0) -> None:
        p, (hidden, dhidden) = self.problems[i], self.state[i]
        cuda.grad_hidden_and_up(
            p.dy, hidden, p.weight, dhidden, p.grad, p.work, p.token_index, clusters=clusters, clusters_per_run=per_run
        )

    def grad_down(self, i: int) -> None:
        p = self.problems[i]
        cuda.grad_factor(p.x, self.state[i][0], p.grad, p.work, p.token_index)

    def down_add(self, i: int, steps: int = 0) -> None:
        p = self.problems[i]
        cuda.up(None, self.state[i][0], p.weight, self.out[i], p.work, p.token_index, backward=True, steps=steps)

    def time(self, call: Callable[[int], object]) -> float:
        return microseconds([lambda i=i: call(i) for i in range(len(self.problems))])  # type: ignore[misc]

    def loop(self) -> dict[str, float]:
        """Plain torch, a loop over adapters: the forward's two products and the whole backward."""

        def forward(i: int) -> None:
            p = self.problems[i]
            reference.lora_add(p.x, p.y, p.weight, p.offsets, p.tables, p.token_index, p.columns)

        def backward(i: int) -> None:
            p = self.problems[i]
            hidden = self.state[i][0]
            reference.lora_add_backward(p.dy, p.x, hidden, p.weight, p.grad, p.offsets, p.tables, p.token_index, True)

        return {"forward": self.time(forward), "backward": self.time(backward)}

    def grouped(self) -> dict[str, float]:
        """Torch's grouped product, all adapters at the widest rank: ``down``, and ``up`` without the add."""
        p = self.problems[0]
        ends = p.tables.rows[1:-1].to("cuda", torch.int32)
        shape = (len(self.ranks), self.width, p.columns)
        factors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in self.problems]
        return {
            "down": self.time(lambda i: torch._grouped_mm(self.problems[i].x, factors[i], offs=ends)),
            "up without the add": self.time(
                lambda i: torch._grouped_mm(self.state[i][0], factors[i].transpose(1, 2), offs=ends)
            ),
        }


def bench_kernels(records: Records, bandwidth: float) -> None:
    """Each kernel's time and its multiple of the floor."""
    even = TOKENS // 32
    cases = {f"standard mix/{width}": (width, STANDARD_MIX, ragged(TOKENS, 32)) for width in (3584, 18944)} | {
        "128 x r16/3584": (3584, [16] * 128, ragged(TOKENS, 128)),
        "32 x r16, equal/3584": (3584, [16] * 32, [even] * 32),
        "32 x r16, one with 95%/3584": (3584, [16] * 32, [TOKENS - 31 * 13, *[13] * 31]),
        "32 x r64, equal/3584": (3584, [64] * 32, [even] * 32),
        "32 x r64, one with 95%/3584": (3584, [64] * 32, [TOKENS - 31 * 13, *[13] * 31]),
    }
    for name, (width, ranks, counts) in cases.items():
        case = Case(width, ranks, counts)
        floors = case.floors(bandwidth)
        for kernel in floors:
            took = case.time(getattr(case, kernel))
            records.add(name, "plora", f"{kernel}_us", took, "us")
            records.add(name, "floor", f"{kernel}_us", floors[kernel], "us")
            print(f"{name:32s} {kernel:20s} {took:8.1f} us  floor {floors[kernel]:7.1f}  {took / floors[kernel]:5.2f}x")
        if width == 3584:
            others = {"torch loop": case.loop, "torch _grouped_mm": case.grouped}
            for provider, measure in others.items():
                for metric, value in measure().items():
                    records.add(name, provider, f"{metric}_us", value, "us")
                    print(f"{name:32s} {provider}: {metric} {value:8.1f} us")


def linear_times(d: int, n: int, ranks: list[int]) -> Iterator[tuple[str, float]]:
    """One linear's forward and backward: frozen, and with the packed products (y and dx added to in place)."""
    counts = ragged(TOKENS, len(ranks))
    problems = [Problem(d, n, ranks, counts, seed=i) for i in range(max(1, int(ROTATED_BYTES / (TOKENS * d * 2))))]
    weight = torch.randn(n, d, device="cuda", dtype=torch.bfloat16) * d**-0.5
    hidden = torch.empty(TOKENS, problems[0].columns, device="cuda", dtype=torch.bfloat16)
    dhidden, y = torch.empty_like(hidden), torch.empty_like(problems[0].y)
    dx = torch.empty_like(problems[0].x)

    def frozen(p: Problem) -> None:
        torch.mm(p.x, weight.T, out=y)
        torch.mm(p.dy, weight, out=dx)

    def packed(p: Problem) -> None:
        torch.mm(p.x, weight.T, out=y)
        cuda.down(p.x, p.weight, hidden, p.work, p.token_index)
        cuda.up(y, hidden, p.weight, y, p.work, p.token_index)
        cuda.grad_hidden_and_up(p.dy, hidden, p.weight, dhidden, p.grad, p.work, p.token_index)
        cuda.grad_factor(p.x, dhidden, p.grad, p.work, p.token_index)
        torch.mm(p.dy, weight, out=dx)
        cuda.up(dx, dhidden, p.weight, dx, p.work, p.token_index, backward=True)

    for name, call in (("frozen", frozen), ("plora", packed)):
        yield name, microseconds([lambda p=p, call=call: call(p) for p in problems])  # type: ignore[misc]


def bench_linears(records: Records) -> None:
    """A layer's seven linears one by one, as a multiple of the frozen ones."""
    for model, linears in {"qwen2_5_7b": QWEN_7B, "llama3_1_8b": LLAMA_8B}.items():
        for mix, ranks in MIXES.items():
            total = {"frozen": 0.0, "plora": 0.0}
            for name, (d, n) in linears.items():
                times = dict(linear_times(d, n, ranks))
                records.add(f"{model}/{mix}/{name}_proj", "plora", "over_frozen", times["plora"] / times["frozen"], "x")
                total = {key: total[key] + times[key] for key in total}
            multiple = total["plora"] / total["frozen"]
            records.add(f"{model}/{mix}/seven linears", "plora", "over_frozen", multiple, "x")
            records.add(f"{model}/{mix}/seven linears", "frozen", "forward_backward_us", total["frozen"], "us")
            print(f"{model:12s} {mix:14s} seven linears: frozen {total['frozen']:8.0f} us, packed {multiple:.3f}x")


def sweep() -> None:
    """Times around the tuned parameters, on the standard mix."""
    chosen = schedule.RUN_ROWS
    for width in (3584, 18944):
        case = Case(width, STANDARD_MIX, ragged(TOKENS, 32))

        def show(what: str, call: Callable[[int], object], case: Case = case, width: int = width) -> None:
            print(f"width {width} {what:40s} {case.time(call):8.1f} us")

        for steps in (4, 5, 6, 7, 8, 10, 14, 19, 37):
            show(f"up_add, {steps} steps", lambda i, c=case, s=steps: c.up_add(i, s))  # type: ignore[misc]
            show(f"down_add, {steps} steps", lambda i, c=case, s=steps: c.down_add(i, s))  # type: ignore[misc]
            if -(-width // 64 // steps) <= schedule.MAX_SPLITS:
                show(f"down, {steps} steps", lambda i, c=case, s=steps: c.down(i, s))  # type: ignore[misc]
        for n in (1, 2, 4):
            call = lambda i, c=case, n=n: c.grad_hidden_and_up(i, per_run=n)  # type: ignore[misc]  # noqa: E731
            show(f"grad_hidden_and_up, {n} clusters a run", call)
        show("grad_hidden_and_up, without clusters", lambda i, c=case: c.grad_hidden_and_up(i, False))  # type: ignore[misc]
        for rows in (128, 256, 512, 1024):
            schedule.RUN_ROWS = rows
            case = Case(width, STANDARD_MIX, ragged(TOKENS, 32))
            show(f"grad_down, runs of {rows} rows", case.grad_down, case)
            show(f"grad_hidden_and_up without, runs of {rows}", lambda i, c=case: c.grad_hidden_and_up(i, False), case)  # type: ignore[misc]
        schedule.RUN_ROWS = chosen


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--sweep", action="store_true", help="time the tuned parameters' neighbours instead")
    parser.add_argument("--only", choices=("kernels", "linears"), help="one of the two tables")
    options = parser.parse_args()
    if options.sweep:
        return sweep()
    records, bandwidth = Records("kernels"), copy_bandwidth()
    records.add("copy", "torch", "bandwidth", bandwidth / 1e12, "TB/s")
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s")
    if options.only != "linears":
        bench_kernels(records, bandwidth)
    if options.only != "kernels":
        bench_linears(records)
    records.write(options.json)
    return None


if __name__ == "__main__":
    main()
