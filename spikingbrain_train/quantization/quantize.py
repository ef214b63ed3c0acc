"""A trained hybrid as INT8 weights and spikes: calibrate, measure, write."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from spikingbrain_train.conversion.export_checkpoint import export_checkpoint
from spikingbrain_train.conversion.formats.hf_format import HfFormat
from spikingbrain_train.conversion.formats.registry import parse_hf_config
from spikingbrain_train.conversion.formats.w8aspike import W8ASPIKE
from spikingbrain_train.conversion.output_folder import check_output_folder
from spikingbrain_train.data.gpt_dataset import HeldOutSamples
from spikingbrain_train.data.held_out import open_held_out
from spikingbrain_train.data.indexed import check_same_tokenizer
from spikingbrain_train.data.tokenizers import load_tokenizer
from spikingbrain_train.errors import DataError
from spikingbrain_train.evaluation.folder_model import load_folder
from spikingbrain_train.evaluation.held_out_windows import describe_datasets
from spikingbrain_train.evaluation.perplexity import measure_perplexity
from spikingbrain_train.quantization.calibration import (
    QuantizedLinear,
    add_query_spikes,
    quantize_head,
    quantize_layers,
    reading_floats,
    take_off_spikes,
)
from spikingbrain_train.quantization.folder import write_folder
from spikingbrain_train.quantization.published_layout import published_config, published_tensors
from spikingbrain_train.quantization.report import Measured, QuantizationReport, layer_errors
from spikingbrain_train.quantization.request import SPIKES, Layout, Method, QuantizeRequest
from spikingbrain_train.reporting.activity import activity
from spikingbrain_train.storage.checkpoint_folder import HF_SOURCE_FOLDER
from spikingbrain_train.storage.checkpoint_paths import resolve_checkpoint
from spikingbrain_train.storage.hf_config_file import CONFIG_FILE, load_config_json
from spikingbrain_train.storage.temporary_folder import temporary_folder
from spikingbrain_train.storage.tokenizer_files import has_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


def quantize(request: QuantizeRequest, needed_bytes: int) -> QuantizationReport:
    """Do all of a request.

    Args:
        request: what to do.
        needed_bytes: what the output takes, about.

    Raises:
        SpikingBrainError: text, model or output cannot be used.
    """
    started = time.monotonic()
    samples, held_out = check(request, needed_bytes)
    with _source_folder(request) as folder:
        source = load_config_json(folder)
        hf_format: HfFormat
        hf_format, architecture = parse_hf_config(source, folder / CONFIG_FILE)
        code = hf_format.code_files(architecture)  # before the work: a kind's file may be missing
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        model = load_folder(
            folder,
            device=request.device,
            dtype=request.dtype,
            trust_remote_code=request.is_checkpoint or request.trust_remote_code,
        )
        meter = _Meter(model, held_out, request)
        meter.measure("as it is")
        take_off_spikes(model)
        if request.layout is Layout.w8aspike:
            add_query_spikes(model, request.k)
        with activity("quantising", len(model.model.layers), "layers") as progress:
            linears, errors = quantize_layers(model, samples, request, progress)
        _measure_steps(model, linears, request, meter)
        if request.layout is Layout.w8aspike:
            code, state = W8ASPIKE.code_files(architecture), published_tensors(model)
            number_format = str(model.dtype).removeprefix("torch.")
            config = published_config(request, architecture, source, number_format)
        else:
            state, config = model.state_dict(), _config_of(source, request)
        rows = [asdict(error) for error in errors]
        reports: list[QuantizationReport] = []

        def report(written: Path, bytes_after: int) -> None:
            made = QuantizationReport(
                measured=meter.measured,
                tokens=meter.tokens,
                layers=layer_errors(rows),
                linears=rows,
                bytes_before=size,
                bytes_after=bytes_after,
                seconds=time.monotonic() - started,
            )
            made.write(written, request)
            reports.append(made)

        write_folder(state, folder, request.output, config, code, report)
    return reports[0]


def check(request: QuantizeRequest, needed_bytes: int) -> tuple[list[Tensor], HeldOutSamples | None]:
    """All that can go wrong before a model is loaded; the samples of both texts.

    Raises:
        SpikingBrainError: text or output cannot be used.
    """
    check_output_folder(
        request.output,
        source=request.model,
        overwrite=request.overwrite,
        marker=CONFIG_FILE,
        needed_bytes=needed_bytes,
        dry_run=True,
    )
    source = resolve_checkpoint(request.model) / HF_SOURCE_FOLDER if request.is_checkpoint else request.model
    if has_tokenizer(source):
        tokenizer = load_tokenizer(source)
        for prefix in (*request.calibration_data, *request.data):
            check_same_tokenizer(prefix, tokenizer)
    samples = calibration_samples(request, request.vocab_size)
    if not request.data:
        return samples, None
    return samples, open_held_out(
        request.data, request.seq_length, request.max_windows, request.vocab_size, alone=True
    )


@contextmanager
def _source_folder(request: QuantizeRequest) -> Iterator[Path]:
    """The model as a Hugging Face folder: its own, or an export that is removed in the end."""
    if not request.is_checkpoint:
        yield request.model
        return
    beside = request.output.resolve().with_name(f"{request.output.name}.export")
    beside.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(beside) as folder:
        export = folder / "export"
        export_checkpoint(request.model, export, float_weights=True, progress=True)
        yield export


def calibration_samples(request: QuantizeRequest, vocab_size: int) -> list[Tensor]:
    """[1, seq_length] token ids of each sample, spread evenly over the text.

    Raises:
        DataError: there are fewer than were asked for.
    """
    dataset = open_held_out(request.calibration_data, request.seq_length, None, vocab_size)
    if len(dataset) < request.samples:
        raise DataError(
            f"--calibration-data {' '.join(request.calibration_data)} holds {len(dataset)} samples of "
            f"{request.seq_length} tokens, not {request.samples}; lower --samples or --seq-length, or name "
            f"more text"
        )
    chosen = [index * len(dataset) // request.samples for index in range(request.samples)]
    return [dataset[index]["tokens"].unsqueeze(0) for index in chosen]


class _Meter:
    """Perplexity of a model on held-out windows, again and again."""

    def __init__(
        self, model: PreTrainedModel, held_out: HeldOutSamples | None, request: QuantizeRequest
    ) -> None:
        self._model, self._held_out, self._request = model, held_out, request
        self.measured: list[Measured] = []
        self.tokens = 0

    def measure(self, what: str) -> None:
        """Add a row; none without held-out data."""
        if self._held_out is None:
            return
        datasets = describe_datasets(self._held_out, self._request.data)
        found = measure_perplexity(self._model, self._held_out, datasets, progress=True)
        self.tokens = found.tokens
        self.measured.append(Measured(what, found.cross_entropy))


def _measure_steps(
    model: PreTrainedModel, linears: Sequence[QuantizedLinear], request: QuantizeRequest, meter: _Meter
) -> None:
    """Weights alone, by either method; then what else there is, one on top of the other."""
    with reading_floats(model, linears):
        if request.method is Method.gptq:
            for linear in linears:
                linear.take(linear.plain)
            meter.measure("INT8 weights, plain rounding")
            for linear in linears:
                assert linear.gptq is not None
                linear.take(linear.gptq)
            meter.measure("INT8 weights, GPTQ")
        else:
            meter.measure("INT8 weights, plain rounding")
    spikes = SPIKES in request.linears().values()
    meter.measure(f"+ spikes with k {request.k:g}" if spikes else "+ INT8 inputs")
    if request.keys_and_values:
        for module in model.modules():
            if hasattr(module, "int8_keys_and_values"):
                module.int8_keys_and_values = True
        meter.measure("+ INT8 keys and values")
    if request.embeddings:
        quantize_head(model, request)
        meter.measure("+ INT8 embedding and output layer")


def _config_of(config: dict[str, Any], request: QuantizeRequest) -> dict[str, Any]:
    changed = {**config, "quantization_config": request.quantization_config()}
    # In front of INT8 weights, spikes are those of quantization_config.
    spiking = changed.pop("spiking", None)
    if (spiking or {}).get("queries"):
        changed["spiking"] = {**spiking, "projections": []}
    if request.embeddings:
        changed["tie_word_embeddings"] = False
    return changed
