"""More experts in a mixture of experts that computes the same function until it is trained on.

A new expert must not be chosen while it has learnt nothing. Routers read what an RMSNorm gives, so the logit
of a new row can be bounded against that of every old one, whatever the text: with ``x = g * n`` and
``|n|_2 <= sqrt(h)`` (a norm only shrinks below that by its epsilon),

    |(v - w) x| <= sqrt(h) |g * (v - w)|_2,   and   |(v - w) tanh(H x)| <= |v - w|_1

behind a hidden layer. A bias that is lower than the least of these bounds by :data:`MARGIN` keeps the new
expert out of every token's top k, and its share of the softmax below ``exp(-MARGIN)`` of the least likely old
expert's. So weights that are probabilities move by less than 1e-10 of their value, those that add up to 1 and
those that are 1 not at all. The bias goes to zero in training (``model.moe.router_bias_decay_iters``), by
which the new experts come in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spikingbrain_train.architecture.layers import layers
from spikingbrain_train.architecture.model_checks import check_model
from spikingbrain_train.architecture.moe import MOE
from spikingbrain_train.bricks.written_checkpoint import write_checkpoint
from spikingbrain_train.checkpoint.streaming import MegatronCheckpointReader
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.require import require
from spikingbrain_train.conversion.mapping import Parameter
from spikingbrain_train.conversion.megatron_source import check_tensors, read_model
from spikingbrain_train.ops.seeds import generator
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint

MARGIN = 25.0
"""Nats between the highest logit of a new expert and the lowest of an old one; exp(-25) is 1.4e-11."""
_ROUNDING = 1.02
"""Of a bound: the router reads numbers that were rounded, to 8 bits in bf16."""
_NOISE = 0.02
"""Of new router rows, times the standard deviation of the router: what tells a copy from its original."""
_SILENT_ROLES = ("mlp_down_weight", "lora_down_proj_")


@dataclass(frozen=True)
class Growth:
    """What is asked for.

    Attributes:
        sources: the expert that each new one is a copy of.
        silent: whether new experts give nothing at first: their down projection is zero.
        decay_iters: steps of training after which they are experts as the others.
        seed: of the noise on router rows.
    """

    sources: Sequence[int]
    silent: bool = False
    decay_iters: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Grown:
    """The result.

    Attributes:
        model: its architecture.
        biases: layer -> [new experts] float32.
    """

    model: ModelConfig
    biases: dict[int, Tensor]


def grown_model(stored: ModelConfig, growth: Growth) -> ModelConfig:
    """The architecture with the new experts.

    Raises:
        ConfigurationError: the network has no experts whose router is known, or not those that are asked for.
    """
    kinds = {layer.feed_forward for layer in layers(stored)}
    others = sorted(kind.name for kind in kinds if kind.routes_tokens and kind is not MOE)
    require(
        not others,
        f"--checkpoint has feed-forwards of the kind {', '.join(others)}, whose router grow does not know, "
        f"so it could not keep their function; grow those of the kind {MOE.name}",
    )
    require(
        MOE in kinds,
        "--checkpoint has no layers of experts; cut its dense feed-forwards with spikingbrain-bricks moefy, "
        "or upcycle them with spikingbrain-convert",
    )
    moe, number = stored.moe, len(growth.sources)
    require(number > 0, "--add is 0; add at least 1 expert")
    wrong = [source for source in growth.sources if not 0 <= source < moe.num_experts]
    require(
        not wrong,
        f"--copies-of has {', '.join(map(str, wrong))}, but the experts are 0 to {moe.num_experts - 1}; name "
        f"those",
    )
    more, capacity = moe.num_experts + number, moe.capacity_factor
    grown = replace(
        moe,
        num_experts=more,
        router_bias=True,
        router_bias_decay_iters=growth.decay_iters,
        # As many tokens as before: a capacity is in multiples of an even share, and rounded up to a whole
        # token, which a factor that is itself rounded up would make one more.
        capacity_factor=None if capacity is None else capacity * more / moe.num_experts * (1 - 1e-12),
    )
    model = replace(stored, moe=grown)
    check_model(model)
    return model


def grow(checkpoint: Path, output: Path, growth: Growth, *, overwrite: bool = False) -> Grown:
    """Write a checkpoint of weights alone, at iteration 0, with more experts in every layer of experts.

    Args:
        checkpoint: a run folder (its newest checkpoint is taken) or one ``iter_*`` folder, of any layout.
        output: folder to be made; it appears whole or not at all.
        growth: which experts are added.
        overwrite: replace an earlier result.

    Raises:
        ConfigurationError: see :func:`grown_model`.
        CheckpointError: the checkpoint cannot be read.
    """
    folder = resolve_checkpoint(checkpoint)
    stored = read_model(folder)
    model = grown_model(stored, growth)
    reader = MegatronCheckpointReader(folder)
    check_tensors(reader, stored)
    sources, biases = torch.tensor(list(growth.sources)), {}

    def value(parameter: Parameter) -> Tensor:
        role = parameter.roles[0]
        if role == "router":
            return torch.cat(_rows(reader, parameter.name, growth))
        if role == "router_bias":
            assert parameter.layer is not None
            old, new = _biases(reader, parameter.layer, stored, growth)
            biases[parameter.layer] = new
            return torch.cat((old, new))
        if not parameter.is_routed:
            whole = reader.read(parameter.name)
            return whole[: parameter.shape[0]].contiguous() if parameter.shape else whole
        whole = reader.read(parameter.name)
        added = whole[sources]
        if growth.silent and role.startswith(_SILENT_ROLES):
            added = torch.zeros_like(added)
        return torch.cat((whole, added))

    share = (model.moe.num_experts) / stored.moe.num_experts
    write_checkpoint(
        output,
        folder,
        model,
        value,
        round(reader.nbytes * share),
        overwrite=overwrite,
        did=f"{len(growth.sources)} experts added to {stored.moe.num_experts}",
    )
    return Grown(model, biases)


def _rows(reader: MegatronCheckpointReader, name: str, growth: Growth) -> tuple[Tensor, Tensor]:
    """Router rows [N, h] of old experts as they are, and of new ones: copies with a little noise.

    Without it a copy and its original would tie at every token once their biases are the same.
    """
    old = reader.read(name)
    drawn = torch.randn(
        (len(growth.sources), old.shape[1]), generator=generator(growth.seed, f"{name}.{len(old)}")
    )
    new = old[list(growth.sources)].float() + _NOISE * old.float().std() * drawn
    return old, new.to(old.dtype)


def _biases(
    reader: MegatronCheckpointReader, layer: int, stored: ModelConfig, growth: Growth
) -> tuple[Tensor, Tensor]:
    """[N] and [m] float32: those that old experts have, and low enough ones for the new."""
    prefix = f"decoder.layers.{layer}."
    old, new = _rows(reader, f"{prefix}mlp.router.weight", growth)
    has, gain = torch.zeros(len(old)), None
    if stored.moe.router_bias:
        has = reader.read(f"{prefix}mlp.router.bias").float()
    if stored.moe.router_hidden_size is None:
        gain = reader.read(f"{prefix}pre_mlp_layernorm.weight")
    return has, kept_out(old, new, has, gain)


def kept_out(old: Tensor, new: Tensor, bias: Tensor, gain: Tensor | None) -> Tensor:
    """Biases with which no new expert has a logit within :data:`MARGIN` of any old one, whatever is read.

    Args:
        old: [N, h] router rows.
        new: [m, h] router rows.
        bias: [N] of the old ones.
        gain: [h] of the RMSNorm in front; None where the rows read a tanh.

    Returns:
        [m] float32.
    """
    apart = new.double()[:, None] - old.double()  # [m, N, h]
    bound = apart.abs().sum(-1)
    if gain is not None:
        bound = len(gain) ** 0.5 * (apart * gain.double()).norm(dim=-1)
    return ((bias.double() - _ROUNDING * bound).amin(-1) - MARGIN).float()
