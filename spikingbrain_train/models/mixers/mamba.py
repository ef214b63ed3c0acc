"""Mamba-1, and Falcon-Mamba with its norms, on megatron-core's parallel linears.

    x, z = in_proj(u);  x = silu(conv1d(x));  dt, B, C = x_proj(x)        (Falcon-Mamba: RMSNorm of each)
    dt = softplus(dt_proj(dt));  y = scan(x, dt, -exp(A_log), B, C) + D x;  out_proj(y * silu(z))

(Mamba, arXiv 2312.00752, section 3.4; Falcon-Mamba, arXiv 2410.05355, section 3.1.) Tensor-parallel ranks
hold whole channels. What all channels share, B, C and the bottleneck of step sizes, is a sum over channels:
x_proj is row-parallel, and its output is whole on every rank, under sequence parallelism, too.

Shape letters: T time, B batch, D channels of this tensor-parallel rank, N state size, W width of the
convolution, R rank of the step sizes.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from spikingbrain_train.architecture.mamba import (
    channels,
    initial_decay_logs,
    initial_step_biases,
    time_step_rank,
)
from spikingbrain_train.architecture.mixers import MixerKind
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.config.linear_transforms import Projection
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import SelectiveScanBackend
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.models.layer_build import LayerBuild
from spikingbrain_train.models.linears.joined_rows import one_matrix
from spikingbrain_train.models.mixers.decoding import CacheSize, DecodingState
from spikingbrain_train.ops.causal_convolution import causal_convolution
from spikingbrain_train.ops.selective_scan import selective_scan, selective_scan_step
from spikingbrain_train.parallel.context_parallel.causal_convolution import (
    context_parallel_causal_convolution,
)
from spikingbrain_train.parallel.context_parallel.reading_on import (
    from_last_rank,
    inputs_before_slice,
    state_before_slice,
)
from spikingbrain_train.parallel.context_parallel.selective_scan import (
    context_parallel_selective_scan,
    selective_scan_end_state,
)


@dataclass
class MambaSubmodules:
    """Classes of the projections that linear transforms may apply to."""

    in_proj: type
    out_proj: type


def spec(_kind: MixerKind, build: LayerBuild) -> ModuleSpec:
    """Mamba as ``self_attention`` of a layer."""
    bias, linears = build.model.mamba.use_bias, build.linears
    return ModuleSpec(
        module=MambaMixer,
        params={"model": build.model, "backend": build.kernels.selective_scan},
        submodules=MambaSubmodules(
            in_proj=linears.column(Projection.qkv, bias=bias, rows_of=one_matrix, roles=("mamba_in_weight",)),
            out_proj=linears.row(Projection.attention_output, bias=bias, roles=("mamba_out_weight",)),
        ),
    )


class DepthwiseKernels(torch.nn.Module):
    """The convolution's parameters, of this rank's channels: weight [D, 1, W] and bias [D], as torch's."""

    def __init__(self, channels: int, width: int, config: TransformerConfig, *, bias: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(channels, 1, width, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(channels, dtype=config.params_dtype)) if bias else None
        if config.perform_initialization:
            torch.nn.init.normal_(self.weight, std=(3 * width) ** -0.5)


class MambaMixer(MegatronModule):
    """A drop-in for SelfAttention whose core is a selective scan.

    Its parameters are called as in transformers' MambaMixer. The rows of ``in_proj`` lie channel by channel,
    x and z of each together, so that every rank has both of its own.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaSubmodules,
        layer_number: int,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        *,
        model: ModelConfig,
        backend: SelectiveScanBackend,
        **_: object,
    ) -> None:
        super().__init__(config)
        assert pg_collection is not None
        self.layer_number = layer_number
        self.pg_collection = pg_collection
        self.settings = model.mamba
        self.backend = backend.value
        self.rank_of_steps = time_step_rank(model)
        size, rank = pg_collection.tp.size(), pg_collection.tp.rank()
        all_channels = channels(model)
        self.channels = all_channels // size
        N, W = self.settings.state_size, self.settings.conv_kernel
        # What all channels share is whole on every rank and covers the whole slice.
        whole = copy(config)
        whole.sequence_parallel = False
        shared: dict[str, Any] = {"skip_bias_add": False, "is_expert": False, "tp_group": pg_collection.tp}
        self.in_proj = submodules.in_proj(
            config.hidden_size,
            2 * all_channels,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=self.settings.use_bias,
            **shared,
        )
        self.conv1d = DepthwiseKernels(self.channels, W, config, bias=self.settings.use_conv_bias)
        self.x_proj = RowParallelLinear(
            all_channels,
            self.rank_of_steps + 2 * N,
            config=whole,
            init_method=config.init_method,
            bias=False,
            input_is_parallel=True,
            **shared,
        )
        self.dt_proj = ColumnParallelLinear(
            self.rank_of_steps,
            all_channels,
            config=whole,
            init_method=lambda weight: torch.nn.init.normal_(weight, std=(3 * self.rank_of_steps) ** -0.5),
            bias=True,
            gather_output=False,
            # Of all that x_proj gives, the gradients are added up in one place: see _steps_and_matrices.
            disable_grad_reduce=True,
            **(shared | {"skip_bias_add": True}),  # it is added in float32
        )
        self.A_log = torch.nn.Parameter(torch.empty(self.channels, N, dtype=config.params_dtype))
        self.D = torch.nn.Parameter(torch.ones(self.channels, dtype=config.params_dtype))
        self.out_proj = submodules.out_proj(
            all_channels,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=self.settings.use_bias,
            input_is_parallel=True,
            **shared,
        )
        if config.perform_initialization:
            steps = initial_step_biases(
                all_channels, self.settings.time_step_min, self.settings.time_step_max
            )
            with torch.no_grad():
                self.dt_proj.bias.copy_(torch.tensor(steps[rank * self.channels :][: self.channels]))
                self.A_log.copy_(torch.tensor(initial_decay_logs(model)).expand_as(self.A_log))
        for parameter in self._of_channels().values():
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        for parameter in (self.A_log, self.D):
            parameter.no_weight_decay = True  # type: ignore[attr-defined]
        for parameter in self.parameters():
            # What a linear holds beside its weight has said by itself what it is.
            parameter.is_new_parameter = getattr(parameter, "is_new_parameter", True)

    def _of_channels(self) -> dict[str, Tensor]:
        """Parameters split over tensor-parallel ranks that are no linear's."""
        found: dict[str, Tensor] = {"A_log": self.A_log, "D": self.D, "conv1d.weight": self.conv1d.weight}
        return found if self.conv1d.bias is None else found | {"conv1d.bias": self.conv1d.bias}

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As megatron-core has it, with its own parameters split along their channels."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        own = self._of_channels()
        split = dict.fromkeys(own, 0)
        return sharded | make_sharded_tensors_for_checkpoint(own, prefix, split, sharded_offsets)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: SequenceLayout | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix along the sequence, from an empty state.

        Args:
            hidden_states: [T, B, hidden_size] normed input: this rank's slice of the sequence, sinks first
                (its share of that under sequence parallelism).
            attention_mask: must be None; the recurrence is causal.
            packed_seq_params: layout of the sequences; None is one document a row on one rank, no sinks.

        Returns:
            Output of the same shape, a bias included, and None.
        """
        assert attention_mask is None, "the scan is causal by construction; pass attention_mask=None"
        return self.out_proj(self.normed_heads(hidden_states, packed_seq_params))[0], None

    @property
    def linear_proj(self) -> torch.nn.Module:
        """The output projection, as attention calls it."""
        return self.out_proj

    def normed_heads(self, hidden_states: Tensor, layout: SequenceLayout | None = None) -> Tensor:
        """See :class:`~spikingbrain_train.models.mixers.alignable.HasNormedHeads`; there is no norm here."""
        cp_group = self.pg_collection.cp
        x_BTD, z_BTD = self._inputs(hidden_states)
        x_BTD = context_parallel_causal_convolution(
            x_BTD,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            layout=layout,
            cp_group=cp_group,
            sees_sinks=True,
        )
        x_BTD = F.silu(x_BTD)
        of_scan = self._scan_inputs(x_BTD)
        y_BTD = context_parallel_selective_scan(
            x_BTD, *of_scan, self.D, layout=layout, cp_group=cp_group, backend=self.backend
        )
        return self._gated(y_BTD, z_BTD)

    @torch.no_grad()
    def set_half_lives(self, half_life_H: Tensor) -> None:
        """See :class:`~spikingbrain_train.models.mixers.alignable.TakesHalfLives`.

        A head's channels keep the ratios of their step sizes; the geometric mean over them of the half-lives
        of their slowest states is the head's, where the input adds nothing to the step.
        """
        heads = len(half_life_H)
        if self.channels % heads:
            raise ConfigurationError(
                f"stage.alignment.decay_start=attention_distance sets the channels of {heads} query heads, "
                f"of which {self.channels} channels of model.mamba are no multiple; set "
                "stage.alignment.decay_start=as_converted"
            )
        bias, decay_DN = self.dt_proj.bias, self.A_log.double().exp()
        step_HD = F.softplus(bias.double()).view(heads, -1)
        found_HD = math.log(2) / (step_HD * decay_DN.min(-1).values.view(heads, -1))
        ratio_H = found_HD.log().mean(-1).exp() / half_life_H.double()
        wanted_HD = step_HD * ratio_H.unsqueeze(-1)
        # softplus(b) = step is solved by b = step + log(1 - exp(-step)).
        bias.copy_((wanted_HD + torch.log(-torch.expm1(-wanted_HD))).flatten())

    def _inputs(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """x and z [B, T, D] over the whole slice."""
        xz_TBD, _ = self.in_proj(hidden_states)
        x_TBD, z_TBD = xz_TBD.unflatten(-1, (-1, 2)).unbind(-1)
        return x_TBD.transpose(0, 1), z_TBD.transpose(0, 1)

    def _scan_inputs(self, x_BTD: Tensor) -> _ScanInputs:
        N, R = self.settings.state_size, self.rank_of_steps
        of_all_channels, _ = self.x_proj(x_BTD)
        # Every rank's channels read them, so their gradients are partial sums.
        of_all_channels = copy_to_tensor_model_parallel_region(of_all_channels, group=self.pg_collection.tp)
        steps, B_BTN, C_BTN = of_all_channels.split([R, N, N], dim=-1)
        if self.settings.bc_dt_norm:
            steps, B_BTN, C_BTN = (self._norm(each) for each in (steps, B_BTN, C_BTN))
        steps_BTD, bias_D = self.dt_proj(steps)
        dtype = torch.float64 if x_BTD.dtype == torch.float64 else torch.float32
        dt_BTD = F.softplus(steps_BTD.to(dtype) + bias_D.to(dtype))
        return _ScanInputs(dt_BTD, -self.A_log.to(dtype).exp(), B_BTN, C_BTN)

    def _norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.settings.mixer_rms_eps).to(x.dtype)

    def _gated(self, y_BTD: Tensor, z_BTD: Tensor) -> Tensor:
        """What the output projection sees [T, B, D]."""
        return (y_BTD * F.silu(z_BTD)).transpose(0, 1)

    def _output(self, y_BTD: Tensor, z_BTD: Tensor) -> Tensor:
        """[T, B, hidden_size] from the scan and the gate."""
        return self.out_proj(self._gated(y_BTD, z_BTD))[0]

    def begin_decoding(
        self, hidden_states: Tensor, *, rotary_pos_emb: Tensor | None, layout: SequenceLayout
    ) -> tuple[Tensor, MambaState]:
        """See :class:`~spikingbrain_train.models.mixers.decoding.DecodesByStep`."""
        x_BTD, z_BTD = self._inputs(hidden_states)
        x_BTD, inputs_BSD = causal_convolution(
            x_BTD, self.conv1d.weight.squeeze(1), self.conv1d.bias, output_final_state=True
        )
        x_BTD = F.silu(x_BTD)
        of_scan = self._scan_inputs(x_BTD)
        y_BTD, state_BDN = selective_scan(
            x_BTD, *of_scan, D=self.D, output_final_state=True, backend=self.backend
        )
        assert inputs_BSD is not None and state_BDN is not None
        # A copy: the last inputs are a view of all of them.
        return self._output(y_BTD, z_BTD), MambaState(inputs_BSD.clone(), state_BDN)

    def decode(
        self,
        hidden_states: Tensor,
        state: MambaState,
        *,
        rotary_pos_emb: Tensor | None,
        cp_group: ProcessGroup | None = None,
    ) -> Tensor:
        """See :class:`~spikingbrain_train.models.mixers.decoding.DecodesByStep`."""
        if cp_group is not None:
            return self._decode_slice(hidden_states, state, cp_group)
        x_BTD, z_BTD = self._inputs(hidden_states)
        x_BTD, inputs_BSD = causal_convolution(
            x_BTD,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            initial_state=state.inputs_BSD,
            output_final_state=True,
        )
        assert inputs_BSD is not None
        x_BTD = F.silu(x_BTD)
        dt_BTD, A_DN, B_BTN, C_BTN = self._scan_inputs(x_BTD)
        state.inputs_BSD = inputs_BSD.clone()
        if len(hidden_states) > 1:
            y_BTD, state_BDN = selective_scan(
                x_BTD,
                dt_BTD,
                A_DN,
                B_BTN,
                C_BTN,
                D=self.D,
                initial_state=state.state_BDN,
                output_final_state=True,
                backend=self.backend,
            )
            assert state_BDN is not None
            state.state_BDN = state_BDN
            return self._output(y_BTD, z_BTD)
        x_BD, dt_BD, B_BN, C_BN = (each.squeeze(1) for each in (x_BTD, dt_BTD, B_BTN, C_BTN))
        y_BD, state_BDN = selective_scan_step(x_BD, dt_BD, A_DN, B_BN, C_BN, state.state_BDN)
        y_BD = torch.addcmul(y_BD, x_BD, self.D)
        state.state_BDN = state_BDN
        return self._output(y_BD.unsqueeze(1), z_BTD)

    def _decode_slice(self, hidden_states: Tensor, state: MambaState, cp_group: ProcessGroup) -> Tensor:
        x_BTD, z_BTD = self._inputs(hidden_states)
        before_BSD, state.inputs_BSD = inputs_before_slice(x_BTD, state.inputs_BSD, cp_group)
        x_BTD, _ = causal_convolution(
            x_BTD, self.conv1d.weight.squeeze(1), self.conv1d.bias, initial_state=before_BSD
        )
        x_BTD = F.silu(x_BTD)
        of_scan = self._scan_inputs(x_BTD)
        local, decay_BDN = selective_scan_end_state(x_BTD, *of_scan, backend=self.backend)
        before_BDN1 = state_before_slice(state.state_BDN.unsqueeze(-1), local, decay_BDN, cp_group)
        y_BTD, state_BDN = selective_scan(
            x_BTD,
            *of_scan,
            D=self.D,
            initial_state=before_BDN1.squeeze(-1),
            output_final_state=True,
            backend=self.backend,
        )
        assert state_BDN is not None
        state.state_BDN = from_last_rank(state_BDN, cp_group)
        return self._output(y_BTD, z_BTD)


class _ScanInputs(NamedTuple):
    """What the scan reads beside x, in its order."""

    dt_BTD: Tensor
    A_DN: Tensor
    B_BTN: Tensor
    C_BTN: Tensor


class MambaState(DecodingState):
    """Behind the text that was read: the convolution's last inputs [B, W - 1, D] and the state [B, D, N]."""

    def __init__(self, inputs_BSD: Tensor, state_BDN: Tensor) -> None:
        self.inputs_BSD = inputs_BSD
        self.state_BDN = state_BDN

    def size(self) -> CacheSize:
        return CacheSize(recurrent=self.inputs_BSD.nbytes + self.state_BDN.nbytes)
