"""Neurons of a Hugging Face model: any with gate, up and down projection."""

from __future__ import annotations

from transformers import PreTrainedModel

from spikingbrain_train.activation_sparsity.hugging_face import gated_modules
from spikingbrain_train.bricks.neuron_model import FeedForward, NeuronModel
from spikingbrain_train.errors import CheckpointError
from spikingbrain_train.evaluation.huggingface_language_model import HuggingFaceLanguageModel
from spikingbrain_train.evaluation.text_tokenizer import TextTokenizer


def hugging_face_neurons(model: PreTrainedModel, tokenizer: TextTokenizer, name: str) -> NeuronModel:
    """Those of every feed-forward and expert that is a module.

    Args:
        model: in evaluation mode.
        tokenizer: of its text.
        name: for the report.

    Raises:
        CheckpointError: it has no such modules.
    """
    found = [
        FeedForward(
            part,
            module.down_proj,
            module.down_proj.weight.detach().float().norm(dim=0),
            into=module.gate_proj,
        )
        for part, module in gated_modules(model)
    ]
    if not found:
        raise CheckpointError(
            f"{name} has no feed-forwards with a gate, an up and a down projection as modules; import it "
            "with spikingbrain-convert and name the checkpoint"
        )
    return NeuronModel(
        # One text at a time: another in its batch would be padding, which counts, too.
        HuggingFaceLanguageModel(model, tokenizer, tokens_per_batch=1),
        name=name,
        form=f"Hugging Face, {type(model).__name__}",
        dtype=str(model.dtype).removeprefix("torch."),
        feed_forwards=found,
    )
