"""The same questions to transformers, one text at a time, without anything of ours."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from spikingbrain_train.evaluation.score_batches import ScoreRequest


def some_requests(vocab_size: int) -> list[ScoreRequest]:
    """Of lengths from 2 to some 80 tokens: several options of one context, one of one token, an empty one."""
    draw = random.Random(1)

    def text(length: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(length)]

    requests = []
    for length in (1, 5, 17, 33, 40, 64, 70):
        context = text(length)
        requests += [ScoreRequest(context, text(n)) for n in (1, 1, 1, draw.randint(2, 12))]
        # Repeated tokens are what an untrained model finds likely.
        requests.append(ScoreRequest(context, [context[-1]] * 3))
    return [*requests, ScoreRequest(text(3), [])]


@torch.no_grad()
def plain_log_probs(model: torch.nn.Module, request: ScoreRequest) -> Tensor:
    """[len(continuation), vocab_size] float32."""
    context, continuation = list(request.context), list(request.continuation)
    logits = model(input_ids=torch.tensor([[*context, *continuation]]), use_cache=False).logits[0].float()
    return logits[len(context) - 1 : len(context) - 1 + len(continuation)].log_softmax(-1)


@torch.no_grad()
def plain_continuation(model: torch.nn.Module, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy, every token from the whole text before it."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]
