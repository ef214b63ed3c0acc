"""Experts as copies of a dense feed-forward ("upcycling").

Let S shared experts and k of N routed ones work on every token. Right after the conversion each expert
computes the dense function up to scale, and the k routed ones count with the router's probabilities, about
1/N each. So the layer would give S + k/N times the dense output; two ways to bring that back to one:

- ``published``: every one of the three matrices times ``alpha = (S + k/N) ** (-1/3)``, since three of them
  multiply (SpikingBrain, arXiv 2509.05276, eq. 15-18). SiLU is not homogeneous and a random router is not
  uniform, so the dense function is reproduced roughly.
- ``exact``: only the down projection, which is linear, times ``1 / (S + k/N)``. With a router of (nearly)
  zeros every probability is 1/N, and the layer gives the dense output.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from spikingbrain_train.architecture.weights import Shape
from spikingbrain_train.config.conversion import UpcyclingConfig, UpcyclingForm
from spikingbrain_train.config.enum_tables import entry_of
from spikingbrain_train.conversion.mapping import Parameter
from spikingbrain_train.ops.seeds import generator

_DOWN = "mlp_down_weight"


def expert_scale(form: UpcyclingForm, outputs: float, role: str) -> float:
    """Factor on a copied matrix of every routed and shared expert.

    Args:
        form: how the scale is spread over the matrices.
        outputs: how many times the dense output the layer would give unscaled, S + k/N.
        role: which matrix, ``mlp_gate_weight``, ``mlp_up_weight`` or ``mlp_down_weight``.
    """
    scales = {
        UpcyclingForm.published: outputs ** (-1 / 3),
        UpcyclingForm.exact: 1 / outputs if role == _DOWN else 1.0,
    }
    return entry_of(form, scales, "the scales of experts")


def describe_copies(parameter: Parameter, upcycling: UpcyclingConfig) -> str:
    """Where an expert parameter comes from, for the conversion report."""
    assert parameter.copies is not None
    scale = expert_scale(upcycling.form, parameter.copies.outputs, parameter.roles[-1])
    text = "copied" if scale == 1 else f"copied and scaled by {scale:.4g}"
    if parameter.copies.routed and upcycling.reinit_fraction:
        text += f", {100 * upcycling.reinit_fraction:g} % of the channels drawn anew"
    return text


def expert_chunks(
    parameter: Parameter,
    parts: list[Tensor],
    upcycling: UpcyclingConfig,
    seed: int,
    experts: Iterable[int] | None = None,
) -> Iterator[tuple[Shape, Tensor]]:
    """The pieces of a routed or shared experts' parameter, one after the other.

    Args:
        parameter: one that has ``copies``.
        parts: tensors of the dense feed-forward, in the order of its roles.
        upcycling: scaling and re-initialisation.
        seed: seed of what is drawn anew.
        experts: which of the routed ones; None is all.

    Yields:
        Offset in the whole parameter and values in the dtype of ``parts``, scaled in float32 and rounded
        once.
    """
    copies = parameter.copies
    assert copies is not None
    scaled = [
        part.float().mul_(expert_scale(upcycling.form, copies.outputs, role)).to(part.dtype)
        for role, part in zip(parameter.roles, parts, strict=True)
    ]
    if not copies.routed:
        side_by_side = [torch.cat([part] * copies.number, dim=copies.channel_axis) for part in scaled]
        yield (0, 0), parameter.fuse(side_by_side)
        return
    for expert in range(copies.number) if experts is None else experts:
        own = scaled
        if upcycling.reinit_fraction:
            own = _redraw(scaled, parameter, expert, upcycling.reinit_fraction, seed)
        yield (expert, 0, 0), parameter.fuse(own).unsqueeze(0)


def _redraw(
    parts: list[Tensor], parameter: Parameter, expert: int, fraction: float, seed: int
) -> list[Tensor]:
    """``parts`` with a share of the intermediate channels drawn anew, other ones in every expert.

    A channel is a row of the gate and up projection and a column of the down projection; all three are
    replaced. Values are normal with the mean and standard deviation of what they replace in that matrix
    (Drop-Upcycling, Nakamura et al., arXiv 2502.19261, section 3).
    """
    assert parameter.copies is not None
    axis = parameter.copies.channel_axis
    name = f"decoder.layers.{parameter.layer}.mlp.experts.{expert}"
    width = parts[0].shape[axis]
    channels = torch.randperm(width, generator=generator(seed, f"{name}.channels"))[: round(fraction * width)]
    drawn = []
    for role, part in zip(parameter.roles, parts, strict=True):
        old = part.index_select(axis, channels).float()
        if old.numel() > 1:
            new = torch.empty_like(old).normal_(
                old.mean().item(), old.std().item(), generator=generator(seed, f"{name}.{role}")
            )
            part = part.index_copy(axis, channels, new.to(part.dtype))
        drawn.append(part)
    return drawn
