"""Whose linears and experts a model is built of on this machine."""

from __future__ import annotations

from spikingbrain_train.architecture.backends.linears import (
    EXPERTS,
    PARALLEL_LINEAR,
    ExpertsCall,
    LinearsCall,
)
from spikingbrain_train.architecture.backends.rotary import on_platform
from spikingbrain_train.architecture.backends.tables import TABLES
from spikingbrain_train.architecture.backends.token_permutation import TOKEN_PERMUTATION, TokenPermutationCall
from spikingbrain_train.architecture.backends.weight_gradients import WEIGHT_GRADIENTS, WeightGradientsCall
from spikingbrain_train.architecture.linear_transforms import in_experts
from spikingbrain_train.config.model import ActivationFunc, ModelConfig
from spikingbrain_train.config.parallel import (
    ExpertBackend,
    KernelConfig,
    ParallelConfig,
    ParallelLinearBackend,
    TokenPermutationBackend,
    WeightGradientBackend,
)
from spikingbrain_train.config.run import Precision
from spikingbrain_train.errors import ConfigurationError
from spikingbrain_train.runtime.accelerator import Accelerator

_PREFIX = "cluster.kernels."


def resolve_kernels(
    kernels: KernelConfig,
    accelerator: Accelerator,
    *,
    model: ModelConfig | None = None,
    precision: Precision = Precision.bf16,
    in_fp8: bool = False,
    parallel: ParallelConfig | None = None,
) -> KernelConfig:
    """Replace ``auto`` of linears, experts and what goes with them by the best backend here.

    Attention keeps what the config says, if that is here: its ops choose call by call. So do rotary positions
    on NVIDIA GPUs.

    Args:
        kernels: choices of the config.
        accelerator: this process's platform and packages.
        model: whose linears may transform their inputs and weights, which not every backend can; None is a
            model of plain ones.
        precision: of weights and activations, of which not every backend takes all.
        in_fp8: whether linears multiply in FP8.
        parallel: engine and what becomes of experts; None is megatron-core's, and experts where they are.

    Raises:
        PlatformError: a backend is asked for by name whose package, release or GPU is missing.
        ConfigurationError: a backend is asked for by name that cannot do what the run needs.
    """
    machine, transforms = accelerator.machine(), () if model is None else in_experts(model)
    parallel = ParallelConfig() if parallel is None else parallel
    for setting, table in TABLES.items():
        table.require(getattr(kernels, setting).value, machine, _PREFIX)
    try:
        linear = PARALLEL_LINEAR.choose(
            kernels.parallel_linear.value, LinearsCall(accelerator.kind), machine, _PREFIX
        )
        activation = ActivationFunc.silu if model is None else model.activation_func
        call = ExpertsCall(linear, transforms, precision, activation, in_fp8)
        experts = EXPERTS.choose(kernels.experts.value, call, machine, _PREFIX)
        gradients = WEIGHT_GRADIENTS.choose(
            kernels.weight_gradients.value,
            WeightGradientsCall(linear, accelerator.kind, parallel.engine),
            machine,
            _PREFIX,
        )
        replicates = parallel.replicate_expert_load is not None
        permutation = TOKEN_PERMUTATION.choose(
            kernels.token_permutation.value,
            TokenPermutationCall(accelerator.kind, replicates),
            machine,
            _PREFIX,
        )
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    return KernelConfig(
        gated_linear_attention=kernels.gated_linear_attention,
        softmax_attention=kernels.softmax_attention,
        gated_delta_rule=kernels.gated_delta_rule,
        parallel_linear=ParallelLinearBackend(linear),
        experts=ExpertBackend(experts),
        selective_scan=kernels.selective_scan,
        weight_gradients=WeightGradientBackend(gradients),
        token_permutation=TokenPermutationBackend(permutation),
        rotary=on_platform(kernels.rotary, accelerator.kind),
    )
