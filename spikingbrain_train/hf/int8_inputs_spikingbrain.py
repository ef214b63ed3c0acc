"""INT8 inputs of linears (BitNet b1.58, arXiv 2402.17764, section 2): the linear transform "int8_inputs".

Part of the modelling code of a checkpoint; needs torch only. A linear reads whole numbers from -127 to 127
times a scale of their token, max |x| / 127.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .counts_w8aspike import int8_token_codes
from .kinds_spikingbrain import LINEAR_TRANSFORMS, Transform
from .linears_spikingbrain import LinearTransform


class Int8Inputs(LinearTransform):
    """round(x / scale) times scale = max |x| / 127 of a token; straight-through."""

    whole_numbers = "int8_tokens"

    def input(self, x: Tensor) -> Tensor:
        per_unit, codes = int8_token_codes(x)
        rounded = (codes / per_unit).to(x.dtype)
        return x + (rounded - x).detach() if torch.is_grad_enabled() else rounded


LINEAR_TRANSFORMS.register(Transform("int8_inputs", Int8Inputs))

__all__ = ["Int8Inputs"]
