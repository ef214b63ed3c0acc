"""Weight gradients that a linear's own product adds to those of earlier micro-batches.

megatron-core's data parallelism keeps gradients in float32 (``main_grad``). Without more, a linear multiplies
its weight's gradient in the precision of the weights, and a hook adds that to ``main_grad``: another product
of the size of all weights in memory, and a pass over both. Apex's fused_weight_gradient_mlp_cuda
(megatron-core's ``gradient_accumulation_fusion``) and Transformer Engine's linears
(``fuse_wgrad_accumulation``) have the product add to ``main_grad`` itself. What they then return is a tensor
of no meaning, and ``grad_added_to_main_grad`` says that it is not to be added: whatever else gave that weight
a gradient would be lost with it. So this is switched on linear by linear, where the weight is multiplied here
and nowhere else, and behind the wrapping, which is what gives weights their ``main_grad``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from spikingbrain_train.config.enum_tables import entry_of
from spikingbrain_train.config.parallel import WeightGradientBackend
from spikingbrain_train.models.gpt_model import HybridGPTModel, ModelChunks
from spikingbrain_train.models.linears.transformed_linear import TransformedLinear

_WEIGHT = re.compile(r"weight\d*")  # grouped linears number theirs
_SWITCH: dict[WeightGradientBackend, str | None] = {
    WeightGradientBackend.autograd: None,
    WeightGradientBackend.apex: "gradient_accumulation_fusion",  # megatron-core's linears
    WeightGradientBackend.transformer_engine: "fuse_wgrad_accumulation",
}


def add_within_products(model: HybridGPTModel | ModelChunks) -> list[str]:
    """Have linears add their weights' gradients to ``main_grad`` as the model's kernels say.

    Left to autograd are: frozen weights; transformed ones, whose gradient passes through the transform; the
    output projection, which the loss multiplies itself, with the embedding's weight where they are tied; and
    all below a module whose ``weights_have_other_uses`` is true.

    Args:
        model: wrapped in megatron-core's data parallelism already.

    Returns:
        Names of the linears that do.
    """
    backend = model.kernels.weight_gradients
    switch = entry_of(backend, _SWITCH, "who adds weight gradients")
    if switch is None:
        return []
    found = []
    for chunk in model.chunks:
        passed_over = getattr(chunk, "output_layer", None)
        for name, module in _linears(chunk):
            if module is not passed_over and hasattr(module, switch) and _is_plain(module):
                setattr(module, switch, True)
                found.append(name)
    return found


def describe(model: HybridGPTModel | ModelChunks) -> list[str]:
    """How many trained weights have their gradients added so: a line for run_details.txt, if any may."""
    switch = entry_of(model.kernels.weight_gradients, _SWITCH, "who adds weight gradients")
    if switch is None:
        return []
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    added = sum(
        weight.numel()
        for chunk in model.chunks
        for _, linear in _linears(chunk)
        if getattr(linear, switch, False)
        for weight in _weights(linear)
    )
    return [f"of rank 0's trainable parameters {added:,} of {trained:,} have gradients added within products"]


def _weights(linear: torch.nn.Module) -> list[torch.nn.Parameter]:
    found = [weight for name, weight in linear._parameters.items() if _WEIGHT.fullmatch(name)]
    return [weight for weight in found if weight is not None]


def _linears(module: torch.nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """Modules with a weight, but for those whose weights have other uses."""
    if getattr(module, "weights_have_other_uses", False):
        return
    if _weights(module):
        yield prefix, module
    for name, child in module.named_children():
        yield from _linears(child, f"{prefix}.{name}" if prefix else name)


def _is_plain(linear: torch.nn.Module) -> bool:
    if isinstance(linear, TransformedLinear) and linear.transforms_weight:
        return False
    return all(
        weight.requires_grad and getattr(weight, "main_grad", None) is not None for weight in _weights(linear)
    )
