"""Claim: on two CPU cores that multiply bf16 the hybrid trains at >= 1.8 x the tokens/s of transformers
training its dense source at 2048 tokens and >= 3 x at 8192; in fp32, on those that do not, at >= 1.5 x and
>= 1.8 x.

One optimizer step each (forward, backward, clipping, AdamW; batch 1): ours through the same pieces as a run,
and transformers, in fp32 or in the two common ways of bf16: autocast over float32 weights, and bf16 weights
with float32 main weights. The faster peer counts. The contenders take turns in processes of their own in one
run; each counts with its best turn. MFU is the share of the model's FLOPs (each model's own) in the peak of a
large matrix product of that precision, measured in the same run.

Activations of a long sequence may not fit in memory (transformers keeps the float32 logits of all tokens,
too). A step's time is linear in the number of layers, so `--layers 2 6` measures two depths and also prints
the line through them at the full depth, for each contender.

Where there is a GPU:
  python benchmarks/training_step.py --device cuda --seq-lengths 8192
  python benchmarks/training_step.py --device cuda --model hybrid_1b --seq-lengths 8192 --peers
  python benchmarks/training_step.py --check-losses       (the same model on CPU and GPU: losses within 1e-2)
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.training_contenders import (  # noqa: E402
    OURS,
    PEERS,
    PEERS_OF,
    ContenderProcess,
    Measured,
    Setting,
)
from spikingbrain_train.architecture.layers import dense_source  # noqa: E402
from spikingbrain_train.config.command_line import user_errors  # noqa: E402
from spikingbrain_train.config.compose import check_choice, compose_run  # noqa: E402
from spikingbrain_train.config.conversion import ConversionConfig  # noqa: E402
from spikingbrain_train.config.load import to_run_config  # noqa: E402
from spikingbrain_train.config.model import ModelConfig  # noqa: E402
from spikingbrain_train.config.run import Precision  # noqa: E402
from spikingbrain_train.errors import ConfigurationError, PlatformError  # noqa: E402
from spikingbrain_train.planning.costs import forward_flops_per_token  # noqa: E402
from spikingbrain_train.runtime.accelerator import detect  # noqa: E402
from spikingbrain_train.runtime.bf16 import choose_precision  # noqa: E402

LOSS_BOUND = 1e-2
LOSS_STEPS = 5


def named_model(name: str) -> ModelConfig:
    """The model that conf/model/NAME.yaml describes.

    Raises:
        ConfigurationError: there is none; names --model and the choices.
    """
    check_choice("--model", name, "model", but=["from_checkpoint"])
    return to_run_config(compose_run([f"model={name}", "stage=cpt", "output_dir=unused"])).model


def converted_model(hf_folder: Path, output: Path) -> ModelConfig:
    """The hybrid that the published pattern makes of a dense checkpoint, written to ``output``."""
    from spikingbrain_train.config.load import load_model_config
    from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
    from spikingbrain_train.storage.checkpoint_folder import MODEL_CONFIG_FILE, latest_checkpoint

    import_checkpoint(hf_folder, output, ConversionConfig())
    return load_model_config(latest_checkpoint(output, "--model") / MODEL_CONFIG_FILE)


@dataclass
class Result:
    """One contender at one length and depth."""

    name: str
    seconds: float
    peak_gib: float
    mfu: float | None = None

    def row(self, tokens: int, layers: str, slowest_peer: float | None) -> str:
        ratio = "" if slowest_peer is None else f"{slowest_peer / self.seconds:.2f} x"
        mfu = "" if self.mfu is None else f"{100 * self.mfu:.0f} %"
        memory = "" if self.peak_gib == 0 else f"{self.peak_gib:.1f} GiB"
        return (
            f"| {tokens} | {layers} | {self.name} | {self.seconds:.2f} s | {tokens / self.seconds:.0f} "
            f"| {ratio} | {mfu} | {memory} |"
        )


def step_flops(name: str, model: ModelConfig, tokens: int) -> float:
    """Model FLOPs of one step: forward and backward, without recomputation."""
    model = model if name == OURS else dense_source(model)
    return 3.0 * tokens * forward_flops_per_token(model, tokens)


def measure(setting: Setting, names: list[str], repeats: int, clock: str) -> tuple[dict[str, Result], float]:
    """The contenders' best turns, and the peak TFLOP/s of the best product between them."""
    turns: dict[str, list[Measured]] = {name: [] for name in names}
    peak = 0.0
    with contextlib.ExitStack() as stack:
        processes = {name: stack.enter_context(ContenderProcess(name, setting)) for name in names}
        for turn in range(repeats + 1):
            peak = max(peak, processes[OURS].peak_tflops(clock))
            for name, process in processes.items():
                measured = process.step()
                if turn > 0:  # the first one loads libraries and fills caches
                    turns[name].append(measured)
                seconds = measured.seconds if clock == "wall" else measured.cpu_seconds
                note = f"turn {turn}  {name:24s} {seconds:7.2f} s  loss {measured.loss:.4f}"
                print(note, file=sys.stderr, flush=True)
    results = {}
    for name, steps in turns.items():
        best = min(step.seconds if clock == "wall" else step.cpu_seconds for step in steps)
        mfu = step_flops(name, setting.model, setting.seq_length) / best / (peak * 1e12)
        results[name] = Result(name, best, steps[-1].peak_bytes / 2**30, mfu)
    return results, peak


def extrapolate(shallow: Result, deep: Result, depths: tuple[int, int], full: int) -> Result:
    """The time at the full depth on the line through two measured depths."""
    a_layer = (deep.seconds - shallow.seconds) / (depths[1] - depths[0])
    return Result(deep.name, deep.seconds + a_layer * (full - depths[1]), 0.0)


def table(results: dict[str, Result], tokens: int, layers: str) -> None:
    """Print one row a contender; ratios are against the fastest peer."""
    peers = [result.seconds for name, result in results.items() if name != OURS]
    for result in results.values():
        print(result.row(tokens, layers, min(peers) if peers else None), flush=True)


def compare(args: argparse.Namespace, model: ModelConfig, megatron_folder: Path | None) -> None:
    """Measure every length and depth that is asked for."""
    names = [OURS, *(PEERS[peer] for peer in args.peers)]
    full = model.num_layers
    print("| tokens | layers | contender | step | tokens/s | against the faster peer | MFU | peak memory |")
    print("|---|---|---|---|---|---|---|---|")
    for tokens in args.seq_lengths:
        measured: dict[int, dict[str, Result]] = {}
        peaks = []
        for layers in sorted(args.layers or [full]):
            setting = Setting(
                model=replace(model, num_layers=layers),
                hf_folder=args.hf_folder,
                megatron_folder=megatron_folder,
                weights=None,
                seq_length=tokens,
                threads=args.threads,
                device=args.device,
                precision=args.precision,
            )
            measured[layers], peak = measure(setting, names, args.repeats, args.clock)
            peaks.append(peak)
            table(measured[layers], tokens, str(layers))
        if len(measured) > 1 and full not in measured:
            depths = min(measured), max(measured)
            lines = {n: extrapolate(*(measured[d][n] for d in depths), depths, full) for n in names}
            for name, result in lines.items():
                flops = step_flops(name, model, tokens)
                result.mfu = flops / result.seconds / (max(peaks) * 1e12)
            table(lines, tokens, f"{full} from {depths[0]} and {depths[1]}")
        print(f"(peak of a product in {args.precision.value}: {max(peaks):.3f} TFLOP/s)", file=sys.stderr)


def check_losses(args: argparse.Namespace, model: ModelConfig, megatron_folder: Path | None) -> None:
    """Train the same model from the same weights on CPU and GPU and compare the losses."""
    import torch

    if not torch.cuda.is_available():
        raise PlatformError("--check-losses compares CPU and GPU, but torch sees no GPU here.")
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        for device in ("cpu", "cuda"):
            setting = Setting(
                model=model,
                hf_folder=args.hf_folder,
                megatron_folder=megatron_folder,
                weights=Path(folder, "weights.pt"),
                seq_length=min(args.seq_lengths),
                threads=args.threads,
                device=device,
                precision=args.precision,
            )
            with ContenderProcess(OURS, setting) as process:
                losses[device] = [process.step().loss for _ in range(LOSS_STEPS)]
    worst = max(abs(a - b) for a, b in zip(losses["cpu"], losses["cuda"], strict=True))
    for step, (a, b) in enumerate(zip(losses["cpu"], losses["cuda"], strict=True)):
        print(f"step {step}: CPU {a:.5f}, GPU {b:.5f}")
    print(f"largest difference {worst:.2e} (bound {LOSS_BOUND:.0e})")
    if worst > LOSS_BOUND:
        raise SystemExit("error: the losses differ by more than the bound")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="smollm2_135m_hybrid",
        help="a name of conf/model, trained from random weights, or the folder of a dense Hugging Face "
        "checkpoint, trained from its weights after conversion (default smollm2_135m_hybrid)",
    )
    parser.add_argument("--seq-lengths", type=int, nargs="+", default=[2048, 8192, 16384], metavar="T")
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        metavar="N",
        help="depths to measure, on both sides (default: the model's); two also give the line to full depth",
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=list(PEERS),
        help="which forms of transformers compete; none measures ours alone (default: those of --precision)",
    )
    parser.add_argument(
        "--precision",
        choices=[each.value for each in Precision],
        default=Precision.auto.value,
        help="of our trainer; auto (default): bf16 where the machine multiplies it, else fp32",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="turns that count, after one warm-up (default 3)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a contender (default 2)")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu (over all threads of a contender) suits a machine that others use",
    )
    parser.add_argument(
        "--check-losses", action="store_true", help="compare losses of CPU and GPU, no timing"
    )
    args = parser.parse_args()
    args.hf_folder = Path(args.model) if Path(args.model).is_dir() else None
    if args.clock == "cpu" and args.device != "cpu":
        parser.error("--clock cpu does not see what a GPU does; use --clock wall")
    args.precision = Precision(args.precision)
    if args.precision is Precision.auto:
        args.precision = choose_precision(detect(args.device)).precision
    if args.peers is None:
        args.peers = PEERS_OF[args.precision]
    return args


def main() -> None:
    args = parse()
    if args.clock == "cpu":  # a thread that waits for another one would otherwise count as busy
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with user_errors(), tempfile.TemporaryDirectory() as folder:
        megatron_folder = None
        if args.hf_folder is None:
            model = named_model(args.model)
        else:
            megatron_folder = Path(folder, "hybrid")
            model = converted_model(args.hf_folder, megatron_folder)
            if args.layers:
                raise ConfigurationError(
                    "--layers needs random weights: name a model of conf/model in --model."
                )
        run = check_losses if args.check_losses else compare
        run(args, model, megatron_folder)


if __name__ == "__main__":
    main()
