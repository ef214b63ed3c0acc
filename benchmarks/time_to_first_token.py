"""Claim: a hybrid answers a prompt of 256k tokens after as much time a token as one of 4k (within 1.2 x), on
CPU, and reading 1M tokens takes no more memory than 16k (within 1.2 x of what was there before); its dense
source, which attends to all before every token, beside it.

The source is a folder of transformers, random Llama weights if none is given: speed asks for no others. The
hybrid is what spikingbrain-convert makes of it and spikingbrain-export writes. Each reads random tokens up to
its first new one with transformers' generate: the hybrid in pieces, as spikingbrain-generate reads a long
prompt, the dense model at once, where torch's attention needs no mask and is at its fastest. Every reading
has a process of its own with one thread. Times are CPU time, the least of rounds in turn, because other work
on the machine only adds to it; memory is what Linux counts (VmHWM, above VmRSS in front of the prompt), the
most of the rounds.

What is measured is fitted, the hybrid by a T, the dense model by a T + b T^2, and drawn up to 4M tokens.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.long_generation import resident  # noqa: E402
from spikingbrain_train.config.command_line import user_errors  # noqa: E402
from spikingbrain_train.reporting.tables import table  # noqa: E402

GROWTH_BOUND, MEMORY_BOUND = 1.2, 1.2
FARTHEST = 4 << 20
"""Tokens up to which the fits are drawn."""
HYBRID, DENSE = "hybrid", "dense"


@dataclass(frozen=True)
class Reading:
    """A prompt read up to its first new token."""

    cpu_seconds: float
    seconds: float
    above: float
    """MiB at the highest point above what was there with the model and the prompt."""


def make_folders(args: argparse.Namespace, work: Path) -> dict[str, Path]:
    """Folders of the dense source and of the hybrid made of it, both as transformers loads them."""
    from spikingbrain_train.config.conversion import ConversionConfig
    from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
    from spikingbrain_train.conversion.import_checkpoint import import_checkpoint

    source = args.source or save_random_source(args, work / "source")
    recipe = ConversionConfig(mixers=list(args.mixers), sliding_window=args.window)
    import_checkpoint(source, work / "checkpoint", recipe)
    export_checkpoint(work / "checkpoint", work / "export")
    return {HYBRID: work / "export", DENSE: source}


def save_random_source(args: argparse.Namespace, folder: Path) -> Path:
    """A Llama of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        head_dim=64,
        max_position_embeddings=FARTHEST,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def read(folder: Path, tokens: int, piece: int | None) -> Reading:
    """Read a prompt in a process of its own; ``piece`` None: at once."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_read, args=(there, folder, tokens, piece), daemon=True)
    process.start()
    there.close()
    try:
        found: Reading = here.recv()
    except EOFError:
        process.join()
        raise SystemExit(
            f"reading {tokens} tokens of {folder} ended with code {process.exitcode}; it may have needed "
            "more memory than there is: leave out the longest of --dense-lengths"
        ) from None
    process.join()
    return found


def _read(parent: Connection, folder: Path, tokens: int, piece: int | None) -> None:
    import torch
    from transformers import GenerationConfig

    from spikingbrain_train.evaluation.pretrained import load_causal_lm

    torch.set_num_threads(1)
    model = load_causal_lm(folder, trust_remote_code=True, dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.randint(1, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))
    model.generation_config = GenerationConfig(max_new_tokens=1, do_sample=False, pad_token_id=0)
    generate: Any = model.generate
    generate(ids[:, :64], attention_mask=torch.ones_like(ids[:, :64]))  # what is made on first use is there
    if piece is not None and tokens > piece:
        model.generation_config.prefill_chunk_size = piece
    mask = torch.ones_like(ids)
    gc.collect()
    before, cpu, wall = resident("VmRSS"), time.process_time(), time.perf_counter()
    generate(ids, attention_mask=mask)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    parent.send(Reading(cpu, wall, resident("VmHWM") - before))


def measure(
    folders: Mapping[str, Path], lengths: Mapping[str, Sequence[int]], args: argparse.Namespace
) -> dict[str, dict[int, list[Reading]]]:
    """Readings of both models at all their lengths, in turn."""
    found: dict[str, dict[int, list[Reading]]] = {name: defaultdict(list) for name in folders}
    for number in range(args.rounds):
        for tokens in sorted({each for of_model in lengths.values() for each in of_model}):
            for name, folder in folders.items():
                known = found[name][tokens] if tokens in lengths[name] else None
                if known is None or known and known[0].cpu_seconds > args.repeat_below:
                    continue
                known.append(read(folder, tokens, args.piece if name == HYBRID else None))
                reading = known[-1]
                print(
                    f"round {number + 1}: {name} {tokens} tokens, {reading.cpu_seconds:.2f} s of CPU, "
                    f"{reading.seconds:.2f} s, {reading.above:.0f} MiB",
                    file=sys.stderr,
                    flush=True,
                )
    return found


def fit(seconds: Mapping[int, float], powers: Sequence[int]) -> list[float]:
    """Coefficients of T to the powers, not negative, of least relative error."""
    import numpy
    from scipy.optimize import nnls

    lengths, times = numpy.array(list(seconds), dtype=float), numpy.array(list(seconds.values()))
    coefficients, _ = nnls(
        numpy.stack([lengths**power / times for power in powers], axis=1), numpy.ones(len(times))
    )
    return [float(each) for each in coefficients]


def at(coefficients: Sequence[float], tokens: float) -> float:
    """Seconds that a fit says: a T, or a T + b T^2."""
    return sum(each * tokens ** (power + 1) for power, each in enumerate(coefficients))


def report(found: Mapping[str, Mapping[int, Sequence[Reading]]], picture: Path | None) -> bool:
    """Tables, fits and a picture; whether the bounds are held."""
    seconds = {
        name: {tokens: min(r.cpu_seconds for r in readings) for tokens, readings in rows.items()}
        for name, rows in found.items()
    }
    memory = {
        name: {tokens: max(r.above for r in readings) for tokens, readings in rows.items()}
        for name, rows in found.items()
    }
    rows = [["tokens", "hybrid", "a token", "memory", "dense", "a token", "memory", "dense / hybrid"]]
    for tokens in sorted({*seconds[HYBRID], *seconds[DENSE]}):
        cells = [str(tokens)]
        for name in (HYBRID, DENSE):
            if tokens in seconds[name]:
                spent = seconds[name][tokens]
                cells += [
                    f"{spent:.2f} s",
                    f"{1e6 * spent / tokens:.1f} us",
                    f"{memory[name][tokens]:.0f} MiB",
                ]
            else:
                cells += ["-"] * 3
        both = all(tokens in seconds[name] for name in (HYBRID, DENSE))
        cells.append(f"{seconds[DENSE][tokens] / seconds[HYBRID][tokens]:.2f} x" if both else "-")
        rows.append(cells)
    print("\n".join(table(rows, left=1)))
    held = [_growth(seconds), _memory_growth(memory[HYBRID])]
    fits = {HYBRID: fit(seconds[HYBRID], [1])}
    if seconds[DENSE]:
        fits[DENSE] = fit(seconds[DENSE], [1, 2])
    for name, coefficients in fits.items():
        terms = [f"{each:.3g} T^{power + 1}" for power, each in enumerate(coefficients)]
        off = max(abs(at(coefficients, tokens) / spent - 1) for tokens, spent in seconds[name].items())
        print(
            f"{name}: seconds = {' + '.join(terms).replace('T^1', 'T')}, at most {100 * off:.0f} % off what "
            f"was measured; at {FARTHEST} tokens {at(coefficients, FARTHEST):.4g} s"
        )
    if DENSE in fits:
        ratio = at(fits[DENSE], FARTHEST) / at(fits[HYBRID], FARTHEST)
        print(f"at {FARTHEST} tokens, by these fits, the dense model takes {ratio:.0f} x the hybrid's time")
    if picture is not None:
        draw(seconds, fits, picture)
    return all(held)


def _growth(seconds: Mapping[str, Mapping[int, float]]) -> bool:
    """The row of time a token, the longest prompts up to 256k against those of 4k; whether it is held."""
    held = True
    for name, of_model in seconds.items():
        shorter = min((each for each in of_model if each >= 4096), default=None)
        longer = max((each for each in of_model if each <= 262144), default=None)
        if shorter is None or longer is None or longer <= shorter:
            continue
        growth = (of_model[longer] / longer) / (of_model[shorter] / shorter)
        print(f"\n{name}: a token takes {growth:.2f} x at {longer} tokens what it takes at {shorter}")
        held &= name == DENSE or growth <= GROWTH_BOUND
    return held


def _memory_growth(memory: Mapping[int, float]) -> bool:
    """The row of memory, the longest prompt against the shortest from 16k on; whether it is held."""
    lengths = [each for each in memory if each >= 16384]
    if len(lengths) < 2:
        return True
    growth = memory[max(lengths)] / memory[min(lengths)]
    print(f"\nhybrid: {max(lengths)} tokens take {growth:.2f} x the memory of {min(lengths)}\n")
    return growth <= MEMORY_BOUND


def draw(seconds: Mapping[str, Mapping[int, float]], fits: Mapping[str, Sequence[float]], path: Path) -> None:
    """Seconds over tokens, what was measured as marks, the fits as lines."""
    from spikingbrain_train.reporting.plots.picture import save_figure

    save_figure(lambda: _figure(seconds, fits), path, "--picture")


def _figure(seconds: Mapping[str, Mapping[int, float]], fits: Mapping[str, Sequence[float]]) -> Any:
    from matplotlib.figure import Figure

    from spikingbrain_train.reporting.plots.picture import dress
    from spikingbrain_train.reporting.plots.style import WIDTH, count_text, line_style

    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    panel = figure.subplots()
    first = min(tokens for of_model in seconds.values() for tokens in of_model)
    lengths = [first * (FARTHEST / first) ** (step / 60) for step in range(61)]
    for number, (name, coefficients) in enumerate(fits.items()):
        style = line_style(number)
        formula = "a T" if len(coefficients) == 1 else "a T + b T²"
        panel.plot(
            lengths,
            [at(coefficients, tokens) for tokens in lengths],
            linewidth=1.3,
            label=f"{name}, fitted: {formula}",
            **style.keywords(),
        )
        panel.plot(
            list(seconds[name]),
            list(seconds[name].values()),
            style.marker,
            color=style.colour,
            markersize=5,
            label=f"{name}, measured",
        )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("tokens of the prompt")
    panel.set_ylabel("CPU seconds to the first token")
    panel.xaxis.set_major_formatter(lambda value, _: count_text(value))
    panel.yaxis.set_major_formatter(lambda value, _: count_text(value))
    dress(panel)
    panel.legend(frameon=False)
    return figure


def main() -> None:
    from spikingbrain_train.evaluation.sampling import AUTOMATIC_PIECE

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, help="folder of a dense model (default: random weights)")
    parser.add_argument("--width", type=int, default=256, help="hidden size of random weights (default 256)")
    parser.add_argument("--layers", type=int, default=2, help="depth of random weights (default 2)")
    parser.add_argument("--heads", type=int, default=1, help="heads of 64 of random weights (default 1)")
    parser.add_argument("--mixers", nargs="+", default=["gla", "swa"], help="of the hybrid, layer by layer")
    parser.add_argument("--window", type=int, default=1024, help="of swa layers (default 1024)")
    parser.add_argument(
        "--piece", type=int, default=AUTOMATIC_PIECE, help="tokens that the hybrid reads at a time"
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=[4096, 16384, 65536, 262144, 1048576],
        metavar="T",
        help="prompts of the hybrid",
    )
    parser.add_argument(
        "--dense-lengths",
        type=int,
        nargs="*",
        default=[4096, 16384, 65536],
        metavar="T",
        help="prompts of the dense source, whose time grows with their square",
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds, in turn (default 3)")
    parser.add_argument(
        "--repeat-below",
        type=float,
        default=60.0,
        metavar="S",
        help="readings of more CPU seconds are not repeated (default 60)",
    )
    parser.add_argument("--picture", type=Path, help="where to draw it (.png, .svg, .pdf)")
    args = parser.parse_args()
    with user_errors(), tempfile.TemporaryDirectory() as work:
        folders = make_folders(args, Path(work))
        found = measure(folders, {HYBRID: args.lengths, DENSE: args.dense_lengths}, args)
        held = report(found, args.picture)
    print(
        f"{'within' if held else 'NOT within'} the bounds of the hybrid: time a token {GROWTH_BOUND} x, "
        f"memory {MEMORY_BOUND} x"
    )


if __name__ == "__main__":
    main()
