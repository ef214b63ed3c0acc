"""The selective scan of Mamba-1 (arXiv 2312.00752) and Falcon-Mamba (arXiv 2410.05355).

Letters: h hidden_size, D channels (intermediate_size), N state_size, R time_step_rank, W conv_kernel.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from spikingbrain_train.architecture.backends.selective_scan import SELECTIVE_SCAN, SelectiveScanCall
from spikingbrain_train.architecture.initializers import (
    Constant,
    Initializer,
    Normal,
    ScanOfAttention,
    ScanPart,
    Values,
)
from spikingbrain_train.architecture.mixers import MIXERS, MixerKind
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.architecture.sizes import FP32, bytes_per_element, rank_tokens, torch_name
from spikingbrain_train.architecture.weights import Split, Weight
from spikingbrain_train.config.mamba import MambaStart
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import AcceleratorKind, ParallelConfig
from spikingbrain_train.config.require import divisors, either, require
from spikingbrain_train.config.run import RunConfig

_SEGMENT_ELEMENTS = 1 << 20  # ops/selective_scan/chunk.py keeps a state per so many of all states
_SEGMENT_LENGTHS = (16, 1024)  # but no more often, and no less, than per so many tokens
_KERNEL_CHUNK = 2048  # mamba_ssm's kernel keeps two numbers a state per so many tokens
_FLOPS_OF_A_STATE = 9  # of one token, as mamba_ssm counts them: discretise, decay, write, read


def channels(model: ModelConfig) -> int:
    """D."""
    return model.mamba.intermediate_size or 2 * model.hidden_size


def time_step_rank(model: ModelConfig) -> int:
    """R."""
    return model.mamba.time_step_rank or -(-model.hidden_size // 16)


@lru_cache(maxsize=16)
def initial_step_biases(channels: int, smallest: float, largest: float) -> tuple[float, ...]:
    """Biases b with softplus(b) on a geometric sequence of step sizes, one a channel.

    Mamba draws them from its log-uniform distribution; the sequence has that distribution for every number of
    channels and ranks.
    """
    ratio = largest / smallest
    steps = (smallest * ratio ** (channel / max(channels - 1, 1)) for channel in range(channels))
    return tuple(step + math.log(-math.expm1(-step)) for step in steps)


def initial_decay_logs(model: ModelConfig) -> tuple[float, ...]:
    """log 1, ..., log N: A_log of every channel (S4D-real, as Mamba begins)."""
    return tuple(math.log(state) for state in range(1, model.mamba.state_size + 1))


class _Starts:
    """How weights begin in a conversion: made of attention, or as in Mamba."""

    def __init__(self, model: ModelConfig) -> None:
        self.model = model
        self.from_attention = model.mamba.init is MambaStart.attention

    def of_attention(self, part: ScanPart, otherwise: Normal | Constant) -> Initializer:
        """A weight that attention has something for."""
        if not self.from_attention:
            return otherwise
        mamba, misfit = self.model.mamba, self._misfit()
        D, scale = channels(self.model), mamba.init_output_scale
        return ScanOfAttention(part, D, mamba.state_size, scale, misfit, otherwise)

    def _misfit(self) -> str | None:
        """What is said where there is an attention to begin from."""
        model = self.model
        size = model.num_attention_heads * model.kv_channels
        copies, rest = divmod(channels(model), size)
        if rest == 0 and (copies == 1 or copies % 2 == 0):
            return None
        return (
            f"model.mamba.init=attention gives each of the {size} values of query heads a channel, or pairs "
            f"of them, which model.mamba.intermediate_size={channels(model)} does not allow; set it to "
            f"{size} or {2 * size}, or model.mamba.init=random"
        )

    def convolution(self) -> Initializer:
        """It lets values through; else with the deviation of torch's uniform start within W^-1/2."""
        width = self.model.mamba.conv_kernel
        if not self.from_attention:
            return Normal((3 * width) ** -0.5)
        return Values((0.0,) * (width - 1) + (1.0,), "1 for the token itself, 0 for those before")

    def steps(self) -> Initializer:
        """Biases of the step sizes: the whole range in every head, the same for the channels of a value."""
        mamba, width = self.model.mamba, self.model.kv_channels
        copies, rest = divmod(channels(self.model), self.model.num_attention_heads * width)
        words = f"steps {mamba.time_step_min:g} to {mamba.time_step_max:g} over channels"
        if not self.from_attention or rest:
            return Values(
                initial_step_biases(channels(self.model), mamba.time_step_min, mamba.time_step_max), words
            )
        of_head = initial_step_biases(width, mamba.time_step_min, mamba.time_step_max)
        return Values(tuple(bias for bias in of_head for _ in range(copies)), f"{words} of each head")


class MambaKind(MixerKind):
    """A convolution and a selective scan of every channel, gated; attention has other weights."""

    name = "mamba"
    keeps_its_output = False
    words = "Mamba layers"
    spec = "spikingbrain_train.models.mixers.mamba:spec"
    backends = SELECTIVE_SCAN
    section = "mamba"
    export_module = "spikingbrain_train.hf.mamba_spikingbrain"
    hf_layers = {"selective_scan": name}
    tensor_names = {
        "mamba_in_weight": "in_proj.weight",
        "mamba_in_bias": "in_proj.bias",
        "mamba_conv_weight": "conv1d.weight",
        "mamba_conv_bias": "conv1d.bias",
        "mamba_x_weight": "x_proj.weight",
        "mamba_dt_weight": "dt_proj.weight",
        "mamba_dt_bias": "dt_proj.bias",
        "mamba_A_log": "A_log",
        "mamba_D": "D",
        "mamba_out_weight": "out_proj.weight",
        "mamba_out_bias": "out_proj.bias",
    }

    def check_split(self, model: ModelConfig, parallel: ParallelConfig) -> None:
        tensor = parallel.tensor_model_parallel_size
        require(
            channels(model) % tensor == 0,
            f"parallel.tensor_model_parallel_size={tensor} does not divide model.mamba.intermediate_size="
            f"{channels(model)}; valid are {either(divisors(channels(model)))}",
        )

    def settings(self, model: ModelConfig) -> set[str]:
        without = set() if model.mamba.bc_dt_norm else {"mamba.mixer_rms_eps"}
        if model.mamba.init is MambaStart.random:
            without.add("mamba.init_output_scale")
        return self.all_settings(model) - without

    def values_of_nulls(self, model: ModelConfig) -> dict[str, Any]:
        return {
            "mamba.intermediate_size": channels(model),
            "mamba.time_step_rank": time_step_rank(model),
        }

    def describe(self, model: ModelConfig) -> str | None:
        text = f"{channels(model)} channels, state {model.mamba.state_size}"
        return f"{text}, norms of B, C and dt" if model.mamba.bc_dt_norm else text

    def weights(self, model: ModelConfig, group: str = "attention") -> tuple[Weight, ...]:
        """In the order of the forward pass: in_proj, convolution, x_proj, dt_proj, scan, out_proj."""
        mamba, hidden = model.mamba, model.hidden_size
        D, N, R, W = channels(model), mamba.state_size, time_step_rank(model), mamba.conv_kernel
        std = model.init_method_std
        starts = _Starts(model)
        input_bias = Weight(
            "in_proj.bias",
            ("mamba_in_bias",),
            ((2 * D,),),
            "Mamba input",
            layout="interleaved_halves",
            init=starts.of_attention(ScanPart.input_bias, Constant(0.0)),
        )
        conv_bias = Weight("conv1d.bias", ("mamba_conv_bias",), ((D,),), "Mamba scan", init=Constant(0.0))
        output_bias = Weight(
            "out_proj.bias",
            ("mamba_out_bias",),
            ((hidden,),),
            "Mamba output",
            Split.none,
            init=starts.of_attention(ScanPart.output_bias, Constant(0.0)),
        )
        return (
            Weight(
                "in_proj.weight",
                ("mamba_in_weight",),
                ((2 * D, hidden),),
                "Mamba input",
                layout="interleaved_halves",
                init=starts.of_attention(ScanPart.input_weight, Normal(std)),
                reads_input=True,
                projection=("qkv", 0),
                stacked_matrices=2,
            ),
            *((input_bias,) if mamba.use_bias else ()),
            Weight(
                "conv1d.weight",
                ("mamba_conv_weight",),
                ((D, 1, W),),
                "Mamba scan",
                init=starts.convolution(),
            ),
            *((conv_bias,) if mamba.use_conv_bias else ()),
            Weight(
                "x_proj.weight",
                ("mamba_x_weight",),
                ((R + 2 * N, D),),
                "Mamba scan",
                init=starts.of_attention(ScanPart.scan_weight, Normal(std)),
            ),
            Weight(
                # The deviation of Mamba's uniform start, between -1 / sqrt(R) and 1 / sqrt(R).
                "dt_proj.weight",
                ("mamba_dt_weight",),
                ((D, R),),
                "Mamba scan",
                init=Normal((3 * R) ** -0.5),
            ),
            Weight(
                "dt_proj.bias",
                ("mamba_dt_bias",),
                ((D,),),
                "Mamba scan",
                init=starts.steps(),
            ),
            Weight(
                "A_log",
                ("mamba_A_log",),
                ((D, N),),
                "Mamba scan",
                init=Values(initial_decay_logs(model), "log 1 to log N in every channel"),
            ),
            Weight("D", ("mamba_D",), ((D,),), "Mamba scan", init=Constant(1.0)),
            Weight(
                "out_proj.weight",
                ("mamba_out_weight",),
                ((hidden, D),),
                "Mamba output",
                init=starts.of_attention(ScanPart.output_weight, Normal(std / (2 * model.num_layers) ** 0.5)),
                projection=("attention_output", 0),
            ),
            *((output_bias,) if mamba.use_bias else ()),
        )

    def core_flops(self, model: ModelConfig, seq_length: int) -> float:
        """The convolution (2 W D) and the scan, of which 2 D N are counted as the product with A_log."""
        D, N, W = channels(model), model.mamba.state_size, model.mamba.conv_kernel
        flops = 2 * W * D + (_FLOPS_OF_A_STATE - 2) * D * N
        return flops * (1 + model.num_sink_tokens / seq_length)

    def op_call(
        self, config: RunConfig, model: ModelConfig, layout: SequenceLayout, has_documents: bool
    ) -> SelectiveScanCall:
        from_sinks = has_documents and layout.num_sink_tokens > 0 and not layout.sinks_are_padding
        return SelectiveScanCall(
            torch_name(config.precision),
            model.mamba.state_size,
            passes_states=from_sinks or layout.context_parallel_size > 1,
        )

    def activation_bytes(self, config: RunConfig) -> float:
        model, parallel = config.model, config.parallel
        D = channels(model) / parallel.tensor_model_parallel_size
        N, R, element = model.mamba.state_size, time_step_rank(model), bytes_per_element(config.precision)
        # The input projection, of which x and z are views; x with what lies before it, behind the convolution
        # and behind its SiLU; the scan's output, the gate and their product.
        kept = (2 + 3 + 3) * D * element
        kept += 2 * D * FP32  # step sizes in front of and behind their softplus
        kept += (R + 2 * N) * element
        if model.mamba.bc_dt_norm:
            kept += (R + 2 * N) * element
        return kept + self._scan_bytes(config, D)

    def _scan_bytes(self, config: RunConfig, D: float) -> float:
        """States and copies that the op and its context parallelism keep, per token."""
        model, ranks = config.model, config.parallel.context_parallel_size
        N, rows = model.mamba.state_size, config.stage.micro_batch_size
        call = SelectiveScanCall(torch_name(config.precision), N, passes_states=ranks > 1)
        on_gpu = config.cluster.accelerator is not AcceleratorKind.cpu
        asked = config.cluster.kernels.selective_scan.value
        if SELECTIVE_SCAN.expected(asked, call, on_gpu=on_gpu) == "mamba_ssm":
            return (D + 2 * N) * bytes_per_element(config.precision) + 2 * D * N * FP32 / _KERNEL_CHUNK
        state = D * N * FP32
        shortest, longest = _SEGMENT_LENGTHS
        length = max(shortest, min(longest, _SEGMENT_ELEMENTS / (rows * D * N)))
        if ranks == 1:
            return state / length
        # The scan that finds the state handed over, too; states of all ranks, and decays.
        return 2 * state / length + (2 * ranks + 2) * state * rows / rank_tokens(config)


MAMBA = MIXERS.register(MambaKind())
