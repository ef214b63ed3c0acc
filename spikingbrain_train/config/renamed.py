"""Values of settings that have got another name.

A stored run may still hold the old one; a command line and a YAML that a user writes may not.
"""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

RENAMED_VALUES = {
    "cluster.kernels.gated_linear_attention": {"recurrent": "naive"},
    "cluster.kernels.softmax_attention": {"reference": "naive"},
}
"""Setting -> old name of a value -> its name now."""


def translate_old_values(stored: DictConfig) -> None:
    """Give the values of a run that an earlier release stored the names that they have now, in place."""
    for setting, renamed in RENAMED_VALUES.items():
        value = OmegaConf.select(stored, setting)
        if value in renamed:
            OmegaConf.update(stored, setting, renamed[value])
