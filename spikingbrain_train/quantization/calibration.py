"""Layer by layer: what the linears of a layer read, their codes, and what the next layer then gets to read.

A layer is quantised on what the layers before it, quantised, make of the calibration text. Only one layer's
second moments are held at a time: [inputs, inputs] float32 of each different input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spikingbrain_train.hf.counts_w8aspike import encoded_input
from spikingbrain_train.hf.quantization_w8aspike import (
    W8ASpikeEmbedding,
    W8ASpikeLinear,
    quantized_linears,
    replace_module,
)
from spikingbrain_train.hf.spikes_gla_swa import SpikeEncoder
from spikingbrain_train.ops.gptq import Rounded, gptq_rounding, output_error, plain_rounding
from spikingbrain_train.ops.int8_groups import group_width
from spikingbrain_train.quantization.request import FLOAT, Method, QuantizeRequest, Scales
from spikingbrain_train.reporting.activity import Activity


@dataclass(frozen=True)
class LinearError:
    """What INT8 weights of one linear are off by on the calibration text."""

    name: str
    layer: int
    inputs: int
    outputs: int
    plain: float
    """Root mean square of the error of its output, over that of the output."""
    gptq: float | None
    """The same with GPTQ's codes; None where they were not asked for."""


@dataclass(frozen=True)
class QuantizedLinear:
    """A linear that stands in a model now, and the other codes that it could have."""

    module: W8ASpikeLinear
    activation: str
    plain: Rounded
    gptq: Rounded | None

    def take(self, rounded: Rounded) -> None:
        """Multiply by these codes."""
        with torch.no_grad():
            self.module.weight.copy_(rounded.codes)
            self.module.weight_scale.copy_(rounded.scales)


class _Moments:
    """Sum of x x' over the inputs x of each linear of a layer; one for those that read the same.

    Args:
        linears: name, linear and activation of each.
        k: fineness of spikes.
    """

    def __init__(self, linears: Sequence[tuple[str, nn.Linear, str]], k: float) -> None:
        self._linears, self._k = linears, k
        self._hessians: dict[str, Tensor] = {}
        self._read: dict[str, tuple[Tensor, str]] = {}

    def of(self, name: str) -> Tensor:
        """[I, I] float32; zeros of a linear that read nothing, as an expert without tokens."""
        found = self._hessians.get(name)
        if found is not None:
            return found
        width = next(linear.in_features for each, linear, _ in self._linears if each == name)
        return torch.zeros(width, width)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add up what the linears read meanwhile."""
        with ExitStack() as hooks:
            for name, linear, activation in self._linears:
                hook = partial(self._add, name, activation)
                hooks.callback(linear.register_forward_pre_hook(hook).remove)
            yield
        self._read.clear()

    def _add(self, name: str, activation: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x: Tensor = inputs[0]
        same = next((other for other, (read, a) in self._read.items() if read is x and a == activation), None)
        self._read[name] = (x, activation)
        if same is not None:
            self._hessians[name] = self._hessians[same]
            return
        encoded = encoded_input(x.float(), activation, self._k).flatten(0, -2)
        moments = (encoded.T @ encoded).cpu()
        found = self._hessians.get(name)
        self._hessians[name] = moments if found is None else found.add_(moments)


_QUERY_SPIKES = "query_spikes"


class _Stop(Exception):  # noqa: N818 - not an error: the first layer was reached
    pass


def quantize_layers(
    model: PreTrainedModel,
    samples: Sequence[Tensor],
    request: QuantizeRequest,
    progress: Activity,
) -> tuple[list[QuantizedLinear], list[LinearError]]:
    """Put INT8 linears in the place of float ones, layer by layer, calibrated on samples.

    Args:
        model: of transformers, with its layers in ``model.model.layers``.
        samples: [1, T] token ids each.
        request: which linears, and how.
        progress: advances by a layer.
    """
    settings = request.quantization_config()
    layers: nn.ModuleList = model.model.layers
    calls = _first_calls(model, layers[0], samples)
    found: list[QuantizedLinear] = []
    errors: list[LinearError] = []
    for number, layer in enumerate(layers):
        linears = list(quantized_linears(layer, settings))
        moments = _Moments(linears, request.k)
        for call in calls:
            with moments.watching():
                call(layer)
        for name, linear, activation in linears:
            made, error = _quantize(linear, activation, moments.of(name), request, number, name)
            replace_module(layer, name, made.module)
            found.append(made)
            errors.append(error)
        calls = [_next(call, call(layer)) for call in calls]
        progress.advance(1)
    return found, errors


def take_off_spikes(model: PreTrainedModel) -> None:
    """Leave spikes to the INT8 linears, which make integers of them; encoders would encode twice.

    Those of queries stay.
    """
    for name, module in list(model.named_modules()):
        is_encoder = type(module).__name__ == SpikeEncoder.__name__  # of the folder's own code
        if is_encoder and not name.endswith(_QUERY_SPIKES):
            replace_module(model, name, nn.Identity())


def add_query_spikes(model: PreTrainedModel, k: float) -> None:
    """Put spikes in front of the queries of softmax layers, where there are none."""
    for name, module in list(model.named_modules()):
        if name.endswith(_QUERY_SPIKES) and isinstance(module, nn.Identity):
            replace_module(model, name, SpikeEncoder(k))


def quantize_head(model: PreTrainedModel, request: QuantizeRequest) -> None:
    """INT8 embedding and output layer, each with codes of its own where they were tied."""
    head: nn.Linear = model.get_output_embeddings()
    embedding: nn.Embedding = model.get_input_embeddings()
    size = request.group_size or embedding.embedding_dim
    made = _int8_linear(head, request.linears()["lm_head"], request, plain_rounding(head.weight, size))
    rows = plain_rounding(embedding.weight, size)
    lookup = W8ASpikeEmbedding(embedding.num_embeddings, embedding.embedding_dim, size)
    with torch.no_grad():
        lookup.weight.copy_(rows.codes)
        lookup.weight_scale.copy_(rows.scales)
    lookup.weight_scale.data = lookup.weight_scale.data.to(embedding.weight.dtype)
    model.set_output_embeddings(made)
    model.set_input_embeddings(lookup.to(embedding.weight.device))
    model.config.tie_word_embeddings = False


def _quantize(
    linear: nn.Linear, activation: str, hessian: Tensor, request: QuantizeRequest, layer: int, name: str
) -> tuple[QuantizedLinear, LinearError]:
    weight = linear.weight.detach().cpu()
    size = group_width(request.group_size or weight.shape[1], weight.shape[1])
    moments = hessian.diagonal() if request.scales is Scales.calibrated else None
    plain = plain_rounding(weight, size, moments)
    gptq = gptq_rounding(weight, size, hessian) if request.method is Method.gptq else None
    made = _int8_linear(linear, activation, request, gptq or plain)
    error = LinearError(
        name,
        layer,
        weight.shape[1],
        weight.shape[0],
        output_error(weight, plain, hessian),
        None if gptq is None else output_error(weight, gptq, hessian),
    )
    return QuantizedLinear(made, activation, plain, gptq), error


def _int8_linear(
    linear: nn.Linear, activation: str, request: QuantizeRequest, rounded: Rounded
) -> W8ASpikeLinear:
    bias = getattr(linear, "bias", None)
    has_bias = isinstance(bias, nn.Parameter)
    made = W8ASpikeLinear(
        linear.in_features, linear.out_features, has_bias, request.group_size, activation, request.k
    )
    with torch.no_grad():
        made.weight.copy_(rounded.codes)
        made.weight_scale.copy_(rounded.scales)
    made.weight_scale.data = made.weight_scale.data.to(linear.weight.dtype)
    if has_bias:
        made.bias = bias
    elif bias is not None:
        made.keep_stored_bias(bias)
    return made.to(linear.weight.device)


Call = Callable[[nn.Module], Any]


@torch.no_grad()
def _first_calls(model: PreTrainedModel, first: nn.Module, samples: Sequence[Tensor]) -> list[Call]:
    """What the first layer is called with for each sample."""
    calls: list[Call] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(_call(args, kwargs))
        raise _Stop

    handle = first.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for tokens in samples:
            try:
                model(input_ids=tokens.to(model.device), use_cache=False)
            except _Stop:
                continue
    finally:
        handle.remove()
    return calls


def _call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    @torch.no_grad()
    def call(layer: nn.Module) -> Any:
        return layer(*args, **kwargs)

    call.arguments = (args, kwargs)  # type: ignore[attr-defined]
    return call


def _next(call: Call, output: Any) -> Call:
    """The same call with what the layer before gave in the place of its first argument."""
    (_, *others), kwargs = call.arguments  # type: ignore[attr-defined]
    hidden = output[0] if isinstance(output, tuple) else output
    return _call((hidden, *others), kwargs)


@contextmanager
def reading_floats(model: PreTrainedModel, linears: Sequence[QuantizedLinear]) -> Iterator[None]:
    """Let linears read their input as it is, to see what weights alone change; queries lose added spikes."""
    added = [(name, module) for name, module in model.named_modules() if type(module) is SpikeEncoder]
    for linear in linears:
        linear.module.activation = FLOAT
    for name, _ in added:
        replace_module(model, name, nn.Identity())
    try:
        yield
    finally:
        for linear in linears:
            linear.module.activation = linear.activation
        for name, module in added:
            replace_module(model, name, module)
