"""Wrote the runs of this folder with the code of commit b8cb626; see README.md. Not run by the tests.

git worktree add --detach /tmp/b8cb626 b8cb626
cd /tmp/b8cb626 && PYTHONPATH=. OMP_NUM_THREADS=1 python <this file> <an empty folder>
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from spikingbrain_train.config.conversion import ConversionConfig
from spikingbrain_train.config.load import load_model_config
from spikingbrain_train.config.model import (
    FeatureMap,
    GatedLinearAttentionConfig,
    GateKind,
    ModelConfig,
    MoEConfig,
    ParallelHybridConfig,
)
from spikingbrain_train.config.parallel import ClusterConfig, ParallelConfig
from spikingbrain_train.config.run import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    Precision,
    RunConfig,
)
from spikingbrain_train.config.stage import StageConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.data.indexed import IndexedDatasetWriter
from spikingbrain_train.parallel import process_groups
from spikingbrain_train.parallel.accelerator import detect
from spikingbrain_train.training.trainer import Trainer

SEED = 1234
MODEL_76B = ModelConfig(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=8,
    vocab_size=120,
    max_position_embeddings=64,
    mixers=[["gla", "swa"], ["gla", "full"]],
    sliding_window=9,
    gla=GatedLinearAttentionConfig(feature_map=FeatureMap.sigmoid, gate=GateKind.tied),
    parallel_hybrid=ParallelHybridConfig(init_softmax_weight=0.8, init_linear_weight=0.4),
    num_sink_tokens=4,
    feed_forwards=["dense", "moe"],
    moe=MoEConfig(num_experts=2, router_topk=1, num_shared_experts=1),
    norm_epsilon=1e-2,
    init_method_std=0.2,
    add_qkv_bias=True,
)


class Tokens:
    name = "tokens"
    fingerprint = "tokens-120"
    earlier_fingerprint = ""
    vocab_size = 120
    eos_id = 119


def write_data() -> None:
    Path("staging").mkdir()
    writer = IndexedDatasetWriter(Path("data"), Tokens(), Path("staging"))
    generator = numpy.random.default_rng(0)
    for _ in range(12):
        tokens = generator.integers(0, 119, generator.integers(20, 90)).astype(writer.dtype)
        writer.add_document(numpy.append(tokens, tokens.dtype.type(119)), text_bytes=len(tokens))
    writer.finish()
    writer.publish()
    shutil.rmtree("staging")


def write_source() -> None:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=120,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=119,
            initializer_range=0.2,
        )
    )
    model.save_pretrained("source")


def run(name: str, model: ModelConfig, precision: Precision, load: str | None) -> None:
    """Four steps; what is left is the checkpoint of step 2, and the losses of steps 3 and 4."""
    config = RunConfig(
        model=model,
        parallel=ParallelConfig(),
        cluster=ClusterConfig(peak_tflops=0.1),
        data=DataConfig(train=["data"]),
        optimizer=OptimizerConfig(
            lr=1e-2, lr_warmup_iters=2, clip_grad=0.5, new_parameter_lr_mult=3.0, adam_eps=1e-6
        ),
        stage=StageConfig(train_iters=4, seq_length=32, global_batch_size=4, micro_batch_size=2),
        checkpoint=CheckpointConfig(load=load, save_interval=2),
        logging=LoggingConfig(log_interval=1, tensorboard=False),
        output_dir=name,
        precision=precision,
        seed=SEED,
    )
    groups = process_groups.initialize(config.parallel, detect("cpu"), seed=SEED, timeout_minutes=2)
    trainer = Trainer(config, groups)
    steps: list[dict[str, float]] = []
    train_step = trainer._train_step

    def remember(batches):
        metrics, asked = train_step(batches)
        steps.append({"loss": metrics["train/loss"], "grad_norm": metrics["train/grad_norm"]})
        return metrics, asked

    trainer._train_step = remember
    trainer.train()
    process_groups.destroy()
    checkpoints = Path(name) / "checkpoints"
    shutil.rmtree(checkpoints / "iter_0000004")
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("2\n")
    for path in Path(name).iterdir():
        if path != checkpoints:
            path.unlink()
    expected = {"steps_3_and_4": steps[2:]}
    if load is not None:
        export_checkpoint(checkpoints / "iter_0000002", Path("export"))
        expected["export"] = {
            key: hashlib.sha256(f"{value.dtype}{list(value.shape)}".encode() + bits(value)).hexdigest()
            for key, value in sorted(load_file("export/model.safetensors").items())
        }
        shutil.rmtree("export")
    (Path(name) / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def main() -> None:
    os.chdir(sys.argv[1])  # no path of a machine is stored
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29517",
    )
    torch.set_num_threads(1)
    write_data()
    run("76b", MODEL_76B, Precision.fp32, None)
    write_source()
    import_checkpoint(
        Path("source"), Path("converted"), ConversionConfig(mixers=["gla", "swa"], sliding_window=9)
    )
    model = load_model_config(Path("converted/iter_0000000/model_config.yaml"))
    run("7b", model, Precision.bf16, "converted")
    shutil.rmtree("source")
    shutil.rmtree("converted")
    Path("data.checked").unlink()


if __name__ == "__main__":
    main()
