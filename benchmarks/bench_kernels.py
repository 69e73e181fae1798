"""The packed kernels against their byte floors and other ways to the same products.

    python benchmarks/bench_kernels.py                    # the tables
    python benchmarks/bench_kernels.py --only groups      # one of them: kernels, groups, linears, packed
    python benchmarks/bench_kernels.py --json FILE        # and records of them
    python benchmarks/bench_kernels.py --sweep            # the tuned parameters' neighbours, to choose a row by

Tables: *kernels*, each kernel on one linear, beside plain torch's loop over adapters, bmm on equal segments and
`_grouped_mm`; *groups*, what linears that share an input gain by one launch; *linears*, a layer's linears as a
multiple of the frozen ones; *packed*, N packed adapters against N one after the other.

Times are medians over replays of a CUDA graph that rotates among input sets larger than the L2 cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import torch

from records import Records

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the baselines are the tests'

from plora.kernels import cuda, reference, schedule
from tests.kernels.problem import STANDARD_MIX, Problem, ragged

TOKENS = 8192
GROUPS = {
    "qwen2_5_7b": {"q,k,v": (3584, [3584, 512, 512]), "o": (3584, [3584]), "gate,up": (3584, [18944, 18944]),
                   "down": (18944, [3584])},
    "llama3_1_8b": {"q,k,v": (4096, [4096, 1024, 1024]), "o": (4096, [4096]), "gate,up": (4096, [14336, 14336]),
                    "down": (14336, [4096])},
}  # fmt: skip
GROUP_KERNELS = ("down", "up_add", "grad_hidden_and_up", "grad_down", "down_add")
MIXES = {"standard mix": STANDARD_MIX, "128 x r16": [16] * 128}
SLOTS = (264, 396, 660, 792, 1188, 1584, 3168, 7128)
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
    """The kernels on ``Problem``s of a group, and plain torch's forms of them."""

    def __init__(self, d: int, outputs: list[int], ranks: list[int], counts: list[int]) -> None:
        sets = max(1, -(-int(ROTATED_BYTES) // (sum(counts) * d * 2)))
        self.problems = [Problem(d, outputs, ranks, counts, seed=i) for i in range(sets)]
        first = self.problems[0]
        shape = (first.rows, first.members * first.columns)
        # hidden, and room for another
        self.state = [(p.random(*shape), p.random(*shape)) for p in self.problems]
        self.outs = [[torch.empty_like(y) for y in p.ys] for p in self.problems]
        self.dx = [torch.empty_like(p.x) for p in self.problems]

    def floors(self, bandwidth: float) -> dict[str, float]:
        """Least microseconds of each kernel: inputs read once, outputs and gradients written once."""
        first = self.problems[0]
        rows, n = first.tables.rows.diff()[:-1], first.members
        ranks, hidden = sum(first.ranks), int((rows * first.tables.rank).sum()) * 2
        d, out = first.d * 2, sum(first.widths) * 2
        numbers = {
            "down": first.rows * d + n * (ranks * d + hidden),
            "up_add": 2 * first.rows * out + ranks * out + n * hidden,
            "grad_hidden_and_up": first.rows * out + 3 * ranks * out + 2 * n * hidden,
            "grad_down": first.rows * d + n * (2 * ranks * d + hidden),
            "down_add": first.rows * d + n * (ranks * d + hidden),
        }
        return {name: n / bandwidth * 1e6 for name, n in numbers.items()}

    def down(self, i: int, slots: int = 0) -> None:
        p = self.problems[i]
        cuda.down(p.x, p.weight, self.state[i][1], p.work, p.device_offsets, p.token_index, slots=slots)

    def up_add(self, i: int, slots: int = 0) -> None:
        p = self.problems[i]
        cuda.up(
            p.ys, self.state[i][0], p.weight, self.outs[i], p.work, p.device_offsets, p.token_index, slots=slots
        )  # fmt: skip

    def grad_hidden_and_up(self, i: int, clusters: bool | None = None, per_run: int = 0) -> None:
        p = self.problems[i]
        cuda.grad_hidden_and_up(
            p.dys, self.state[i][0], p.weight, self.state[i][1], p.grad, p.work, p.device_offsets, p.token_index,
            clusters=clusters, clusters_per_run=per_run,
        )  # fmt: skip

    def grad_down(self, i: int) -> None:
        p = self.problems[i]
        cuda.grad_factor(p.x, self.state[i][0], p.grad, p.work, p.device_offsets, p.token_index)

    def down_add(self, i: int, slots: int = 0) -> None:
        p = self.problems[i]
        hidden, offsets = self.state[i][0], p.device_offsets
        cuda.up([None], hidden, p.weight, [self.dx[i]], p.work, offsets, p.token_index, backward=True, slots=slots)

    def one_by_one(self) -> dict[str, float]:
        """The group's kernels in a launch for each member; in `down_add` all but the first add to dx."""

        def run(i: int, kernel: str) -> None:
            p = self.problems[i]
            for m, offsets in enumerate(p.device_offsets.unbind()):
                hidden, other = (p.of_member(t, m) for t in self.state[i])
                where = (p.work, offsets, p.token_index)
                if kernel == "down":
                    cuda.down(p.x, p.weight, other, *where)
                elif kernel == "up_add":
                    cuda.up(p.ys[m : m + 1], hidden, p.weight, self.outs[i][m : m + 1], *where)
                elif kernel == "grad_hidden_and_up":
                    cuda.grad_hidden_and_up(p.dys[m : m + 1], hidden, p.weight, other, p.grad, *where)
                elif kernel == "grad_down":
                    cuda.grad_factor(p.x, hidden, p.grad, *where)
                else:
                    dx = self.dx[i]
                    cuda.up([dx if m else None], hidden, p.weight, [dx], *where, backward=True)

        return {kernel: self.time(lambda i, k=kernel: run(i, k)) for kernel in GROUP_KERNELS}  # type: ignore[misc]

    def time(self, call: Callable[[int], object]) -> float:
        return microseconds([lambda i=i: call(i) for i in range(len(self.problems))])  # type: ignore[misc]

    def loop(self) -> dict[str, float]:
        """Plain torch, a loop over adapters: the forward's two products and the whole backward."""

        def forward(i: int) -> None:
            p = self.problems[i]
            hidden = reference.lora_down(p.x, p.weight, p.offsets, p.tables, p.token_index, p.columns)
            reference.lora_up(p.ys, hidden, p.weight, p.offsets, p.tables)

        def backward(i: int) -> None:
            p = self.problems[i]
            dhidden = reference.lora_up_backward(p.dys, self.state[i][0], p.weight, p.grad, p.offsets, p.tables)
            reference.lora_down_grad_input(dhidden, p.d, p.weight, p.offsets, p.tables, p.token_index)
            reference.lora_down_grad_factor(dhidden, p.x, p.grad, p.offsets, p.tables, p.token_index)

        return {"forward": self.time(forward), "backward": self.time(backward)}

    def bmm(self) -> dict[str, float]:
        """One batched product for the adapters of each rank, which must have equal segments; gradients in bf16."""
        first = self.problems[0]
        if len(set(first.counts)) > 1:
            return {}
        sizes = [len(list(same)) for _, same in groupby(first.ranks)]
        ranks = [rank for rank, _ in groupby(first.ranks)]
        sets = [
            [
                (p.random(n, p.d, r), p.random(n, r, p.widths[0]), p.random(n, first.counts[0], r))
                for n, r in zip(sizes, ranks, strict=True)
            ]
            for p in self.problems
        ]

        def split(t: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return t.view(len(first.ranks), -1, t.shape[1]).split(sizes)

        def forward(i: int) -> None:
            p = self.problems[i]
            for x, y, out, (a, b, _) in zip(split(p.x), split(p.ys[0]), split(self.outs[i][0]), sets[i], strict=True):
                torch.baddbmm(y, torch.bmm(x, a), b, alpha=2.0, out=out)

        def backward(i: int) -> None:
            p = self.problems[i]
            for x, dy, dx, (a, b, low) in zip(split(p.x), split(p.dys[0]), split(self.dx[i]), sets[i], strict=True):
                dlow = torch.bmm(dy, b.mT)
                torch.bmm(low.mT, dy)
                torch.bmm(x.mT, dlow)
                torch.bmm(dlow, a.mT, out=dx)

        return {"forward": self.time(forward), "backward": self.time(backward)}

    def grouped(self) -> dict[str, float]:
        """Torch's grouped product, all adapters at the widest rank: ``down``, and ``up`` without the add."""
        p = self.problems[0]
        ends = p.tables.rows[1:-1].to("cuda", torch.int32)
        shape = (len(p.ranks), p.d, p.columns)
        factors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in self.problems]
        return {
            "down": self.time(lambda i: torch._grouped_mm(self.problems[i].x, factors[i], offs=ends)),
            "up without the add": self.time(
                lambda i: torch._grouped_mm(self.state[i][0], factors[i].transpose(1, 2), offs=ends)
            ),
        }


def show_kernels(records: Records, name: str, case: Case, bandwidth: float, kernels: Sequence[str]) -> None:
    """Record and print kernels' times beside their floors."""
    floors = case.floors(bandwidth)
    for kernel in kernels:
        took = case.time(getattr(case, kernel))
        records.add(name, "plora", f"{kernel}_us", took, "us")
        records.add(name, "floor", f"{kernel}_us", floors[kernel], "us")
        print(f"{name:36s} {kernel:20s} {took:8.1f} us  floor {floors[kernel]:7.1f}  {took / floors[kernel]:5.2f}x")


def bench_kernels(records: Records, bandwidth: float) -> None:
    """Each kernel's time and its multiple of the floor, on one linear."""
    even = [TOKENS // 32] * 32
    skewed = [TOKENS - 31 * 13, *[13] * 31]
    cases = {f"standard mix/{width}": (width, STANDARD_MIX, ragged(TOKENS, 32)) for width in (512, 3584, 18944)} | {
        "standard mix, equal/3584": (3584, STANDARD_MIX, even),
        "128 x r16/3584": (3584, [16] * 128, ragged(TOKENS, 128)),
        "32 x r16, equal/3584": (3584, [16] * 32, even),
        "32 x r16, one with 95%/3584": (3584, [16] * 32, skewed),
        "32 x r64, equal/3584": (3584, [64] * 32, even),
        "32 x r64, one with 95%/3584": (3584, [64] * 32, skewed),
    }
    for name, (width, ranks, counts) in cases.items():
        case = Case(width, [width], ranks, counts)
        show_kernels(records, name, case, bandwidth, list(case.floors(bandwidth)))
        if width == 3584:
            others = {"torch loop": case.loop, "torch bmm": case.bmm, "torch _grouped_mm": case.grouped}
            for provider, measure in others.items():
                for metric, value in measure().items():
                    records.add(name, provider, f"{metric}_us", value, "us")
                    print(f"{name:36s} {provider}: {metric} {value:8.1f} us")


def bench_groups(records: Records, bandwidth: float) -> None:
    """The passes of linears that share an input: in one launch, and in one for each."""
    for model, groups in GROUPS.items():
        for mix, ranks in MIXES.items():
            for name, (d, outputs) in groups.items():
                if len(outputs) == 1:
                    continue
                case = Case(d, outputs, ranks, ragged(TOKENS, len(ranks)))
                label = f"{model}/{mix}/{name}"
                show_kernels(records, label, case, bandwidth, GROUP_KERNELS)
                for kernel, took in case.one_by_one().items():
                    records.add(label, "plora, one by one", f"{kernel}_us", took, "us")
                    print(f"{label:36s} {kernel:20s} {took:8.1f} us  one by one")


def linear_times(d: int, outputs: list[int], ranks: list[int], counts: list[int]) -> dict[str, float]:
    """A group's forward and backward: frozen, and with the packed products (y and dx added to in place)."""
    tokens = sum(counts)
    problems = [
        Problem(d, outputs, ranks, counts, seed=i) for i in range(max(1, int(ROTATED_BYTES / (tokens * d * 2))))
    ]
    first = problems[0]
    weights = [torch.randn(n, d, device="cuda", dtype=torch.bfloat16) * d**-0.5 for n in outputs]
    hidden = first.random(tokens, first.members * first.columns)
    dhidden, ys, dx = torch.empty_like(hidden), [torch.empty_like(y) for y in first.ys], torch.empty_like(first.x)

    def forward(p: Problem) -> None:
        for weight, y in zip(weights, ys, strict=True):
            torch.mm(p.x, weight.T, out=y)

    def backward(p: Problem) -> None:
        torch.mm(p.dys[0], weights[0], out=dx)
        for weight, dy in zip(weights[1:], p.dys[1:], strict=True):
            dx.addmm_(dy, weight)

    def frozen(p: Problem) -> None:
        forward(p)
        backward(p)

    def packed(p: Problem) -> None:
        forward(p)
        where = (p.work, p.device_offsets, p.token_index)
        cuda.down(p.x, p.weight, hidden, *where)
        cuda.up(ys, hidden, p.weight, ys, *where)
        cuda.grad_hidden_and_up(p.dys, hidden, p.weight, dhidden, p.grad, *where)
        cuda.grad_factor(p.x, dhidden, p.grad, *where)
        backward(p)
        cuda.up([dx], dhidden, p.weight, [dx], *where, backward=True)

    calls = {"frozen": frozen, "plora": packed}
    return {name: microseconds([lambda p=p, c=c: c(p) for p in problems]) for name, c in calls.items()}  # type: ignore[misc]


def bench_linears(records: Records) -> None:
    """A layer's seven linears, each group by itself, as a multiple of the frozen ones."""
    for model, groups in GROUPS.items():
        for mix, ranks in MIXES.items():
            total = {"frozen": 0.0, "plora": 0.0}
            for name, (d, outputs) in groups.items():
                times = linear_times(d, outputs, ranks, ragged(TOKENS, len(ranks)))
                records.add(f"{model}/{mix}/{name}", "plora", "over_frozen", times["plora"] / times["frozen"], "x")
                total = {key: total[key] + times[key] for key in total}
                multiple = times["plora"] / times["frozen"]
                print(f"{model:12s} {mix:14s} {name:8s} frozen {times['frozen']:8.0f} us, packed {multiple:.3f}x")
            multiple = total["plora"] / total["frozen"]
            records.add(f"{model}/{mix}/seven linears", "plora", "over_frozen", multiple, "x")
            records.add(f"{model}/{mix}/seven linears", "frozen", "forward_backward_us", total["frozen"], "us")
            print(f"{model:12s} {mix:14s} seven linears: frozen {total['frozen']:8.0f} us, packed {multiple:.3f}x")


def torch_lora_us(width: int, rank: int, tokens: int, n: int) -> float:
    """``n`` adapters one after the other in plain torch, each over the frozen linear on its own tokens."""
    options = {"device": "cuda", "dtype": torch.bfloat16}
    base = torch.randn(width, width, **options) * width**-0.5
    a, b = (torch.randn(n, rank, width, **options) * width**-0.5 for _ in range(2))
    x, dy = (torch.randn(n, tokens, width, **options) for _ in range(2))
    grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)

    def run() -> None:
        for i in range(n):
            low = x[i] @ a[i].T
            (x[i] @ base.T).addmm_(low, b[i], alpha=2.0)
            dlow = (dy[i] @ b[i].T) * 2.0
            grad_b[i].addmm_(low.T, dy[i], alpha=2.0)
            grad_a[i].addmm_(dlow.T, x[i])
            (dy[i] @ base).addmm_(dlow, a[i])

    return microseconds([run])


def bench_packed(records: Records) -> None:
    """PLoRA's table 7: N adapters of rank 64 packed, over N one after the other; 1024 tokens each."""
    width, rank, tokens = 3584, 64, 1024
    for n in (2, 8, 32):
        alone = torch_lora_us(width, rank, tokens, n)
        packed = linear_times(width, [width], [rank] * n, [tokens] * n)["plora"]
        name = f"{n} x r{rank}, {tokens} tokens each/{width}"
        records.add(name, "torch, one after the other", "forward_backward_us", alone, "us")
        records.add(name, "plora", "forward_backward_us", packed, "us")
        print(f"{name:36s} packed {packed:8.0f} us, one after the other {alone:8.0f} us: {alone / packed:.2f}x")


def sweep() -> None:
    """Times around the tuned parameters, on the standard mix."""
    chosen = schedule.RUN_ROWS
    for width in (3584, 18944):
        case = Case(width, [width], STANDARD_MIX, ragged(TOKENS, 32))

        def show(what: str, call: Callable[[int], object], case: Case = case, width: int = width) -> None:
            print(f"width {width} {what:40s} {case.time(call):8.1f} us")

        for slots in SLOTS:
            show(f"up_add, {slots} slots", lambda i, c=case, s=slots: c.up_add(i, s))  # type: ignore[misc]
            show(f"down_add, {slots} slots", lambda i, c=case, s=slots: c.down_add(i, s))  # type: ignore[misc]
            show(f"down, {slots} slots", lambda i, c=case, s=slots: c.down(i, s))  # type: ignore[misc]
        for n in (1, 2, 4):
            call = lambda i, c=case, n=n: c.grad_hidden_and_up(i, per_run=n)  # type: ignore[misc]  # noqa: E731
            show(f"grad_hidden_and_up, {n} clusters a run", call)
        show("grad_hidden_and_up, without clusters", lambda i, c=case: c.grad_hidden_and_up(i, False))  # type: ignore[misc]
        for rows in (128, 256, 512, 1024):
            schedule.RUN_ROWS = rows
            case = Case(width, [width], STANDARD_MIX, ragged(TOKENS, 32))
            show(f"grad_down, runs of {rows} rows", case.grad_down, case)
            show(f"grad_hidden_and_up without, runs of {rows}", lambda i, c=case: c.grad_hidden_and_up(i, False), case)  # type: ignore[misc]
        schedule.RUN_ROWS = chosen
    for members in (2, 3):
        case = Case(3584, [16] * members, STANDARD_MIX, ragged(TOKENS, 32))
        for slots in SLOTS:
            for kernel, call in (("down", case.down), ("down_add", case.down_add)):
                took = case.time(lambda i, c=call, s=slots: c(i, s))  # type: ignore[misc]
                print(f"{members} members {f'{kernel}, {slots} slots':40s} {took:8.1f} us")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--sweep", action="store_true", help="time the tuned parameters' neighbours instead")
    parser.add_argument("--only", choices=("kernels", "groups", "linears", "packed"), help="one of the tables")
    options = parser.parse_args()
    if options.sweep:
        return sweep()
    records, bandwidth = Records("kernels"), copy_bandwidth()
    records.add("copy", "torch", "bandwidth", bandwidth / 1e12, "TB/s")
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s")
    tables: dict[str, Callable[[], None]] = {
        "kernels": lambda: bench_kernels(records, bandwidth),
        "groups": lambda: bench_groups(records, bandwidth),
        "linears": lambda: bench_linears(records),
        "packed": lambda: bench_packed(records),
    }
    for name in (options.only,) if options.only else tables:
        tables[name]()
    records.write(options.json)
    return None


if __name__ == "__main__":
    main()
