"""Claim: the hybrid's training step costs about the same per token at 32k tokens as at 2k (< 1.25 x); full
attention does not.

One optimizer step (forward, backward, clipping, AdamW; batch 1, random weights) of the same trainer with the
published pattern [gla, swa] and with full attention in every layer, at growing lengths, turn by turn in one
run; in bf16 where the machine multiplies it, else in fp32. CPU time over all threads, which other work on the
machine disturbs least; wall time on a GPU. The vocabulary is cut: the output projection costs the same at
every length and would only hide the growth.

Where there is a GPU, this also measures MFU of a 7B-shaped stack:
  python benchmarks/sequence_length.py --device cuda --model spikingbrain_7b --layers 4 --repeats 5
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.training_contenders import OURS, ContenderProcess, Measured, Setting  # noqa: E402
from benchmarks.training_step import named_model, step_flops  # noqa: E402
from spikingbrain_train.config.command_line import user_errors  # noqa: E402
from spikingbrain_train.config.model import ModelConfig  # noqa: E402
from spikingbrain_train.runtime.accelerator import detect  # noqa: E402
from spikingbrain_train.runtime.bf16 import choose_precision  # noqa: E402

BOUND = 1.25
VOCAB_SIZE = 8192


def best_step(model: ModelConfig, tokens: int, args: argparse.Namespace) -> tuple[float, float]:
    """Seconds of the best of ``args.repeats`` steps, after a warm-up, and the peak TFLOP/s of a product."""
    clock = "wall" if args.device == "cuda" else "cpu"
    setting = Setting(
        model,
        hf_folder=None,
        megatron_folder=None,
        weights=None,
        seq_length=tokens,
        threads=args.threads,
        device=args.device,
        precision=choose_precision(detect(args.device)).precision,
    )
    with ContenderProcess(OURS, setting) as process:
        process.step()
        peak = process.peak_tflops(clock)
        steps: list[Measured] = [process.step() for _ in range(args.repeats)]
    return min(step.seconds if clock == "wall" else step.cpu_seconds for step in steps), peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="hybrid_1b", help="a name of conf/model (default hybrid_1b)")
    parser.add_argument("--layers", type=int, default=2, help="depth (default 2: one layer of each kind)")
    parser.add_argument("--seq-lengths", type=int, nargs="+", default=[2048, 8192, 32768], metavar="T")
    parser.add_argument("--repeats", type=int, default=1, help="steps after one warm-up (default 1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    args = parser.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else a waiting thread counts as busy
    with user_errors():
        hybrid = replace(named_model(args.model), num_layers=args.layers, vocab_size=VOCAB_SIZE)
    models = {"hybrid": hybrid, "full attention": replace(hybrid, mixers=["full"])}
    print("| tokens | model | ms per token | against the shortest | share of the GEMM peak |")
    print("|---|---|---|---|---|")
    first: dict[str, float] = {}
    growth: dict[str, float] = {}
    for tokens in sorted(args.seq_lengths):
        for name, model in models.items():
            seconds, peak = best_step(model, tokens, args)
            per_token = seconds / tokens
            growth[name] = per_token / first.setdefault(name, per_token)
            mfu = step_flops(OURS, model, tokens) / seconds / (peak * 1e12)
            row = f"| {tokens} | {name} | {1e3 * per_token:.3f} | {growth[name]:.2f} x | {100 * mfu:.0f} % |"
            print(row, flush=True)
    verdict = "within" if growth["hybrid"] < BOUND else "ABOVE"
    print(f"\nhybrid: {growth['hybrid']:.2f} x, {verdict} the bound of {BOUND} x")


if __name__ == "__main__":
    main()
