"""INT8 weights and spiking activations (W8ASpike) of an exported model; SpikingBrain, arXiv 2509.05276, 3.3.

Part of the modelling code of a checkpoint whose config.json has a `quantization_config`:

    {"quant_method": "w8aspike",
     "group_size": 128,                   weights along the input that share a scale; null is a whole row
     "linears": {"q_proj": "spikes",      name of a linear -> what it makes of its input
                 "down_proj": "int8", ...},
     "k": 3.0,                            spikes: threshold mean |x| / k of a token
     "embeddings": true,                  the token embedding is INT8, too
     "keys_and_values": true}             softmax layers hold INT8 keys and values, a scale a token and head

Tensors: `<linear>.weight` int8 [out, in], `<linear>.weight_scale` [out, groups] and the linear's own bias.
Scales have the eight digits of bfloat16, so that they are the same in whichever format a model is loaded.

Inputs become whole numbers times one number a token: spike counts round(x / (mean |x| / k)); INT8 numbers
round(x / (max |x| / 127)); 16-bit ones, round(x / (max |x| / 32384)), which are several INT8 numbers each
("int16", next to floats in quality); or stay floats ("float"). On CPUs whole numbers are multiplied by INT8
weights as integers, group by group (products_w8aspike.py); elsewhere, and while a gradient is wanted, both
become floats, whose product is the same up to rounding. Gradients go straight through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .counts_w8aspike import FEW_TOKENS, LARGEST, LAST_COUNTS, encoded_input
from .products_w8aspike import PackedWeight

QUANT_METHOD = "w8aspike"
ACTIVATIONS = ("spikes", "int8", "int16", "float")
_MIN_SCALE, _MAX_SCALE = 1e-5, 1e4


def group_scales(weight: Tensor, group_size: int | None) -> Tensor:
    """max |w| / 127 of every group, rounded up to bfloat16: [out, groups] float32."""
    width = min(group_size or weight.shape[1], weight.shape[1])
    largest = weight.detach().float().unflatten(1, (-1, width)).abs().amax(-1)
    exact = (largest / LARGEST).clamp_(min=torch.finfo(torch.bfloat16).tiny)
    near = exact.to(torch.bfloat16)
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(near.float() < exact, above, near).float()


def round_weight(weight: Tensor, scales: Tensor) -> Tensor:
    """int8 [out, in] codes of a weight, given the scales [out, groups] of its groups."""
    grouped = weight.detach().float().unflatten(1, (scales.shape[1], -1))
    codes = (grouped / scales.float().unsqueeze(-1)).round_().clamp_(-LARGEST, LARGEST)
    return codes.flatten(1).to(torch.int8)


def int8_vectors(x: Tensor) -> Tensor:
    """Keys or values [..., head_dim] as INT8 numbers hold them, with one scale a vector."""
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.abs().amax(-1, keepdim=True) / LARGEST).clamp_(_MIN_SCALE, _MAX_SCALE)
    rounded = ((wide / scale).round_() * scale).to(x.dtype)
    return x + (rounded - x).detach() if x.requires_grad else rounded


class W8ASpikeLinear(nn.Module):
    """A linear layer with INT8 weights.

    Args:
        in_features, out_features: sizes.
        bias: whether it has one.
        group_size: weights along the input that share a scale; None is a whole row. Must divide in_features
            where it is smaller.
        activation: "spikes", "int8", "int16" or "float".
        k: fineness of spikes.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        group_size: int | None,
        activation: str,
        k: float,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f'quantization_config names the activation "{activation}"; it is one of {ACTIVATIONS}.'
            )
        width = min(group_size or in_features, in_features)
        if in_features % width:
            raise ValueError(f"group_size {group_size} does not divide the {in_features} inputs of a linear.")
        self.in_features, self.out_features = in_features, out_features
        self.activation, self.k = activation, k
        codes = torch.zeros(out_features, in_features, dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(out_features, in_features // width), requires_grad=False)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)
        self._packed: tuple | None = None
        self._joint: tuple | None = None
        self._float: tuple | None = None

    def extra_repr(self) -> str:
        width = self.in_features // self.weight_scale.shape[1]
        return f"{self.in_features}, {self.out_features}, groups of {width}, {self.activation}"

    def keep_stored_bias(self, bias: Tensor) -> None:
        """Zeros that are stored for other readers, as a buffer."""
        del self.bias
        self.register_buffer("bias", bias)

    def float_weight(self) -> Tensor:
        """[out, in] in the dtype of the scales: what the codes stand for."""
        grouped = self.weight.unflatten(1, (self.weight_scale.shape[1], -1)).to(self.weight_scale.dtype)
        return (grouped * self.weight_scale.unsqueeze(-1)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out] in x's dtype."""
        if not self.multiplies_integers(x):
            encoded = encoded_input(x, self.activation, self.k)
            return F.linear(encoded, self._float_weight_for(x), self.bias)
        counts, bias = LAST_COUNTS.of(x, self.activation, self.k), self.bias
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            return self._packed_weight().product(counts, None, x.dtype).view(*x.shape[:-1], -1) + bias
        return self._packed_weight().product(counts, bias, x.dtype).view(*x.shape[:-1], -1)

    def multiplies_integers(self, x: Tensor) -> bool:
        """Whether x meets the codes as whole numbers: on CPUs, unless its gradient is wanted."""
        wants_gradient = x.requires_grad and torch.is_grad_enabled()
        is_integer = self.activation != "float" and x.device.type == "cpu"
        return is_integer and not wants_gradient and not torch.compiler.is_compiling()

    def version(self) -> tuple:
        """Another one where a tensor has changed."""
        weight, scale, bias = self.weight, self.weight_scale, self.bias
        found = weight.data_ptr(), weight._version, scale.data_ptr(), scale._version
        return found if bias is None else (*found, bias.data_ptr(), bias._version)

    def _packed_weight(self) -> PackedWeight:
        version = self.version()
        if self._packed is None or self._packed[0] != version:
            self._packed = (version, PackedWeight(self.weight, self.weight_scale))
        return self._packed[1]

    def _float_weight_for(self, x: Tensor) -> Tensor:
        if self.weight.numel() > _SMALL or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.float_weight().to(x.dtype)
        version = (*self.version(), x.dtype)
        if self._float is None or self._float[0] != version:
            self._float = (version, self.float_weight().to(x.dtype))
        return self._float[1]

    def __getstate__(self) -> dict:
        # What is packed is made anew, also in copies.
        return {**self.__dict__, "_packed": None, "_joint": None, "_float": None}


_SMALL = 1 << 16
"""Weights of a matrix that is kept as floats, too, where it reads floats: a gate's."""


class _JointLinears:
    """Linears that read the same, as one matrix."""

    def __init__(self, linears: Sequence[W8ASpikeLinear]) -> None:
        codes = torch.cat([linear.weight for linear in linears])
        self.packed = PackedWeight(codes, torch.cat([linear.weight_scale for linear in linears]))
        self.sizes = [linear.out_features for linear in linears]
        biases = [linear.bias for linear in linears]
        self.bias = None
        if any(bias is not None for bias in biases):
            zeros = [torch.zeros(size) for size in self.sizes]
            self.bias = torch.cat(
                [zero if bias is None else bias.float() for zero, bias in zip(zeros, biases, strict=True)]
            )


def joint_outputs(linears: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """What each of some linears makes of the same [..., in]; few tokens meet INT8 weights in one product."""
    found = [linear for linear in linears if type(linear) is W8ASpikeLinear and not _is_watched(linear)]
    first = found[0] if found else None
    if first is None or len(found) < len(linears) or x.numel() > FEW_TOKENS * first.in_features:
        return [linear(x) for linear in linears]
    kind = (first.activation, first.weight_scale.shape[1])
    differ = any((linear.activation, linear.weight_scale.shape[1]) != kind for linear in found[1:])
    if differ or torch.is_grad_enabled() or not first.multiplies_integers(x):
        return [linear(x) for linear in linears]
    versions = [linear.version() for linear in found]
    if first._joint is None or first._joint[0] != versions:
        first._joint = (versions, _JointLinears(found))
    joint: _JointLinears = first._joint[1]
    counts = LAST_COUNTS.of(x, first.activation, first.k)
    y = joint.packed.product(counts, joint.bias, x.dtype)
    return y.view(*x.shape[:-1], -1).split(joint.sizes, dim=-1)


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class W8ASpikeEmbedding(nn.Module):
    """A token embedding with INT8 rows; a row is made a float when it is looked up."""

    def __init__(self, num_embeddings: int, embedding_dim: int, group_size: int | None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        width = min(group_size or embedding_dim, embedding_dim)
        codes = torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(
            torch.ones(num_embeddings, embedding_dim // width), requires_grad=False
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        """[...] ids to [..., embedding_dim] in the dtype of the scales."""
        scale = F.embedding(input_ids, self.weight_scale)
        codes = self.weight[input_ids].unflatten(-1, (scale.shape[-1], -1)).to(scale.dtype)
        return (codes * scale.unsqueeze(-1)).flatten(-2)


def quantized_linears(model: nn.Module, settings: dict) -> Iterator[tuple[str, nn.Linear, str]]:
    """Name, linear and activation of every linear that `settings` name: by its last name or its last two."""
    linears = settings["linears"]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            parts = name.split(".")
            activation = linears.get(parts[-1], linears.get(".".join(parts[-2:])))
            if activation is not None:
                yield name, module, activation


def quantize_modules(model: nn.Module, settings: dict) -> None:
    """Put empty INT8 modules in the place of the float ones that `settings` name, before weights are loaded.

    Args:
        model: with linears, and an embedding that `get_input_embeddings` gives.
        settings: the `quantization_config` of config.json.

    Raises:
        ValueError: another method, an unknown activation, a group size that does not divide.
    """
    check_settings(settings)
    for module in model.modules():
        if hasattr(module, "int8_keys_and_values"):
            setattr(module, "int8_keys_and_values", bool(settings.get("keys_and_values")))  # noqa: B010
    for name, linear, activation in list(quantized_linears(model, settings)):
        has_bias = isinstance(getattr(linear, "bias", None), nn.Parameter)
        made = W8ASpikeLinear(
            linear.in_features,
            linear.out_features,
            has_bias,
            settings["group_size"],
            activation,
            settings["k"],
        )
        if getattr(linear, "bias", None) is not None and not has_bias:
            made.keep_stored_bias(linear.bias)
        replace_module(model, name, made)
    if settings.get("embeddings"):
        found: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
        name = next(name for name, module in model.named_modules() if module is found)
        size = settings["group_size"]
        replace_module(model, name, W8ASpikeEmbedding(found.num_embeddings, found.embedding_dim, size))


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` is in `model`."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)


def check_settings(settings: dict) -> None:
    """Raises ValueError where a `quantization_config` is not one of this method, or lacks something."""
    if settings.get("quant_method") != QUANT_METHOD:
        raise ValueError(
            f'quantization_config has quant_method "{settings.get("quant_method")}", not "w8aspike".'
        )
    missing = [key for key in ("group_size", "linears", "k") if key not in settings]
    if missing:
        raise ValueError(f"quantization_config lacks {', '.join(missing)}.")


__all__ = ["W8ASpikeEmbedding", "W8ASpikeLinear", "int8_vectors", "quantize_modules"]
