"""Configuration of Llama models with FATReLU in their feed-forwards, as in ProSparse (arXiv 2402.13516).

Part of the modelling code of a checkpoint; needs torch and transformers only.
"""

from __future__ import annotations

from transformers import LlamaConfig


class SparseLlamaConfig(LlamaConfig):
    """Llama's, and with `hidden_act` "fatrelu" its threshold under the key `hidden_act_param`.

    `skip_zeros` says whether few tokens on a CPU are computed without the weights that meet zeros.
    """

    model_type = "sparsellama"
    skip_zeros = True


# save_pretrained then copies this file and names it in config.json, also in a folder saved after training.
SparseLlamaConfig.register_for_auto_class()

__all__ = ["SparseLlamaConfig"]
