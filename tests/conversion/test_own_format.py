"""Exports in this project's own format compute what the Megatron model computes, for every kind of model.

Bound of logits: 2e-4, of order 1-10 in float32; generation is compared token for token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from spikingbrain_train.architecture.same_architecture import roles, settings_in_use
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.linear_transforms import GateEncoding, Projection, SpikingConfig
from spikingbrain_train.config.load import load_model_config, save_config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.rope_scaling import RopeScalingConfig, RopeType
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.setting import Role
from spikingbrain_train.config.stage import SpikeAnnealingConfig, StageConfig
from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.import_checkpoint import import_checkpoint
from spikingbrain_train.hf.modeling_gla_swa import GLAswaForCausalLM
from spikingbrain_train.hf.modeling_spikingbrain import SpikingBrainForCausalLM
from spikingbrain_train.storage.checkpoint_folder import (
    LATEST_ITERATION_FILE,
    MODEL_CONFIG_FILE,
    RUN_CONFIG_FILE,
)
from tests.distributed.gradients import CASES, model_of_known_weights
from tests.distributed.pool import RankPool

if TYPE_CHECKING:
    from spikingbrain_train.parallel.process_groups import ProcessGroups

TOLERANCE = 2e-4
NEW_TOKENS = 64
PROMPTS = (23, 5)  # tokens; the windows of 21 lie between
DOCUMENTS = (0, 1, 30, 52)
TEXT = torch.randint(0, 130, (2, DOCUMENTS[-1]), generator=torch.Generator().manual_seed(11))

_76B = CASES["76B-like"].model
MODELS: dict[str, ModelConfig] = {
    name: case.model
    for name, case in CASES.items()
    # The same models in evaluation are left out, and adapters, which are no part of an export.
    if not case.packed and not case.l1_factor and "drop-out" not in name and not case.model.lora.names
} | {
    "sub-norms, squared ReLU": CASES["sub-norms, squared ReLU"].model,
    "Mamba, norms and biases, sinks": CASES["Mamba, norms and biases, sinks, packed documents"].model,
    # Experts, both matrices of the gate and the output gate read spikes; scaled rotary positions.
    "76B-like, spiking, tied embeddings": replace(
        _76B,
        spiking=SpikingConfig(list(Projection), GateEncoding.each_matrix, k=2.5),
        gla=replace(CASES["GLA, options"].model.gla, num_query_groups=None),
        norm_epsilon=1e-1,
        rope_scaling=RopeScalingConfig(
            rope_type=RopeType.yarn, factor=8.0, original_max_position_embeddings=16
        ),
        share_embeddings_and_output_weights=True,
        add_output_bias=True,
        moe=replace(_76B.moe, aux_loss_coeff=0.5, capacity_factor=1.5),
        parallel_hybrid=replace(_76B.parallel_hybrid, softmax_dropout=0.25),
    ),
}
ANNEALED, INITIAL_K, K_OF_ITERATION_3 = "76B-like, spiking, tied embeddings", 10.0, 5.0
"""From 10 to 2.5 in 6 iterations, each as much as the other."""


@dataclass
class Expected:
    """What the Megatron model gives."""

    logits: Tensor
    packed: Tensor
    generated: list[Tensor]


def prompts() -> list[Tensor]:
    return [TEXT[index % 2, :length] for index, length in enumerate(PROMPTS)]


def save_and_compute(
    groups: ProcessGroups,
    model: ModelConfig,
    stored: ModelConfig,
    target: Path,
    dtype: torch.dtype = torch.float32,
) -> Expected:
    """Save a model of known weights to ``target``; its logits, those of packed documents, greedy texts.

    Logits are computed in ``dtype`` with the float32 weights that are saved. The checkpoint is one of a run
    on its way to ``stored`` where that has another k.
    """
    from spikingbrain_train.models.incremental_decoding import IncrementalDecoder
    from tests.checkpoint.shards import save_shards
    from tests.conversion.megatron_models import _sharded_weights

    built = model_of_known_weights(groups, model, ParallelConfig()).eval()
    checkpoint = target / "iter_0000003"
    checkpoint.mkdir(parents=True)
    save_config(stored, checkpoint / MODEL_CONFIG_FILE)
    if stored.spiking != model.spiking:
        annealing = SpikeAnnealingConfig(init_k=INITIAL_K, anneal_iters=6)
        stage = StageConfig(train_iters=6, seq_length=8, global_batch_size=1, spike_annealing=annealing)
        save_config(RunConfig(model=stored, stage=stage, output_dir="run"), checkpoint / RUN_CONFIG_FILE)
    save_shards({"model": _sharded_weights(built), "iteration": 3}, checkpoint)
    (target / LATEST_ITERATION_FILE).write_text("3")
    if dtype is not torch.float32:
        built = model_of_known_weights(groups, model, ParallelConfig(), dtype).eval()
    documents = SequenceLayout(DOCUMENTS[-1], model.num_sink_tokens, cu_seqlens=(DOCUMENTS,))
    with torch.no_grad():
        logits, packed = built(TEXT), built(TEXT[:1], layout=documents)
    decoder, generated = IncrementalDecoder(built), []
    for prompt in prompts():
        decoder.begin()
        tokens, texts = prompt.unsqueeze(0), []
        for _ in range(NEW_TOKENS):
            tokens = decoder.read(tokens).argmax(-1, keepdim=True)
            texts.append(tokens)
        generated.append(torch.cat(texts, dim=1)[0])
    vocabulary = model.vocab_size
    return Expected(logits[..., :vocabulary], packed[..., :vocabulary], generated)


def check_greedy_text(model: Any, expected: Expected) -> None:
    """Behind every prompt a model of transformers writes what the Megatron model has written."""
    for prompt, text in zip(prompts(), expected.generated, strict=True):
        ids = prompt.unsqueeze(0)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert torch.equal(found[0, len(prompt) :], text)


def check(model: SpikingBrainForCausalLM | GLAswaForCausalLM, expected: Expected) -> None:
    with torch.no_grad():
        logits = model(TEXT).logits
        packed = model(TEXT[:1], cu_seqlens=torch.tensor(DOCUMENTS)).logits
    assert logits.std() > 0.1
    assert (logits - expected.logits).abs().max() <= TOLERANCE
    assert (packed - expected.packed).abs().max() <= TOLERANCE
    longest = max(PROMPTS)
    ids, mask = torch.zeros(2, len(PROMPTS), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts()):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    generated = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    assert torch.equal(generated[:, longest:], torch.stack(expected.generated))


@pytest.mark.parametrize("name", MODELS)
def test_an_export_agrees_with_the_megatron_model_and_comes_back_bit_identical(
    ranks: RankPool, tmp_path: Path, name: str
) -> None:
    stored = model = MODELS[name]
    if name == ANNEALED:
        model = replace(stored, spiking=replace(stored.spiking, k=K_OF_ITERATION_3))
    dtype = CASES[name].dtype if name in CASES else torch.float32
    drops_nothing = replace(model, moe=replace(model.moe, capacity_factor=None))
    (expected,) = ranks.run(
        *(save_and_compute, drops_nothing, stored, tmp_path / "megatron", dtype),
        world_size=1,
        parallel=ParallelConfig(),
    )
    export_checkpoint(tmp_path / "megatron", tmp_path / "export", format_name="spikingbrain")
    exported = SpikingBrainForCausalLM.from_pretrained(tmp_path / "export").to(dtype).eval()
    check(exported, expected)

    import_checkpoint(tmp_path / "export", tmp_path / "again")
    first, second = (
        MegatronCheckpointReader(tmp_path / folder)
        for folder in ("megatron/iter_0000003", "again/iter_0000000")
    )
    assert first.tensors.keys() == second.tensors.keys()
    for tensor in second.tensors:
        ours = second.read(tensor)
        assert torch.equal(ours, first.read(tensor)[: len(ours)]), tensor
    read = settings_in_use(load_model_config(tmp_path / "again/iter_0000000" / MODEL_CONFIG_FILE))
    begins = {setting for setting, role in roles().items() if role is Role.start}
    for setting, value in settings_in_use(model).items():
        if setting not in begins:
            assert read[setting] == value, setting

    exported.float().save_pretrained(tmp_path / "saved")
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("saved", "export"))
    assert (
        all(torch.equal(ours[tensor], theirs[tensor]) for tensor in theirs) and ours.keys() == theirs.keys()
    )
    config = json.loads((tmp_path / "saved/config.json").read_text())
    written = json.loads((tmp_path / "export/config.json").read_text())
    assert {key: config[key] for key in written if key != "torch_dtype"} == {
        key: written[key] for key in written if key != "torch_dtype"
    }
