"""Hugging Face folders, ready to evaluate and to generate: the dense source or an exported hybrid."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from spikingbrain_train.data.quiet_transformers import quiet_transformers
from spikingbrain_train.data.tokenizer_folder import first_line, read_tokenizer_folder
from spikingbrain_train.data.tokenizers import tokenizer_files
from spikingbrain_train.errors import CheckpointError, DataError
from spikingbrain_train.evaluation.folder_checks import check_folder, keep_to_local_kernels
from spikingbrain_train.evaluation.folder_code import load_config_and_code


def load_causal_lm(
    folder: str | Path, *, trust_remote_code: bool, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Load a causal language model from a local folder, for inference.

    Only safetensors are read: a pickle can run code. Nothing is fetched, whatever the folder's files name.

    Args:
        folder: what ``save_pretrained`` or spikingbrain-export wrote.
        trust_remote_code: run the modelling code that lies in the folder, if it needs any.
        dtype: number format of weights and activations.
        device: where to.

    Raises:
        ConfigurationError: the folder brings code that it may not run.
        CheckpointError: missing, incomplete, quantised or unreadable; the sentence carries transformers' own
            words.
    """
    folder = Path(folder)
    check_folder(folder, trust_remote_code)
    dtype_name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    try:
        with quiet_transformers():
            config = load_config_and_code(folder, trust_remote_code=trust_remote_code)
            keep_to_local_kernels(config)
            model, loading = AutoModelForCausalLM.from_pretrained(
                str(folder),
                config=config,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **{dtype_name: dtype},
            )
    except Exception as error:  # transformers, safetensors and the folder's own code raise whatever they like
        raise CheckpointError(
            f"{folder} cannot be loaded by transformers ({first_line(error)}); check that its "
            "files are complete"
        ) from error
    if loading["missing_keys"]:
        # transformers fills them with random numbers and goes on.
        missing = sorted(loading["missing_keys"])
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of its model, {missing[0]} among them; restore the "
            "missing file or export again"
        )
    return model.to(device).eval()


def load_text_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder, without running code from there.

    Raises:
        DataError: there is none that transformers can load.
    """
    folder = Path(folder)
    if folder.is_dir() and not tokenizer_files(folder):
        raise DataError(
            f"{folder} holds no tokenizer files; copy those of the source model into it, or name a folder "
            "that has them with --tokenizer"
        )
    try:
        return read_tokenizer_folder(folder)
    except Exception as error:
        raise DataError(
            f"{folder} holds no tokenizer that transformers can load ({first_line(error)}); copy the "
            "source model's tokenizer files into it"
        ) from error
