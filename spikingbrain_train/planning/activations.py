"""What a rank keeps between the forward and the backward pass. Pure Python: no torch.

Sums over the inventories that the kinds of layers give (spikingbrain_train/architecture) of the tensors that
autograd holds on to, so that tests can compare them with what it really holds; masks, indices and other small
change are left out. On GPUs torch's fused RMSNorm is assumed, which keeps its input (without one, before
torch 2.8, another 4 bytes of every normed number are kept).
"""

from __future__ import annotations

from collections.abc import Iterable

from spikingbrain_train.architecture.feed_forwards import Activations
from spikingbrain_train.architecture.fp8 import FP8_PROJECTIONS, fp8_weights
from spikingbrain_train.architecture.layers import Layer, alike
from spikingbrain_train.architecture.layers import layers as all_layers
from spikingbrain_train.architecture.linear_transforms import (
    LINEAR_TRANSFORMS,
    keeps_its_input,
    keeps_its_weight,
    transforms_of,
)
from spikingbrain_train.architecture.sizes import FP32, bytes_per_element, rank_tokens, row_bytes
from spikingbrain_train.architecture.weights import Weight
from spikingbrain_train.config.parallel import Recompute
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.planning.costs import layers_of_stage, virtual_stage_layers
from spikingbrain_train.planning.in_flight import most_in_flight
from spikingbrain_train.planning.launch import expects_gpu

_LOSS_CHUNK_BYTES = 1 << 30  # the fused output projection and loss hold at most so many logits (on a GPU)


def mixer_activations(config: RunConfig, layer: Layer) -> float:
    """Bytes per token that a layer's mixers, without their input, keep for backward on one rank."""
    row = row_bytes(config)
    total = sum(kind.activation_bytes(config) for kind in layer.mixers)
    if len(layer.mixers) > 1:  # the output of each branch, before and after its norm
        total += 2 * len(layer.mixers) * row
    # What transforms its input keeps its own copy; the first of these stands for the normed input.
    readers = [
        keeps_its_input(config.model, projection)
        for kind in layer.mixers
        for projection in kind.input_projections(config.model)
    ]
    if any(readers):
        total += (sum(readers) + (not all(readers)) - 1) * row
    return total


def weight_copies(config: RunConfig, weights: Iterable[Weight]) -> int:
    """Bytes of transformed weights on a rank that some of a layer's parameters have, for one micro-batch."""
    kept = [
        weight.numel_on_rank(config.parallel)
        for weight in weights
        if weight.projection is not None and keeps_its_weight(config.model, *weight.projection)
    ]
    return sum(kept) * bytes_per_element(config.precision)


def layer_weight_copies(config: RunConfig, layer: Layer, *, in_fp8: bool = False) -> Activations:
    """Transformed or FP8 weights of a layer: bytes on a rank for every micro-batch, not for every token.

    Of FP8 weights one copy, as it is multiplied in the backward pass; Transformer Engine keeps that of the
    forward pass as well.
    """
    copies = 2 if expects_gpu(config.cluster) else 1

    def bytes_of(weights: Iterable[Weight]) -> int:
        inside = sum(each.numel_on_rank(config.parallel) for each in fp8_weights(weights)) if in_fp8 else 0
        return weight_copies(config, weights) + copies * inside

    mixer = bytes_of(layer.mixer_weights(config.model))
    kept, again = (bytes_of(weights) for weights in _feed_forward_weights(config, layer))
    if config.parallel.recompute is Recompute.full:
        return Activations(0, mixer + kept + again)
    return Activations(mixer + kept, again)


def layer_transforms(config: RunConfig, layer: Layer) -> Activations:
    """What linear transforms keep beside the weights of a layer, per token: adapters."""

    def bytes_of(weights: Iterable[Weight]) -> float:
        return sum(kind.activation_bytes(config, each) for each in weights for kind in LINEAR_TRANSFORMS)

    mixer = bytes_of(layer.mixer_weights(config.model))
    kept, again = (bytes_of(weights) for weights in _feed_forward_weights(config, layer))
    return Activations(mixer + kept, again)


def _feed_forward_weights(config: RunConfig, layer: Layer) -> tuple[list[Weight], list[Weight]]:
    """Those of a layer whose linears keep what they made, and those whose linears make it again."""
    kept: list[Weight] = []
    again: list[Weight] = []
    for weight in layer.feed_forward_weights(config.model):
        (again if layer.feed_forward.computes_again(config, weight) else kept).append(weight)
    return kept, again


def _in_fp8(config: RunConfig, layer: Layer) -> Activations:
    """What a layer keeps more, per token, where its linears multiply in FP8; less is below 0.

    Each linear keeps its input as FP8 numbers, a byte each. In bf16 it is kept where others need it: gates,
    routers, adapters, the backward pass of softmax attention.
    """
    model, row = config.model, row_bytes(config)
    element, has_others = bytes_per_element(config.precision), bool(transforms_of(model))
    readers = [each for kind in layer.mixers for each in kind.input_projections(model)]
    inside = [each for each in readers if each in FP8_PROJECTIONS]
    mixer = len(inside) * row / element - (row if len(inside) == len(readers) and not has_others else 0.0)
    for kind in layer.mixers:
        is_read_by_others = has_others or (kind.keeps_its_output and not model.attn_sub_norm)
        for weight in fp8_weights(kind.weights(model)):
            if not weight.reads_input:
                width = weight.matrix_on_rank(config.parallel)[1]
                mixer += width if is_read_by_others else width - width * element
    kept, again = (
        sum(_of_feed_forward(config, layer, each, has_others) for each in fp8_weights(weights))
        for weights in _feed_forward_weights(config, layer)
    )
    return Activations(mixer + kept, again)


def _of_feed_forward(config: RunConfig, layer: Layer, weight: Weight, has_others: bool) -> float:
    """The same of one linear of a feed-forward."""
    parallel, element = config.parallel, bytes_per_element(config.precision)
    is_routed = weight.copies is not None and weight.copies.routed
    width: float = weight.matrix_on_rank(parallel)[1]
    if is_routed:
        width *= weight.active[0]  # experts of a token
        if parallel.expert_tensor_size == 1:
            width /= parallel.tensor_model_parallel_size  # ranks route a share of the tokens each
    elif weight.split_axis == 0:
        width = row_bytes(config) / element
    # Routers read what the shared expert reads.
    is_read_by_others = has_others or (
        layer.feed_forward.routes_tokens and not is_routed and weight.split_axis == 0
    )
    return width if is_read_by_others else width - width * element


def layer_activations(config: RunConfig, layer: Layer, *, in_fp8: bool = False) -> Activations:
    """A whole layer: residuals and norms, the mixer, the feed-forward.

    Args:
        config: the run.
        layer: what the layer is.
        in_fp8: whether its linears multiply in FP8.
    """
    row, ffn = row_bytes(config), layer.feed_forward.activations(config)
    # The residual in front of mixer and feed-forward, and what either norm makes of it.
    rows = 4 if layer.feed_forward.is_there else 2
    beside = layer_transforms(config, layer)
    kept = rows * row + mixer_activations(config, layer) + ffn.kept + beside.kept
    recomputed = ffn.recomputed + beside.recomputed
    if in_fp8:
        more = _in_fp8(config, layer)
        kept, recomputed = kept + more.kept, recomputed + more.recomputed
    if config.parallel.recompute is Recompute.full:
        return Activations(row, kept + recomputed)
    return Activations(kept, recomputed)


def _kept_in_fp8(config: RunConfig, layer: Layer) -> tuple[float, float]:
    """What a layer in FP8 keeps more: bytes per token, and bytes of weights for every micro-batch."""
    of_tokens = layer_activations(config, layer, in_fp8=True).kept - layer_activations(config, layer).kept
    of_weights = layer_weight_copies(config, layer, in_fp8=True).kept
    return of_tokens, of_weights - layer_weight_copies(config, layer).kept


def layer_working(config: RunConfig, layer: Layer) -> float:
    """Bytes per token that a layer's backward pass holds beside what was kept, at its widest point.

    That is in the feed-forward: its gradients, and those of the residual and of the layer's output. What
    kernels of mixers need is left out.
    """
    return layer.feed_forward.working(config) + 2 * row_bytes(config)


def activation_bytes(config: RunConfig, stage: int, micro_batches: int) -> float:
    """Activations on a rank of pipeline stage ``stage`` that trains all its layers, (interleaved) 1F1B."""
    model, parallel = config.model, config.parallel
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    element, tokens = bytes_per_element(config.precision), rank_tokens(config)
    described = all_layers(model)
    here = list(dict.fromkeys(layers_of_stage(model, parallel, stage)))
    activations = {layer: layer_activations(config, layer) for layer in here}
    copies = {layer: layer_weight_copies(config, layer) for layer in here}
    fp8 = {layer: _kept_in_fp8(config, layer) for layer in here} if config.fp8.format is not None else {}
    kept = []
    for numbers in virtual_stage_layers(model, parallel, stage):
        # The last layer's output goes to the next stage, or is what the final norm keeps.
        row = row_bytes(config) + model.kv_channels * FP32  # and rotary angles
        of_weights = 0.0
        for layer, number in alike(described[each] for each in numbers):
            row += number * activations[layer].kept
            of_weights += number * copies[layer].kept
        for number in numbers if fp8 else ():
            if config.fp8.in_layer(number, model.num_layers):
                row += fp8[described[number]][0]
                of_weights += fp8[described[number]][1]
        kept.append(tokens * row + of_weights)
    total = most_in_flight(kept, stage, stages, micro_batches)
    total += tokens * max(activations[layer].recomputed + layer_working(config, layer) for layer in here)
    total += max(copies[layer].recomputed for layer in here)
    if stage == stages - 1:
        rows = model.padded_vocab_size(tensor) / tensor
        # The logits of one chunk, which become their gradient; the gradients of projection and hidden states.
        total += min(tokens * rows * element, _LOSS_CHUNK_BYTES)
        total += (rows + tokens) * model.hidden_size * element
    return total
