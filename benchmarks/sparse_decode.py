#!/usr/bin/env python
"""Claim: a feed-forward of which 88 % is zero decodes at least 1.5 times as fast on a CPU as a dense one.

    python benchmarks/sparse_decode.py

One token through a feed-forward of LLaMA2-7B's shape (4096 x 11008) in float32: everything read, and
without the rows of the up and down projection whose gate is closed (hf/zeros_sparsellama.py, what exports
carry). The dense one is what it would be otherwise: three products, `down(FATReLU(gate x) * (up x))`, each
with its weight as it is stored. Reading a third and 12 % of two thirds of the weights can at best be 2.4
times as fast. Both take turns in one process. --forms also measures other ways to multiply by some rows.
Times are of this process's CPU on one thread: other load on the machine counts little.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from spikingbrain_train.hf.zeros_sparsellama import (  # noqa: E402
    MOST_ACTIVE,
    FATReLU,
    lay_out_transposed,
    rows_times,
    sparse_mlp,
    weighted_rows,
)
from spikingbrain_train.reporting.tables import table  # noqa: E402

Linears = tuple[nn.Linear, nn.Linear, nn.Linear]


class Case:
    """A feed-forward (gate, up, down) and a token, with the threshold that closes a share of its gates."""

    def __init__(self, linears: Linears, sparsity: float) -> None:
        self.gate, self.up, self.stored_down = linears
        self.down = copy.deepcopy(self.stored_down)  # is laid out anew, which the dense one is not to see
        width, hidden_size = self.gate.weight.shape
        self.x = torch.randn(1, 1, hidden_size)
        gates = self.gate(self.x)
        self.activation = FATReLU(float(gates.flatten().kthvalue(int(sparsity * width)).values))
        if sparsity <= 1 - MOST_ACTIVE:
            raise SystemExit(f"--sparsity {sparsity:g} is read whole; give more than {1 - MOST_ACTIVE:g}")
        self.rows = (self.activation(gates) != 0).flatten().nonzero().flatten()
        self.inside = torch.randn(len(self.rows))

    def dense(self) -> Tensor:
        """Everything read."""
        return self.stored_down(self.activation(self.gate(self.x)) * self.up(self.x))

    def sparse(self) -> Tensor:
        """Without rows whose gate is closed."""
        found = sparse_mlp(self.x, self.gate, self.up, self.down, self.activation)
        assert found is not None
        return found

    def forms(self) -> Mapping[str, Callable[[], Tensor]]:
        """Ways to multiply by some rows, of the up and of the transposed down projection."""
        lay_out_transposed(self.down)
        x, up, rows = self.x.flatten(), self.up.weight, self.rows
        down, everything = self.down.weight.t(), torch.randn(len(self.up.weight))
        pattern = torch.sparse_csr_tensor(
            torch.tensor([0, len(rows)]), rows, torch.zeros(len(rows)), (1, len(up))
        )
        return {
            "up: all rows": lambda: up @ x,
            "up: gathered at once": lambda: up.index_select(0, rows) @ x,
            "up: gathered 64 at a time (used)": lambda: rows_times(up, rows, x),
            "up: sampled_addmm": lambda: torch.sparse.sampled_addmm(pattern, x[None], up.t(), beta=0.0),
            "down: all rows": lambda: self.stored_down(everything),
            "down: gathered at once": lambda: self.inside @ down.index_select(0, rows),
            "down: embedding_bag (used)": lambda: weighted_rows(down, rows, self.inside),
        }


def measure(forms: Mapping[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round of each form, in turns; a first round, which lays weights out, is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds + 1):
        for name, form in forms.items():
            started = time.process_time()
            form()
            seconds[name].append(time.process_time() - started)
    return {name: each[1:] for name, each in seconds.items()}


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--width", type=int, default=11008)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.65, 0.75, 0.88, 0.95])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--forms", action="store_true", help="also other ways to multiply by some rows")
    flags = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    hidden, width = flags.hidden_size, flags.width
    shapes = ((hidden, width), (hidden, width), (width, hidden))
    gate, up, down = (nn.Linear(*shape, bias=False) for shape in shapes)
    linears = (gate, up, down)
    rows = [["zeros", "dense", "sparse", "ratio of medians", "of the fastest", "difference"]]
    for sparsity in flags.sparsity:
        case = Case(linears, sparsity)
        expected = case.dense()
        seconds = measure({"dense": case.dense, "sparse": case.sparse}, flags.rounds)
        dense, sparse = (statistics.median(seconds[name]) for name in ("dense", "sparse"))
        fastest = min(seconds["dense"]) / min(seconds["sparse"])
        difference = float((case.sparse() - expected).abs().max() / expected.abs().max())
        cells = [
            f"{1e3 * dense:.1f} ms",
            f"{1e3 * sparse:.1f} ms",
            f"{dense / sparse:.2f}",
            f"{fastest:.2f}",
        ]
        rows.append([f"{sparsity:.0%}", *cells, f"{difference:.1e}"])
    print("\n".join(table(rows, 1)), flush=True)
    if flags.forms:
        warnings.filterwarnings("ignore", message="Sparse")
        found = measure(Case(linears, 0.88).forms(), flags.rounds)
        shown = [
            [name, f"{1e3 * statistics.median(each):.1f}", f"{1e3 * min(each):.1f}"]
            for name, each in found.items()
        ]
        print("\n" + "\n".join(table([["88 % zeros", "median, ms", "fastest, ms"], *shown], 1)))


if __name__ == "__main__":
    main()
