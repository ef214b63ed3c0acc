"""What saving and verifying cost a run: steps that stand still, and bytes that are read again.

A model of 300M parameters on two ranks that share a machine, with the distributed optimizer: 3.6 GB a
checkpoint in fp32. In one run and in turns, a save that is waited for and one that is copied and written
beside the steps; then a checkpoint is read by one thread, and held to its checksums by one thread a core,
both from the disk, as after a restart, and both from the system's page cache.

    python benchmarks/checkpointing.py --output outputs/checkpointing
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from spikingbrain_train.config.model import ModelConfig  # noqa: E402
from spikingbrain_train.config.parallel import ClusterConfig, ParallelConfig  # noqa: E402
from spikingbrain_train.config.run import (  # noqa: E402
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    Precision,
    RunConfig,
)
from spikingbrain_train.config.stage import StageConfig  # noqa: E402
from spikingbrain_train.data.indexed import IndexedDatasetWriter  # noqa: E402

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


def config(output: Path) -> RunConfig:
    """A run of one step, behind which there is all of the state that a save holds."""
    return RunConfig(
        model=MODEL,
        parallel=ParallelConfig(use_distributed_optimizer=True),
        cluster=ClusterConfig(timeout_minutes=10, peak_tflops=0.1),
        data=DataConfig(train=[str(output / "tokens")]),
        stage=StageConfig(train_iters=1, seq_length=16, global_batch_size=2, micro_batch_size=1),
        optimizer=OptimizerConfig(lr_warmup_iters=0),
        checkpoint=CheckpointConfig(keep_last=1),
        logging=LoggingConfig(log_interval=1000, tensorboard=False),
        precision=Precision.fp32,
        output_dir=str(output / "run"),
    )


def measure(output: Path, rounds: int) -> dict[str, Any]:
    """On every rank: seconds of both kinds of saves in turns, and of reading; called under torchrun."""
    from spikingbrain_train.parallel.process_groups import initialize
    from spikingbrain_train.runtime.accelerator import detect
    from spikingbrain_train.training.trainer import Trainer

    parallel = ParallelConfig(use_distributed_optimizer=True)
    groups = initialize(parallel, detect(ClusterConfig().accelerator), seed=1, timeout_minutes=10)
    run = config(output)
    trainer = Trainer(run, groups)
    trainer.train()
    found: dict[str, Any] = {"waiting": [], "async": [], "complete": [], "warm": [], "cold": []}
    checkpoints, state = trainer.checkpoints, trainer.state
    # The first of both kinds touches memory for the first time, and does not count.
    for number in range(-1, rounds):
        for kind in ("waiting", "async"):
            run.checkpoint.async_save = kind == "async"
            state.iteration += 1
            torch.distributed.barrier()
            began = time.monotonic()
            checkpoints.begin(state, trainer.record)  # as training/callbacks/checkpointing.py does
            if kind == "waiting":
                checkpoint = checkpoints.wait()
            stood_still = time.monotonic() - began
            if kind == "async":
                checkpoint = checkpoints.wait()
            if number >= 0:
                found[kind].append(stood_still)
                if kind == "async":
                    found["complete"].append(time.monotonic() - began)
    found["parameters"] = sum(each.numel() for each in trainer.model.parameters())
    found["bytes"] = sum(path.stat().st_size for path in checkpoint.glob("*.distcp"))
    if groups.rank == 0:
        for kind in ("warm", "cold"):
            found[kind] = [_read(checkpoint, from_disk=kind == "cold") for _ in range(3)]
    torch.distributed.barrier()
    return found


def _read(checkpoint: Path, from_disk: bool) -> tuple[float, float]:
    """Seconds to read the files of a checkpoint, and to hold all of them to their checksums."""
    from spikingbrain_train.checkpoint.verification import reading_threads
    from spikingbrain_train.storage.checkpoint_manifest import read_manifest

    shards = sorted(checkpoint.glob("*.distcp"))
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    parts = [(each.name, at, size) for each in shards for at, (size, _) in manifest.files[each.name].items()]
    buffer = memoryview(bytearray(4 * 1024**2))

    def prepare() -> None:
        if not from_disk:
            plain()
            return
        for shard in shards:
            with shard.open("rb", buffering=0) as file:
                os.fsync(file.fileno())  # what is not written yet would stay in the cache
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def plain() -> None:
        for shard in shards:
            with shard.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    prepare()
    began = time.monotonic()
    plain()
    read = time.monotonic() - began
    prepare()
    began = time.monotonic()
    manifest.check_parts(parts, max(reading_threads(), len(os.sched_getaffinity(0))))
    return read, time.monotonic() - began


def main() -> None:
    """Start the two ranks, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/checkpointing"), help="folder to write to"
    )
    parser.add_argument("--rounds", type=int, default=2, help="saves of each kind that count (default: 2)")
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
    print(f"{found['parameters'] / 1e6:.0f}M parameters, {found['bytes'] / 1e9:.2f} GB a checkpoint\n")
    print("| what | seconds | range | against |\n|---|---|---|---|")

    def row(what: str, values: Sequence[float], against: str) -> None:
        span = f"{min(values):.2f} to {max(values):.2f}"
        print(f"| {what} | {statistics.median(values):.2f} | {span} | {against} |")

    row("steps stand still, save waited for", found["waiting"], "")
    row("steps stand still, async save", found["async"], f"{going_on / waiting:.2f}")
    row("until that one is complete", found["complete"], "")
    for kind, where in (("cold", "from the disk"), ("warm", "from the page cache")):
        read, verified = zip(*found[kind], strict=True)
        row(f"reading a checkpoint {where}", read, "")
        ratio = statistics.median(verified) / statistics.median(read)
        row("holding it to its checksums", verified, f"{ratio:.2f}")


if __name__ == "__main__":
    main()
