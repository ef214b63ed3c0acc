"""Peaks of GPUs as their makers state them: dense products in bf16, summed in fp32."""

from __future__ import annotations

# The first whose words are all in the device's name, as its driver gives it, counts.
_BF16_TFLOPS = (
    ("B200", 2250.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H800 PCIe", 756.0),
    ("H800", 989.4),
    ("H200 NVL", 835.0),
    ("H200", 989.4),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("A40", 149.7),
    ("RTX 4090", 165.2),
    ("C500", 280.0),
)


def known_peak_tflops(device_name: str) -> float | None:
    """bf16 TFLOP/s of a GPU without sparsity; None of one that is not in the table.

    Args:
        device_name: ``NVIDIA H100 80GB HBM3``.
    """
    words = device_name.replace("-", " ").split()
    for name, tflops in _BF16_TFLOPS:
        if all(word in words for word in name.split()):
            return tflops
    return None
