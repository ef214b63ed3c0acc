#!/usr/bin/env python
"""Draw the loss curves of one model's stages, one after the other, into a PNG.

python tools/plot_metrics.py outputs/demo/align outputs/demo/cpt --output loss.png
"""

from __future__ import annotations

import argparse

from spikingbrain_train.config.command_line import user_errors
from spikingbrain_train.reporting.plots.loss_curves import plot_loss_curves


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "output_dirs", nargs="+", metavar="FOLDER", help="output_dir of a run (holds metrics.jsonl)"
    )
    parser.add_argument("--output", default="loss.png", help="picture to write (default: loss.png)")
    parser.add_argument(
        "--dense-cross-entropy",
        type=float,
        metavar="X",
        help="held-out cross entropy of the dense source (tools/evaluate.py), drawn as the line to reach",
    )
    arguments = parser.parse_args()
    with user_errors():
        plot_loss_curves(
            arguments.output_dirs, arguments.output, dense_cross_entropy=arguments.dense_cross_entropy
        )
        print(arguments.output)


if __name__ == "__main__":
    main()
