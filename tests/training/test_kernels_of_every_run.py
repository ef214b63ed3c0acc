"""Every model and experiment of conf/, on every platform with every set of packages, in every precision:
nothing refuses under ``auto``, what the log says is what the ops then take, and a name that cannot work is
refused at start-up.

The start-up's answer is held against the ops themselves. Their calls are made as mixers make them, on meta
tensors, for ranks at both ends of a split sequence, and recorded where the ops choose a kernel; each platform
then chooses for the recorded calls. Packages are made up. A new preset is covered by being there, a platform
or kernel by being listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from megatron.core.extensions import transformer_engine as te_linears
from torch import Tensor

from spikingbrain_train.architecture.backends.backend import Backend, Backends
from spikingbrain_train.architecture.backends.gated_linear_attention import GATED_LINEAR_ATTENTION
from spikingbrain_train.architecture.backends.releases import RELEASES
from spikingbrain_train.architecture.backends.softmax_attention import SoftmaxAttentionCall
from spikingbrain_train.architecture.layers import dense_source, mixers_of
from spikingbrain_train.architecture.sequence_layout import SequenceLayout
from spikingbrain_train.architecture.softmax_attention import SoftmaxAttentionKind
from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.model import ModelConfig
from spikingbrain_train.config.parallel import (
    AcceleratorKind,
    ExpertBackend,
    KernelConfig,
    LinearAttentionBackend,
    ParallelLinearBackend,
    SoftmaxAttentionBackend,
)
from spikingbrain_train.config.run import Precision, RunConfig
from spikingbrain_train.config.stage import DistillationConfig
from spikingbrain_train.config.yaml_files import conf_folder
from spikingbrain_train.errors import ConfigurationError, SpikingBrainError
from spikingbrain_train.models.kernels import resolve_kernels
from spikingbrain_train.models.layer_specs import block_spec, layer_build
from spikingbrain_train.ops.gated_linear_attention import choose_backend as choose_linear
from spikingbrain_train.ops.softmax_attention import choose_backend as choose_softmax
from spikingbrain_train.ops.softmax_attention import dispatch as softmax_dispatch
from spikingbrain_train.parallel.context_parallel import softmax_attention
from spikingbrain_train.parallel.context_parallel.halo_exchange import halo_lengths
from spikingbrain_train.planning.kernel_calls import check_kernels
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.runtime import packages as installed
from spikingbrain_train.runtime.accelerator import Accelerator
from spikingbrain_train.training.kernels import KernelChoices, choose_kernels

GPU_PACKAGES = ("flash_attn", "fla", "transformer_engine", "grouped_gemm", "apex")
PACKAGE_SETS = [frozenset(), frozenset({"triton"})]
PACKAGE_SETS += [frozenset({"triton", package}) for package in GPU_PACKAGES]
PACKAGE_SETS += [frozenset({"triton", *GPU_PACKAGES})]
PLATFORMS = [
    (AcceleratorKind.cpu, frozenset()),
    (AcceleratorKind.cpu, PACKAGE_SETS[-1]),
    *product((AcceleratorKind.cuda, AcceleratorKind.metax), PACKAGE_SETS),
]
DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


def choices_of(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_folder() / group).glob("*.yaml"))


MODELS = [name for name in choices_of("model") if name != "from_checkpoint"]
EXPERIMENTS = [name for name in choices_of("experiment") if not name.endswith(("_sft2", "_sft3"))]
"""The others make the calls of the first stage of fine-tuning: model, length and layout are the same."""
RUNS = [f"model={name}" for name in MODELS] + [f"experiment={name}" for name in EXPERIMENTS]


@cache
def composed(run: str) -> RunConfig:
    """A run of conf/; a bare model gets a stage, and what takes its model from a file a preset instead."""
    group, _, name = run.partition("=")
    overrides = [run, "output_dir=unused", "precision=bf16"]
    if group == "model":
        overrides += ["stage.train_iters=1", "stage.seq_length=8192", "stage.global_batch_size=8"]
    elif "override /model" not in (conf_folder() / group / f"{name}.yaml").read_text():
        overrides.append("model=smollm2_135m_hybrid")
    return to_run_config(compose_run(overrides))


def kernels_of_machine(
    kind: AcceleratorKind, packages: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> Accelerator:
    """A platform on which these packages, and no others, are installed and can be called."""
    monkeypatch.setattr(
        installed, "package_failure", lambda name: None if name in packages else "is not installed"
    )
    real = installed.defines
    parts = {"GroupedLinear": "transformer_engine", "mlp_cuda": "apex", "permute": "transformer_engine"}
    parts |= {
        "rotary_pos_emb": "transformer_engine",
        "sort_chunks_by_index": "transformer_engine",
        "_with_probs": "transformer_engine",
    }

    def defines(name: str) -> bool:
        brings = [package for end, package in parts.items() if name.endswith(end)]
        return brings[0] in packages if brings else real(name)

    monkeypatch.setattr(installed, "defines", defines)
    for name in ("TEColumnParallelLinear", "TERowParallelLinear"):
        if not isinstance(getattr(te_linears, name), type):  # of megatron-core without Transformer Engine
            monkeypatch.setattr(te_linears, name, type(name, (torch.nn.Module,), {}))
    number = 0 if kind is AcceleratorKind.cpu else 8
    versions = {name: RELEASES[name].versions[-1] if name in RELEASES else "1.0" for name in packages}
    return Accelerator(kind, "a device", number, versions)


@pytest.fixture(params=PLATFORMS, ids=lambda place: "+".join([place[0].value, *sorted(place[1])]))
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Accelerator:
    return kernels_of_machine(*request.param, monkeypatch)


class _Group:
    """Context-parallel ranks that talk to nobody."""

    def __init__(self, layout: SequenceLayout) -> None:
        self.size = lambda: layout.context_parallel_size


def _whole_sequences(q: Tensor, per_group: tuple[Tensor, ...], group: _Group) -> tuple[Tensor, Any]:
    q, *per_group = (torch.cat([x] * group.size(), dim=1) for x in (q, *per_group))
    return q, tuple(per_group)


def _halo(x: Tensor, *, layout: SequenceLayout, window: int, group: _Group) -> Tensor:
    length = halo_lengths(layout, window)[layout.context_parallel_rank]
    return x.new_empty(x.shape[0], length, *x.shape[2:])


COMMUNICATION: dict[str, Callable[..., Any]] = {
    "checked_group": lambda q, layout, _: _Group(layout) if layout.context_parallel_size > 1 else None,
    "to_whole_sequences": _whole_sequences,
    "to_slices": lambda o, heads, group: o[:, : o.shape[1] // group.size(), :heads],
    "halo_exchange": _halo,
    "broadcast_from_first_rank": lambda x, group: x,
}
"""What of context parallelism talks to other ranks; here what arrives has the right shape and no more."""


def networks(config: RunConfig) -> Iterator[tuple[ModelConfig, int, bool]]:
    """Networks of a run, their sinks in a batch, and whether those are padding."""
    model = config.model
    yield model, model.num_sink_tokens, False
    if config.stage.kind == "align" and model.num_sink_tokens:
        yield model, 0, False
    if kind_of(config.stage).needs_teacher(config.stage):
        teacher = dense_source(model)
        sinks = 0 if config.stage.kind == "align" else model.num_sink_tokens
        yield teacher, sinks, sinks > 0


def layouts(config: RunConfig, sinks: int, padding: bool) -> Iterator[SequenceLayout]:
    """Ranks at both ends of the sequence, of one document and, where they are kept apart, of several."""
    length, ranks = config.stage.seq_length, config.parallel.context_parallel_size
    documents = [None, ((0, length // 3, length),)] if config.data.reset_at_documents else [None]
    for rank, bounds in product(sorted({0, 1 % ranks, ranks - 1}), documents):
        yield SequenceLayout(length, sinks, rank, ranks, bounds, padding)


def run_softmax_attention(config: RunConfig) -> None:
    """Every call that the mixers of this run make, up to the op."""
    for model, sinks, padding in networks(config):
        kinds = [kind for kind in mixers_of(model) if isinstance(kind, SoftmaxAttentionKind)]
        for kind, layout in product(kinds, layouts(config, sinks, padding)):
            q, k = (
                torch.empty(
                    *(1, layout.slice_length, heads, model.kv_channels),
                    dtype=DTYPES[config.precision],
                    device="meta",
                )
                for heads in (2, 1)
            )
            softmax_attention.context_parallel_softmax_attention(
                q,
                k,
                k,
                window=model.sliding_window if kind.name == "swa" else None,
                layout=layout,
                cp_group=None,
                method=config.parallel.context_parallel.sliding_window_attention,
                scale=1.0,
                backend="auto",
            )


def variants(run: str) -> Iterator[RunConfig]:
    """A run in both precisions, with documents together and apart; trained, aligned and distilled."""
    for precision, apart in product(DTYPES, (False, True)):
        config = composed(run)
        data = replace(config.data, reset_at_documents=apart)
        config = replace(config, precision=precision, data=data)
        stage = replace(config.stage, teacher="unused")
        for trained in (
            replace(stage, kind="cpt", distillation=DistillationConfig()),
            replace(stage, kind="align", distillation=DistillationConfig()),
            replace(stage, kind="distill", distillation=DistillationConfig(weight=0.3)),
        ):
            yield replace(config, stage=trained)


@cache
def recorded(run: str) -> list[tuple[RunConfig, set[SoftmaxAttentionCall]]]:
    """The variants of a run, and every call of softmax attention that each makes."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        calls: set[SoftmaxAttentionCall] = set()

        def record(backend: str, call: SoftmaxAttentionCall, device_type: str) -> str:
            calls.add(call)
            return "shapes"

        patch.setitem(softmax_dispatch._ANY_DOCUMENTS, "shapes", lambda q, k, v, **_: torch.empty_like(q))
        patch.setattr(softmax_dispatch, "choose_backend", record)
        for name, stand_in in COMMUNICATION.items():
            patch.setattr(softmax_attention, name, stand_in)
        for config in variants(run):
            calls = set()
            run_softmax_attention(config)
            made.append((config, calls))
    return made


def start(config: RunConfig, machine: Accelerator) -> KernelChoices:
    """What the start-up makes of a run, from the config alone and on its machine."""
    check_kernels(config)
    kernels = resolve_kernels(
        config.cluster.kernels,
        machine,
        model=config.model,
        precision=config.precision,
        parallel=config.parallel,
    )
    return choose_kernels(config, kernels, machine)


def with_kernels(config: RunConfig, kernels: KernelConfig) -> RunConfig:
    return replace(config, cluster=replace(config.cluster, kernels=kernels))


def assert_is_built(config: RunConfig, kernels: KernelConfig) -> None:
    """The classes exist and go together."""
    block_spec(layer_build(config.model, kernels), 0, min(2, config.model.num_layers))


@pytest.mark.parametrize("run", RUNS)
def test_auto_never_refuses_and_the_log_names_what_the_calls_take(run: str, machine: Accelerator) -> None:
    for config, calls in recorded(run):
        choices = start(with_kernels(config, KernelConfig()), machine)
        taken = {choose_softmax("auto", call, machine.device_type) for call in calls}
        assert set(choices.mixers["softmax_attention"]) == taken
        linear = any(kind.backends is GATED_LINEAR_ATTENTION for kind in mixers_of(config.model))
        dtype = DTYPES[config.precision]
        assert set(choices.mixers["gated_linear_attention"]) == (
            {choose_linear("auto", dtype, machine.device_type)} if linear else set()
        )
        assert_is_built(config, choices.kernels)


NAMES = [
    *(KernelConfig(softmax_attention=name) for name in SoftmaxAttentionBackend),
    *(KernelConfig(gated_linear_attention=name) for name in LinearAttentionBackend),
]


@pytest.mark.parametrize("run", RUNS)
def test_a_name_is_refused_at_start_up_or_works_in_every_call(run: str, machine: Accelerator) -> None:
    for (config, calls), names in product(recorded(run), NAMES):
        try:
            choices = start(with_kernels(config, names), machine)
        except SpikingBrainError:
            continue
        for call in calls:
            name = choose_softmax(names.softmax_attention.value, call, machine.device_type)
            assert name in choices.mixers["softmax_attention"]
        choose_linear(names.gated_linear_attention.value, DTYPES[config.precision], machine.device_type)


LINEARS_AND_EXPERTS = [
    KernelConfig(parallel_linear=linears, experts=experts)
    for linears, experts in product(ParallelLinearBackend, ExpertBackend)
]


@pytest.mark.parametrize("run", RUNS)
def test_linears_and_experts_are_refused_at_start_up_or_built(run: str, machine: Accelerator) -> None:
    """And experts under auto are multiplied at once wherever a backend that is here can do it."""
    for config, _ in recorded(run):
        accepted: dict[ParallelLinearBackend, set[ExpertBackend]] = {}
        for names in LINEARS_AND_EXPERTS:
            try:
                kernels = start(with_kernels(config, names), machine).kernels
            except SpikingBrainError:
                assert names != KernelConfig(), "auto refuses"
                continue
            assert names.parallel_linear in (ParallelLinearBackend.auto, kernels.parallel_linear)
            assert names.experts in (ExpertBackend.auto, kernels.experts)
            assert_is_built(config, kernels)
            accepted.setdefault(names.parallel_linear, set()).add(kernels.experts)
            if names.experts is ExpertBackend.auto:
                chosen = kernels.experts
            elif names.experts is not ExpertBackend.sequential:
                assert chosen is not ExpertBackend.sequential, f"auto passes over {names.experts}"
        assert all(ExpertBackend.sequential in experts for experts in accepted.values())


def test_the_76b_trains_on_nvidia_with_flash_attn_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = kernels_of_machine(AcceleratorKind.cuda, PACKAGE_SETS[-1], monkeypatch)
    config = composed("experiment=spikingbrain_76b_8k")
    choices = start(config, machine)
    assert choices.mixers["softmax_attention"] == {"flash_attn": ["full"], "flex": ["swa"]}
    assert choices.describe() == (
        "kernels: gated linear attention fla, softmax attention flash_attn (full) and flex (swa), gated "
        "delta rule in no layer, selective scan in no layer, parallel linears transformer_engine, experts "
        "transformer_engine, weight gradients transformer_engine, token permutation transformer_engine, "
        "rotary transformer_engine"
    )
    (row,) = choices.rows(on_gpu=True)
    assert row == ("kernels", choices.describe().removeprefix("kernels: "))
    broken = replace(choices, set_aside={"flash_attn": "was built for another torch"})
    assert broken.rows(on_gpu=False) == [
        ("not used", "flash_attn, which is installed: it was built for another torch")
    ]
    newer = replace(machine, packages={**machine.packages, "flash_attn": "99.1"})
    (_, (word, warning)) = start(config, newer).rows(on_gpu=True)
    assert word == "warning" and warning.startswith("flash_attn 99.1 is newer than the releases that")
    choices = start(replace(config, precision=Precision.fp32), machine)
    assert choices.mixers["softmax_attention"] == {"sdpa": ["full"], "flex": ["swa"]}


def test_what_a_kernel_cannot_do_of_a_run_is_known_from_its_config_alone() -> None:
    config = composed("experiment=spikingbrain_76b_8k")
    flash = with_kernels(config, KernelConfig(softmax_attention=SoftmaxAttentionBackend.flash_attn))
    with pytest.raises(ConfigurationError, match="cannot combine 128 sink tokens with a window of 4096"):
        check_kernels(flash)
    flash = replace(flash, model=composed("model=spikingbrain_7b").model)
    check_kernels(flash)
    with pytest.raises(ConfigurationError, match="needs float16 or bfloat16, not float32; choose auto"):
        check_kernels(replace(flash, precision=Precision.fp32))
    grouped = with_kernels(config, KernelConfig(experts=ExpertBackend.grouped_gemm))
    check_kernels(grouped)
    with pytest.raises(ConfigurationError, match="grouped_gemm multiplies bfloat16 only"):
        check_kernels(replace(grouped, precision=Precision.fp32))


def test_a_package_that_is_installed_but_fails_is_named_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = kernels_of_machine(AcceleratorKind.cuda, frozenset({"triton", "flash_attn"}), monkeypatch)
    broken = "is installed but does not import (undefined symbol)"
    monkeypatch.setattr(installed, "package_failure", lambda name: None if name == "triton" else broken)
    choices = start(composed("model=spikingbrain_7b"), machine)
    assert choices.mixers["softmax_attention"] == {"flex": ["swa"]}
    assert f"flash_attn is not used: it {broken}" in choices.describe()


def test_the_op_of_a_plugin_needs_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Backends(
        "their_op", (Backend("fast", gpu=True), Backend("plain")), lambda _, on_gpu: ORDER[on_gpu]
    )
    for kind in mixers_of(composed("model=spikingbrain_7b").model):
        monkeypatch.setattr(type(kind), "backends", table)
    for accelerator, taken in ((AcceleratorKind.cpu, "plain"), (AcceleratorKind.cuda, "fast")):
        machine = kernels_of_machine(accelerator, frozenset(), monkeypatch)
        choices = start(composed("model=spikingbrain_7b"), machine)
        assert set(choices.mixers["their_op"]) == {taken}
        assert f"their op {taken}" in choices.describe()


ORDER = {False: ("plain",), True: ("fast", "plain")}
