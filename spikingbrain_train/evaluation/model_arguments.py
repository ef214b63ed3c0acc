"""Flags of every command that runs a model: number format, device, code of a folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

NUMBER_FORMATS = ("auto", "float32", "bfloat16")
"""In which every model computes."""


def add_number_format(
    parser: argparse.ArgumentParser, choices: Sequence[str] = NUMBER_FORMATS, of: str = "to compute in"
) -> None:
    """``--dtype``.

    Args:
        parser: of the command.
        choices: of them.
        of: what it is the number format of.
    """
    parser.add_argument(
        "--dtype",
        choices=choices,
        default="auto",
        help=f"number format {of}; auto takes bfloat16 where the hardware multiplies it, else float32 "
        f"(default: %(default)s)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "metax"),
        default="auto",
        help="auto takes a GPU if there is one (default: %(default)s)",
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """``--trust-remote-code``."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the modelling code that lies in a Hugging Face folder; every exported hybrid brings some",
    )
