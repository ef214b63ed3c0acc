"""Which brick a text belongs to: that whose own texts it is most like, by what the model makes of both.

Retrieval of bricks (configurable foundation models, arXiv 2409.02877) over embeddings: a text is the mean of
the model's last hidden states, and a brick the mean of its sample texts. What all bricks have in common is
taken out, else it is most of every cosine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Retriever:
    """Bricks by name and where they lie."""

    names: list[str]
    center: Tensor
    """[hidden_size]: the mean of the bricks."""
    directions: Tensor
    """[bricks, hidden_size]: from there to each, of length 1."""

    @classmethod
    def of(cls, samples: Mapping[str, Tensor]) -> Retriever:
        """From embeddings of each brick's sample texts [texts, hidden_size]; two bricks or more."""
        means = torch.stack([each.mean(0) for each in samples.values()])
        center = means.mean(0)
        return cls(list(samples), center, torch.nn.functional.normalize(means - center, dim=-1))

    def scores(self, embeddings: Tensor) -> Tensor:
        """Cosines of texts [texts, hidden_size] with every brick: [texts, bricks], the highest is chosen."""
        return torch.nn.functional.normalize(embeddings - self.center, dim=-1) @ self.directions.T


@torch.inference_mode()
def embed(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """Mean last hidden state of each text: [texts, hidden_size] float32 on the CPU.

    Args:
        model: in evaluation mode.
        texts: token ids, at least one each.
    """
    found = []
    for text in texts:
        ids = torch.tensor([list(text)], device=model.device)
        found.append(model.base_model(ids).last_hidden_state[0].float().mean(0).cpu())
    return torch.stack(found)
