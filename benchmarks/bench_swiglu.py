"""The passes that ride on SwiGLU against their byte floors and against the passes that they replace.

python benchmarks/bench_swiglu.py                    # the table
python benchmarks/bench_swiglu.py --json FILE        # and records of it
python benchmarks/bench_swiglu.py --sweep            # the tuned parameters' neighbours
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from bench_kernels import MIXES, ROTATED_BYTES, TOKENS, copy_bandwidth, microseconds
from records import Records

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the inputs are the tests'

from plora.kernels import cuda, cuda_swiglu
from tests.kernels.problem import ragged
from tests.kernels.swiglu_problem import SwigluProblem

WIDTHS = {"qwen2_5_7b": 18944, "llama3_1_8b": 14336}


class Case:
    """The passes on rotated inputs of one width and mix of adapters."""

    def __init__(self, width: int, ranks: list[int]) -> None:
        sets = max(1, -(-int(ROTATED_BYTES) // (TOKENS * width * 2)))
        self.problems = [SwigluProblem(width, ranks, ragged(TOKENS, len(ranks)), seed=i) for i in range(sets)]
        for p in self.problems:
            p.hidden.nan_to_num_()
            p.dhidden_down.nan_to_num_()
        first = self.problems[0]
        self.act, self.dgate, self.dup = (torch.empty_like(first.gate) for _ in range(3))
        self.hidden_down, self.dhidden = torch.empty_like(first.dhidden_down), torch.empty_like(first.hidden)

    def floors(self, bandwidth: float) -> dict[str, float]:
        """Least microseconds: activations and factors read once, gradients of factors written once."""
        first = self.problems[0]
        activation, factor = first.gate.nbytes, 2 * sum(first.ranks) * first.width
        numbers = {"swiglu": 3 * (activation + factor), "swiglu_grad": 5 * activation + 3 * 3 * factor}
        return {name: n / bandwidth * 1e6 for name, n in numbers.items()}

    def swiglu(self, p: SwigluProblem, steps: int = 0) -> None:
        offsets, down = p.device_offsets[:2], p.device_offsets[2:]
        cuda_swiglu.swiglu(
            p.gate, p.up, p.hidden, p.weight, self.act, self.hidden_down, p.work, offsets, down, steps=steps
        )

    def swiglu_grad(self, p: SwigluProblem, steps: int = 0) -> None:
        offsets, down = p.device_offsets[:2], p.device_offsets[2:]
        cuda_swiglu.swiglu_grad(
            p.dact, p.dhidden_down, p.gate, p.up, p.hidden, p.weight, p.grad, self.dgate, self.dup, self.dhidden,
            p.work, offsets, down, p.token_index, steps=steps,
        )  # fmt: skip

    def apart(self) -> dict[str, Callable[[SwigluProblem], None]]:
        """The same by single passes, what is done to each element compiled by torch."""
        silu = torch.compile(lambda gate, up: F.silu(gate) * up)
        slopes = torch.compile(_slopes)
        out = [torch.empty_like(self.act) for _ in range(2)]

        def forward(p: SwigluProblem) -> None:
            cuda.up([p.gate, p.up], p.hidden, p.weight, out, p.work, p.device_offsets[:2], p.token_index)
            cuda.down(silu(*out), p.weight, self.hidden_down, p.work, p.device_offsets[2:], p.token_index)

        def backward(p: SwigluProblem) -> None:
            down = p.device_offsets[2:]
            cuda.up([p.dact], p.dhidden_down, p.weight, out[:1], p.work, down, p.token_index, backward=True)
            dgate, dup, act = slopes(out[0], p.gate, p.up)
            cuda.grad_factor(act, p.dhidden_down, p.grad, p.work, down, p.token_index)
            cuda.lora_up_backward([dgate, dup], p.hidden, p.weight, p.grad, p.work, p.device_offsets[:2], p.token_index)

        return {"swiglu": forward, "swiglu_grad": backward}

    def time(self, call: Callable[[SwigluProblem], None]) -> float:
        return microseconds([lambda p=p: call(p) for p in self.problems])  # type: ignore[misc]


def _slopes(
    dact: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of gate and up, and act again."""
    sigmoid = torch.sigmoid(gate.float())
    silu = gate * sigmoid
    dgate, dup = dact * up * (sigmoid + silu * (1 - sigmoid)), dact * silu
    return dgate.to(gate.dtype), dup.to(gate.dtype), (silu * up).to(gate.dtype)


def bench(records: Records, bandwidth: float) -> None:
    """Each pass's time, its multiple of the floor, and the time apart."""
    for model, width in WIDTHS.items():
        for mix, ranks in MIXES.items():
            case, name = Case(width, ranks), f"{model}/{mix}"
            floors, apart = case.floors(bandwidth), case.apart()
            for kernel in floors:
                took, others = case.time(getattr(case, kernel)), case.time(apart[kernel])
                for provider, value in (("plora", took), ("apart", others), ("floor", floors[kernel])):
                    records.add(name, provider, f"{kernel}_us", value, "us")
                print(f"{name:28s} {kernel:12s} {took:8.1f} us  floor {floors[kernel]:7.1f}  apart {others:8.1f}")


def sweep() -> None:
    """Times around the tuned parameters, on the standard mix."""
    case = Case(WIDTHS["qwen2_5_7b"], MIXES["standard mix"])
    for steps in (19, 25, 30, 37, 50):
        print(f"swiglu, {steps} steps {case.time(lambda p, s=steps: case.swiglu(p, s)):8.1f} us")  # type: ignore[misc]
    for steps in (2, 4, 6, 8, 12):
        print(f"swiglu_grad, {steps} steps {case.time(lambda p, s=steps: case.swiglu_grad(p, s)):8.1f} us")  # type: ignore[misc]


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--sweep", action="store_true", help="time the tuned parameters' neighbours instead")
    options = parser.parse_args()
    if options.sweep:
        return sweep()
    records, bandwidth = Records("swiglu"), copy_bandwidth()
    records.add("copy", "torch", "bandwidth", bandwidth / 1e12, "TB/s")
    bench(records, bandwidth)
    records.write(options.json)
    return None


if __name__ == "__main__":
    main()
