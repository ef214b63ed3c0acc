"""INT8 inputs of linears in llama.cpp's blocks (Q8_K, Q8_0 of ggml): the linear transform "q8_inputs".

Part of the modelling code of a checkpoint; needs torch only. A linear reads whole numbers from -127 to 127
times a scale of 256 neighbouring inputs where 256 divides their number (Q8_K: a float32 scale), else of 32
(Q8_0: a float16 one).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kinds_spikingbrain import LINEAR_TRANSFORMS, Transform
from .linears_spikingbrain import LinearTransform


class Q8Inputs(LinearTransform):
    """round(x / scale) times scale = max |x| / 127 of a block; straight-through."""

    def input(self, x: Tensor) -> Tensor:
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        wide = x.shape[-1] % 256 == 0
        blocks = x.detach().to(exact).unflatten(-1, (-1, 256 if wide else 32))
        largest = blocks.abs().amax(-1, keepdim=True)
        # A Python number over a tensor is that times a reciprocal in torch: rounded twice.
        per_unit = largest.new_tensor(127) / largest.clamp(min=1e-30)
        if wide:
            scales = per_unit.reciprocal()
        else:  # codes are made with the scale that float16 has not yet rounded
            scales = (largest / 127).clamp(max=torch.finfo(torch.float16).max).half().to(exact)
        codes = (blocks * per_unit).round_().clamp_(-127, 127)
        rounded = (codes * scales).flatten(-2).to(x.dtype)
        return x + (rounded - x).detach() if torch.is_grad_enabled() else rounded


LINEAR_TRANSFORMS.register(Transform("q8_inputs", Q8Inputs))

__all__ = ["Q8Inputs"]
