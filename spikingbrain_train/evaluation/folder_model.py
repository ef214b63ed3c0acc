"""A Hugging Face folder as a model, on the device and in the number format of a command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from spikingbrain_train.reporting.activity import activity

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_folder(folder: Path, *, device: str, dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    """Load it, after torch and transformers.

    Args:
        folder: of the model.
        device: of ``--device``.
        dtype: of ``--dtype``.
        trust_remote_code: run the modelling code that lies in the folder.

    Raises:
        SpikingBrainError: as :func:`~.pretrained.load_causal_lm`, or the platform is not there.
    """
    with activity("importing torch and transformers"):
        import torch

        from spikingbrain_train.config.parallel import AcceleratorKind
        from spikingbrain_train.config.run import Precision
        from spikingbrain_train.evaluation.pretrained import load_causal_lm
        from spikingbrain_train.runtime.accelerator import detect
        from spikingbrain_train.runtime.bf16 import choose_precision, slow_format_warning

    accelerator = detect(AcceleratorKind(device))
    if dtype == "auto":
        bf16 = choose_precision(accelerator).precision is Precision.bf16
        number_format = torch.bfloat16 if bf16 else torch.float32
    else:
        number_format = getattr(torch, dtype)
        slow = slow_format_warning(f"--dtype {dtype}", number_format, accelerator)
        if slow is not None:
            print(slow, file=sys.stderr, flush=True)
    with activity(f"loading {folder}"):
        return load_causal_lm(
            folder,
            trust_remote_code=trust_remote_code,
            dtype=number_format,
            device=accelerator.device(),
        )
