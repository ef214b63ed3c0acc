"""transformers without its remarks and the network, around calls whose outcome is checked here anyway."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars, remarks, announcements of deprecations and downloads while transformers loads something.

    It tells every reader of an exported folder, for instance, that its model type is unknown; errors are
    raised as ever. ``local_files_only`` keeps to local files what is asked for by name; what a file of a
    folder makes transformers ask for goes by ``HF_HUB_OFFLINE``.
    """
    from huggingface_hub import constants
    from transformers.utils import logging

    offline = constants.HF_HUB_OFFLINE
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    constants.HF_HUB_OFFLINE = True
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
