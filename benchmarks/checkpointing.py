"""What saving and verifying cost a run: steps that stand still, and bytes that are read again.

A model of 300M parameters on two ranks that share a machine, with the distributed optimizer: 3.6 GB a
checkpoint in fp32. In one process group and in turns, steps with a save that is waited for and with one that
is copied and written beside the steps; then a checkpoint is read with and without its checksums, the page
cache being warm for both.

    python benchmarks/checkpointing.py --output outputs/checkpointing
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from spikingbrain_train.config.model import ModelConfig  # noqa: E402
from spikingbrain_train.config.parallel import ClusterConfig, ParallelConfig  # noqa: E402
from spikingbrain_train.config.run import (  # noqa: E402
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    Precision,
    RunConfig,
)
from spikingbrain_train.config.stage import StageConfig  # noqa: E402
from spikingbrain_train.data.indexed import IndexedDatasetWriter  # noqa: E402
from spikingbrain_train.storage.checkpoint_folder import latest_checkpoint  # noqa: E402
from spikingbrain_train.training.callbacks.callback import Callback  # noqa: E402

MODEL = ModelConfig(
    num_layers=24,
    hidden_size=1024,
    ffn_hidden_size=3072,
    num_attention_heads=16,
    num_query_groups=4,
    kv_channels=64,
    vocab_size=16384,
    max_position_embeddings=64,
    mixers=["gla", "swa"],
    sliding_window=32,
    share_embeddings_and_output_weights=True,
)


class NumbersOnly:
    """The tokenizer of random numbers."""

    name = "random"
    fingerprint = "random"
    earlier_fingerprint = ""
    vocab_size = MODEL.vocab_size
    eos_id = 0


def write_tokens(prefix: Path) -> None:
    """A dataset of random numbers."""
    generator = numpy.random.default_rng(1)
    staging = prefix.parent / "staging"
    staging.mkdir(exist_ok=True)
    writer = IndexedDatasetWriter(prefix, NumbersOnly(), staging)  # type: ignore[arg-type]
    for _ in range(50):
        writer.add_document(generator.integers(0, MODEL.vocab_size, 1000).astype(writer.dtype), 1000)
    writer.finish()
    writer.publish()


class Stopwatch(Callback):
    """Seconds that the steps stand still for a save, and until it is complete."""

    def __init__(self) -> None:
        self.stood_still: list[float] = []
        self.complete: list[float] = []
        self._began = 0.0

    def before_save(self) -> None:
        self._began = time.monotonic()

    def after_snapshot(self) -> None:
        self.stood_still.append(time.monotonic() - self._began)

    def after_save(self, folder: Path) -> None:
        self.complete.append(time.monotonic() - self._began)


def config(output: Path, data: Path, *, async_save: bool, saves: int, between: int) -> RunConfig:
    """A run that saves every ``between`` steps."""
    return RunConfig(
        model=MODEL,
        parallel=ParallelConfig(use_distributed_optimizer=True),
        cluster=ClusterConfig(timeout_minutes=10),
        data=DataConfig(train=[str(data)]),
        stage=StageConfig(
            train_iters=saves * between, seq_length=64, global_batch_size=2, micro_batch_size=1
        ),
        checkpoint=CheckpointConfig(save_interval=between, keep_last=1, async_save=async_save),
        logging=LoggingConfig(log_interval=1000, tensorboard=False),
        precision=Precision.fp32,
        output_dir=str(output),
    )


def measure(output: Path, rounds: int) -> dict[str, Any]:
    """On every rank: seconds of both kinds of saves in turns, and of reading; called under torchrun."""
    from spikingbrain_train.parallel.process_groups import initialize
    from spikingbrain_train.runtime.accelerator import detect
    from spikingbrain_train.training.trainer import Trainer

    data = output / "tokens"
    parallel = ParallelConfig(use_distributed_optimizer=True)
    groups = initialize(parallel, detect(ClusterConfig().accelerator), seed=1, timeout_minutes=10)
    found: dict[str, Any] = {
        "parameters": 0,
        "waiting": [],
        "async": [],
        "complete": [],
        "read": [],
        "verified": [],
    }
    for number in range(rounds):
        for kind in ("waiting", "async"):
            folder = output / f"{kind}_{number}"
            watch = Stopwatch()
            # Three saves a run: the first touches memory for the first time, the last is always waited for.
            run = config(folder, data, async_save=kind == "async", saves=3, between=6)
            trainer = Trainer(run, groups, [watch])
            trainer.train()
            found["parameters"] = sum(each.numel() for each in trainer.model.parameters())
            found[kind] += watch.stood_still[:-1]
            if kind == "async":
                found["complete"] += watch.complete[:-1]
            checkpoint = latest_checkpoint(folder / "checkpoints", "output_dir")
            size = sum(path.stat().st_size for path in checkpoint.glob("*.distcp"))
            found["bytes"] = size
            if kind == "async" and groups.rank == 0:
                plain, checked = _read(checkpoint)
                found["read"].append(plain)
                found["verified"].append(checked)
            del trainer
            if groups.rank == 0:
                shutil.rmtree(folder)
            import torch

            torch.distributed.barrier()
    return found


def _read(checkpoint: Path) -> tuple[float, float]:
    """Seconds to read the files of a checkpoint, and to hold all of them to their checksums; cache warm."""
    from spikingbrain_train.storage.checkpoint_manifest import read_manifest

    block = 4 * 1024**2
    shards = sorted(checkpoint.glob("*.distcp"))

    def plain() -> None:
        for shard in shards:
            with shard.open("rb", buffering=0) as file:
                while file.read(block):
                    pass

    manifest = read_manifest(checkpoint)
    assert manifest is not None
    plain()
    began = time.monotonic()
    plain()
    read = time.monotonic() - began
    began = time.monotonic()
    for shard in shards:
        manifest.check_file(shard.name)
    return read, time.monotonic() - began


def main() -> None:
    """Start the two ranks, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/checkpointing"), help="folder to write to"
    )
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind (default: 2)")
    arguments = parser.parse_args()
    output: Path = arguments.output.resolve()
    if "RANK" in os.environ:
        found = measure(output, arguments.rounds)
        if os.environ["RANK"] == "0":
            (output / "found.json").write_text(json.dumps(found))
        return
    output.mkdir(parents=True, exist_ok=True)
    write_tokens(output / "tokens")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"]
    again = [str(Path(__file__).resolve()), "--output", str(output), "--rounds", str(arguments.rounds)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *launcher, *again], check=True, env=environment)
    report(json.loads((output / "found.json").read_text()))


def report(found: dict[str, Any]) -> None:
    """The table, as it stands in checkpointing.md."""
    waiting, going_on = statistics.median(found["waiting"]), statistics.median(found["async"])
    read, verified = statistics.median(found["read"]), statistics.median(found["verified"])
    print(f"{found['parameters'] / 1e6:.0f}M parameters, {found['bytes'] / 1e9:.2f} GB a checkpoint\n")
    print("| what | seconds | range | against |\n|---|---|---|---|")

    def row(what: str, values: list[float], against: str) -> None:
        span = f"{min(values):.2f} to {max(values):.2f}"
        print(f"| {what} | {statistics.median(values):.2f} | {span} | {against} |")

    row("steps stand still, save waited for", found["waiting"], "")
    row("steps stand still, async save", found["async"], f"{going_on / waiting:.2f}")
    row("until that one is complete", found["complete"], "")
    row("reading a checkpoint", found["read"], "")
    row("holding it to its checksums", found["verified"], f"{verified / read:.2f}")


if __name__ == "__main__":
    main()
