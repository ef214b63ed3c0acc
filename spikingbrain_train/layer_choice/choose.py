"""A choice of layers on all ranks: open the models, set the new mixers, measure, write."""

from __future__ import annotations

from functools import partial

from spikingbrain_train.data.indexed import check_same_tokenizer
from spikingbrain_train.data.tokenizers import load_tokenizer
from spikingbrain_train.evaluation.checkpoint_model import joined_ranks
from spikingbrain_train.evaluation.checkpoint_request import CheckpointRequest, request_checkpoint
from spikingbrain_train.layer_choice.measurements import Measurements
from spikingbrain_train.layer_choice.meter import SwapMeter
from spikingbrain_train.layer_choice.models import open_models, share_weights, start_in_closed_form
from spikingbrain_train.layer_choice.report import finish_choice
from spikingbrain_train.layer_choice.request import ChoiceRequest
from spikingbrain_train.layer_choice.search import search
from spikingbrain_train.layer_choice.text import Text, stretches_of
from spikingbrain_train.reporting.activity import activity


def choose(request: ChoiceRequest, world_size: int) -> str | None:
    """Measure and choose; every rank calls it.

    Returns:
        What the terminal shows; None on ranks that print nothing.

    Raises:
        SpikingBrainError: a checkpoint or a dataset is damaged, or the platform is not there.
    """
    source = _checkpoint(request, "--model", world_size)
    candidates = _checkpoint(request, "--aligned", world_size)
    known = Measurements(request.output, request.settings())
    if source.tokenizer is not None:
        made_with = load_tokenizer(source.tokenizer)
        for prefix in (*request.data, *request.calibration_data):
            check_same_tokenizer(prefix, made_with)
    with joined_ranks(source) as groups:
        show = partial(activity, shown=groups.is_main_process)
        measured, calibration = stretches_of(
            request.data,
            request.tokens,
            [] if request.aligned else request.calibration_data,
            request.calibration_tokens,
            request.seq_length,
        )
        models = open_models(source, candidates, request.pair.kept, groups)
        text = partial(
            Text,
            seq_length=request.seq_length,
            micro_batch_size=request.micro_batch_size,
            num_sink_tokens=candidates.model.num_sink_tokens,
        )
        if request.aligned is None:
            what = f"setting the new mixers on {request.calibration_tokens:,} tokens"
            with show(what, request.num_layers, "layers") as progress:
                start_in_closed_form(models, text(calibration), groups, progress)
        share_weights(models)
        batches = text(measured).batches(groups, source.model.vocab_size)
        meter = SwapMeter(models.teacher, models.kept, models.swapped, batches, groups)
        choice = search(
            meter,
            known,
            request.candidates,
            request.number,
            greedy=request.greedy,
            show=show,
            writes=groups.is_main_process,
        )
        return finish_choice(request, choice) if groups.is_main_process else None


def _checkpoint(request: ChoiceRequest, flag: str, world_size: int) -> CheckpointRequest:
    return request_checkpoint(
        request.source if flag == "--model" else request.swapped,
        settings=request.parallel,
        device=request.device,
        dtype=request.dtype,
        world_size=world_size,
        flag=flag,
    )
