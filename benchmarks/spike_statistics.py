"""Claim: on real text, spikes are as rare as the paper says (SpikingBrain, arXiv 2509.05276, table 11).

Every linear projection of a Hugging Face model (all but the output head) reads spikes, and what they read is
counted for each k, next to the published numbers; then by projection at k = 3. Statistics need no training:
any dense source or exported model will do. For a training checkpoint, run spikingbrain-export first.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from spikingbrain_train.config.command_line import user_errors  # noqa: E402
from spikingbrain_train.data.documents import find_sources  # noqa: E402
from spikingbrain_train.evaluation.pretrained import load_causal_lm, load_text_tokenizer  # noqa: E402
from spikingbrain_train.models.linears.spike_statistics import SpikeStatistics  # noqa: E402
from spikingbrain_train.ops.spike_encoding import spike_counts, spike_encoding  # noqa: E402

PUBLISHED = {  # k: (share of values <= 7, sparsity), SpikingBrain-7B
    2.0: (0.989, 0.730),
    2.5: (0.976, 0.709),
    3.0: (0.951, 0.692),
    3.5: (0.916, 0.677),
    4.0: (0.877, 0.664),
}

STATISTICS = ("silent", "<= 7", "> 16", "spikes", "sparsity")


def read_windows(arguments: argparse.Namespace) -> Tensor:
    """[windows, seq_length] tokens of the text's first documents, packed."""
    tokenizer = load_text_tokenizer(arguments.model)
    wanted = arguments.windows * arguments.seq_length
    tokens: list[int] = []
    for source in find_sources([arguments.text]):
        for document in source.read():
            tokens += [*tokenizer.encode(document.text(arguments.text_key)), tokenizer.eos_token_id]
            if len(tokens) >= wanted:
                return torch.tensor(tokens[:wanted]).view(arguments.windows, arguments.seq_length)
    sys.exit(f"{arguments.text} has {len(tokens)} tokens, not {wanted}: ask for fewer or shorter --windows")


@torch.no_grad()
def count_spikes(
    model: PreTrainedModel, windows: Tensor, k: float | None
) -> tuple[dict[str, SpikeStatistics], float]:
    """Run the model on spikes. None leaves its inputs as they are.

    Returns:
        Statistics by name of projection, and the mean cross entropy (nats per token).
    """
    statistics: dict[str, SpikeStatistics] = defaultdict(lambda: SpikeStatistics(windows.device))
    head = model.get_output_embeddings()
    hooks = []

    def encode(name: str, x: Tensor, k: float) -> Tensor:
        statistics[name].add(spike_counts(x, k)[0])
        return spike_encoding(x, k)

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head and k is not None:
            name = path.rsplit(".", 1)[-1]
            hooks.append(
                module.register_forward_pre_hook(lambda _, inputs, name=name: encode(name, inputs[0], k))
            )
    losses = [model(window, labels=window).loss for window in windows.split(1)]
    for hook in hooks:
        hook.remove()
    return statistics, float(torch.stack(losses).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="FOLDER", help="Hugging Face folder")
    parser.add_argument(
        "--text",
        required=True,
        metavar="FILE",
        help="held-out text: .txt, .jsonl, compressed or not, or pydoc-topics",
    )
    parser.add_argument("--text-key", default="text", help="field of a JSON document (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=4, help="windows to read (default: %(default)s)")
    parser.add_argument(
        "--seq-length", type=int, default=512, help="tokens of a window (default: %(default)s)"
    )
    parser.add_argument("--k", type=float, nargs="+", default=list(PUBLISHED), help="default: table 11's")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--trust-remote-code", action="store_true", help="run modelling code in the folder")
    with user_errors():
        report(parser.parse_args())


def report(arguments: argparse.Namespace) -> None:
    """Print both tables in markdown."""
    windows = read_windows(arguments).to(arguments.device)
    model = load_causal_lm(
        arguments.model,
        trust_remote_code=arguments.trust_remote_code,
        dtype=torch.float32,
        device=arguments.device,
    )
    _, cross_entropy = count_spikes(model, windows, k=None)
    print(f"{windows.numel()} tokens, cross entropy without spikes {cross_entropy:.3f}\n")
    print_header("k", *STATISTICS, "cross entropy", "published: <= 7", "sparsity")
    by_projection = {}
    for k in arguments.k:
        by_projection[k], cross_entropy = count_spikes(model, windows, k)
        total = SpikeStatistics(windows.device)
        for part in by_projection[k].values():
            total.histogram += part.histogram
        published = [f"{value:.3f}" for value in PUBLISHED.get(k, ())]
        print_row(f"{k:g}", *values_of(total), f"{cross_entropy:.3f}", *published)
    for k in set(arguments.k) & {3.0}:
        print()
        print_header(f"projection, k = {k:g}", "channels", *STATISTICS)
        counted = {name: int(part.histogram.sum()) for name, part in by_projection[k].items()}
        for name, part in by_projection[k].items():
            print_row(name, f"{counted[name] / sum(counted.values()):.1%}", *values_of(part))


def values_of(statistics: SpikeStatistics) -> list[str]:
    """What the columns STATISTICS hold."""
    values = (
        statistics.share_up_to(0),
        statistics.share_up_to(7),
        1 - statistics.share_up_to(16),
        statistics.mean_spikes(),
        statistics.sparsity(),
    )
    return [f"{value:.3f}" for value in values]


def print_header(*columns: str) -> None:
    """The first two lines of a markdown table."""
    print_row(*columns)
    print_row(*("---" for _ in columns))


def print_row(*cells: str) -> None:
    """A line of a markdown table."""
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
