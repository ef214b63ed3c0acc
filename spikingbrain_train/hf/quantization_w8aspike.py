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
round(x / (max |x| / 127)); 16-bit ones, round(x / (max |x| / 32384)), which are two INT8 numbers each
("int16", next to floats in quality); or stay floats ("float"). On CPUs whole numbers are multiplied by INT8
weights as integers, group by group (oneDNN's kernels where they are exact, else torch._int_mm); elsewhere,
and while a gradient is wanted, both become floats, whose product is the same up to rounding. Gradients go
straight through.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .counts_w8aspike import BLOCK_ELEMENTS, DIGIT, LARGEST, LAST, Counts, encoded_input, row_blocks

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

    def extra_repr(self) -> str:
        width = self.in_features // self.weight_scale.shape[1]
        return f"{self.in_features}, {self.out_features}, groups of {width}, {self.activation}"

    def keep_stored_bias(self, bias: Tensor) -> None:
        """Zeros that are stored for other readers, as a buffer."""
        del self.bias
        self.register_buffer("bias", bias)

    def float_weight(self, columns: Tensor | None = None) -> Tensor:
        """[out, in] in the dtype of the scales: what the codes stand for; of some input channels only."""
        if columns is None:
            grouped = self.weight.unflatten(1, (self.weight_scale.shape[1], -1)).to(self.weight_scale.dtype)
            return (grouped * self.weight_scale.unsqueeze(-1)).flatten(1)
        width = self.in_features // self.weight_scale.shape[1]
        return self.weight[:, columns].float() * self.weight_scale.float()[:, columns // width]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out] in x's dtype."""
        wants_gradient = torch.is_grad_enabled() and x.requires_grad
        is_integer = self.activation != "float" and x.device.type == "cpu"
        if not is_integer or wants_gradient or torch.compiler.is_compiling():
            encoded = encoded_input(x, self.activation, self.k)
            return F.linear(encoded, self.float_weight().to(x.dtype), self.bias)
        counts = LAST.of(x, self.activation, self.k)
        y = self._integer_product(counts)
        if y.numel() <= BLOCK_ELEMENTS:
            y = y.mul_(counts.unit)
            y = y if self.bias is None else y.add_(self.bias)
            return y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        made = y if x.dtype == torch.float32 else torch.empty(y.shape, dtype=x.dtype)
        for rows in row_blocks(*y.shape):
            part = y[rows].mul_(counts.unit[rows])
            if self.bias is not None:
                part += self.bias
            if made is not y:
                made[rows] = part
        return made.view(*x.shape[:-1], self.out_features)

    def _integer_product(self, counts: Counts) -> Tensor:
        """[M, out] float32: counts times weights, the products of a group added up as integers."""
        low, packed = counts.low, self._packed_weight()
        if len(low) == 1:
            # oneDNN has no fast kernel of one row for some widths (100 times slower); two take no longer.
            low = low.expand(2, -1).contiguous()
        y = packed.few(low) if len(low) * packed.num_groups <= _FEW_ROWS else packed.many(low)
        y = y[: len(counts.low)]
        if counts.has_two_digits:
            upper, lower = y.chunk(2)
            y = upper.mul_(DIGIT).add_(lower)
        if counts.rest is not None:
            y += counts.rest @ self.float_weight(counts.columns).t()
        return y

    def _packed_weight(self) -> _PackedWeight:
        weight, scale = self.weight, self.weight_scale
        key = (weight.data_ptr(), weight._version, scale.data_ptr(), scale._version)
        if self._packed is None or self._packed[0] != key:
            self._packed = (key, _PackedWeight(weight, scale.float()))
        return self._packed[1]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_packed": None}  # what is packed is made anew, also in copies


_FEW_ROWS = 64
"""Rows up to which a kernel takes about as long as for one, because it waits for weights."""


class _PackedWeight:
    """Codes as the fastest exact kernel of this machine takes them, packed when they are first multiplied."""

    def __init__(self, codes_OI: Tensor, scale_ON: Tensor) -> None:
        self._codes_OI = codes_OI
        self.num_groups = scale_ON.shape[1]
        self._scale_NO = scale_ON.t().contiguous()
        self._whole: _PackedCodes | None = None
        self._groups: list[_PackedCodes] | None = None

    def few(self, counts_MI: Tensor) -> Tensor:
        """[M, O]: every group in rows of its own, zeros elsewhere, so that weights are read once."""
        if self._whole is None:
            self._whole = _PackedCodes(self._codes_OI)
        if self.num_groups == 1:
            return self._whole.product(counts_MI, self._scale_NO[0])
        M, N = len(counts_MI), self.num_groups
        counts_MNS = counts_MI.view(M, N, -1)
        apart_MNNS = counts_MNS.new_zeros(M, N, *counts_MNS.shape[1:])
        apart_MNNS.diagonal(dim1=1, dim2=2).copy_(counts_MNS.transpose(1, 2))
        sums_MNO = self._whole.product(apart_MNNS.view(M * N, -1), None).view(M, N, -1)
        return (sums_MNO * self._scale_NO).sum(1)

    def many(self, counts_MI: Tensor) -> Tensor:
        """[M, O]: one group after the other."""
        if self.num_groups == 1:
            return self.few(counts_MI)
        if self._groups is None:
            self._groups = [_PackedCodes(part) for part in self._codes_OI.chunk(self.num_groups, dim=1)]
        y = None
        for part_MS, packed, scale_O in zip(
            counts_MI.chunk(self.num_groups, dim=1), self._groups, self._scale_NO, strict=True
        ):
            y = packed.product(part_MS.contiguous(), scale_O, y)
        assert y is not None
        return y


class _PackedCodes:
    """A matrix of codes for products with counts."""

    def __init__(self, codes_OS: Tensor) -> None:
        self.is_onednn = onednn_is_exact()
        if self.is_onednn:
            self.zeros_O = torch.zeros(len(codes_OS), dtype=torch.int32)
            self.ones_O = torch.ones(len(codes_OS))
            self.weight = torch.ops.onednn.qlinear_prepack(codes_OS.contiguous(), None)
        else:
            self.weight = codes_OS.contiguous().t()

    def product(self, counts_MS: Tensor, scale_O: Tensor | None, y_MO: Tensor | None = None) -> Tensor:
        """Add scale * (counts @ codes) to y, or begin one: float32, exact without a scale."""
        if not self.is_onednn:
            part = torch._int_mm(counts_MS, self.weight).float()
            part = part if scale_O is None else part.mul_(scale_O)
            return part if y_MO is None else y_MO.add_(part)
        scale = self.ones_O if scale_O is None else scale_O
        if y_MO is None:
            return _onednn(counts_MS, self.weight, scale, self.zeros_O)
        head = (counts_MS, 1.0, 0, self.weight, scale, self.zeros_O, y_MO, None, 1.0, 0, torch.float32)
        return torch.ops.onednn.qlinear_pointwise.binary(*head, 1.0, 0, "sum", 1.0, "none", [], "")


def _onednn(counts_MS: Tensor, packed: Tensor, scale_O: Tensor, zeros_O: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_pointwise(
        counts_MS, 1.0, 0, packed, scale_O, zeros_O, None, 1.0, 0, torch.float32, "none", [], ""
    )


@lru_cache(maxsize=1)
def onednn_is_exact() -> bool:
    """Whether oneDNN multiplies INT8 by INT8 here, and without cutting off sums as old vector units do."""
    counts = torch.full((2, 128), LARGEST, dtype=torch.int8)
    counts[1] = -LARGEST
    codes = torch.full((16, 128), LARGEST, dtype=torch.int8)
    codes[::2, 1::2] = -LARGEST
    scale, zeros = torch.full((16,), 0.5), torch.zeros(16, dtype=torch.int32)
    expected = (counts.float() @ codes.float().t()) * 0.5
    try:
        packed = torch.ops.onednn.qlinear_prepack(codes, None)
        once = _onednn(counts, packed, scale, zeros)
        head = (counts, 1.0, 0, packed, scale, zeros, once.clone(), None, 1.0, 0, torch.float32)
        twice = torch.ops.onednn.qlinear_pointwise.binary(*head, 1.0, 0, "sum", 1.0, "none", [], "")
        return torch.equal(once, expected) and torch.equal(twice, 2 * expected)
    except (RuntimeError, AttributeError, TypeError):
        return False


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
