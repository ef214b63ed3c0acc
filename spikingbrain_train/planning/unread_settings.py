"""Settings that somebody has set and nothing reads: worth a word, never an error.

What kinds of mixers, feed-forwards, linear transforms and stages read, they say themselves
(``all_settings`` and ``settings`` of each), plugins' as ours; what hangs on other settings stands in a table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from spikingbrain_train.architecture.branches import dropped_branches
from spikingbrain_train.architecture.feed_forwards import ACTIVATION_SETTINGS, FEED_FORWARDS
from spikingbrain_train.architecture.layers import has_experts, layers, swapped_layers
from spikingbrain_train.architecture.linear_transforms import LINEAR_TRANSFORMS
from spikingbrain_train.architecture.mixers import MIXERS
from spikingbrain_train.architecture.same_architecture import settings_in_use
from spikingbrain_train.architecture.stored_model import read_stored_model
from spikingbrain_train.config.model import ActivationFunc, DecoderConfig, ModelConfig
from spikingbrain_train.config.numerics import OnBadBatch
from spikingbrain_train.config.parallel import EngineKind
from spikingbrain_train.config.run import LRDecayStyle, OptimizerKind, RunConfig, WandbMode
from spikingbrain_train.config.sections import with_sections
from spikingbrain_train.config.setting import leaves
from spikingbrain_train.config.shown import shown
from spikingbrain_train.errors import SpikingBrainError
from spikingbrain_train.planning.stages.registry import STAGES, kind_of
from spikingbrain_train.storage.checkpoint_folder import latest_checkpoint


@dataclass(frozen=True)
class UnreadSetting:
    """A setting without a part in the run, though it has another value than by default."""

    name: str
    """Dotted: ``model.sliding_window``."""
    value: Any
    reason: str
    """Why nothing reads it."""

    def describe(self) -> str:
        """In a line: ``model.sliding_window=128 has no effect: the model has no sliding-window layers``."""
        return f"{self.name}={shown(self.value)} has no effect: {self.reason}"


@dataclass(frozen=True)
class _Needs:
    """Settings that are read only where another one says so."""

    prefixes: tuple[str, ...]
    """Names, or sections with a dot behind them."""
    is_read: Callable[[RunConfig], Any]
    reason: Callable[[RunConfig], str]
    """Why they are not, where they are not."""


_NEEDS = (
    _Needs(
        ("optimizer.lr_wsd_decay_style",),
        lambda run: run.optimizer.lr_decay_style is LRDecayStyle.WSD,
        lambda run: (
            f"it shapes the decay of optimizer.lr_decay_style=WSD, and the style is "
            f"{run.optimizer.lr_decay_style.name}"
        ),
    ),
    _Needs(
        (
            *("optimizer.muon_momentum", "optimizer.muon_use_nesterov", "optimizer.muon_num_ns_steps"),
            *("optimizer.muon_extra_scale_factor", "optimizer.muon_precision"),
        ),
        lambda run: run.optimizer.kind is OptimizerKind.muon,
        lambda run: f"optimizer.kind is {run.optimizer.kind.value}; choose optimizer=muon_cosine",
    ),
    _Needs(
        ("logging.eval_interval", "logging.eval_iters"),
        # A plan without data leaves open what will be held out.
        lambda run: run.data.valid or run.logging.evaluators or not run.data.train,
        lambda run: "data.valid names no held-out data, so nothing is evaluated",
    ),
    _Needs(
        ("logging.wandb_name", "logging.wandb_project"),
        lambda run: run.logging.wandb is not WandbMode.disabled,
        lambda run: "logging.wandb is disabled; choose logging=wandb_offline or wandb_online",
    ),
    _Needs(
        ("checkpoint.while_saving",),
        lambda run: run.checkpoint.async_save,
        lambda run: "checkpoint.async_save is false, so a run always waits for its checkpoints",
    ),
    _Needs(
        ("checkpoint.memory_copies", "checkpoint.memory_folder"),
        lambda run: run.checkpoint.memory_interval,
        lambda run: "checkpoint.memory_interval is 0, so no copies are kept in memory",
    ),
    _Needs(
        ("numerics.spike_window", "numerics.spike_warmup"),
        lambda run: run.numerics.looks_for_spikes,
        lambda run: "no spike of the loss is looked for; set numerics.spike_factor or numerics.spike_margin",
    ),
    _Needs(
        ("numerics.replay",),
        lambda run: run.numerics.on_bad_batch is OnBadBatch.skip,
        lambda run: "numerics.on_bad_batch=stop ends the run at once",
    ),
    _Needs(
        ("data.pack_by_domain", "data.long_documents.", "data.reset_at_documents"),
        lambda run: not kind_of(run.stage).reads_examples,
        lambda run: f"stage.kind={run.stage.kind} packs whole examples and keeps them apart",
    ),
    _Needs(
        ("data.long_documents.min_tokens", "data.long_documents.max_repeats"),
        lambda run: run.data.long_documents.share is not None,
        lambda run: "data.long_documents.share is null, so that long documents are not told from others",
    ),
    _Needs(
        ("parallel.context_parallel.",),
        lambda run: run.parallel.context_parallel_size > 1,
        lambda run: "parallel.context_parallel_size is 1, so sequences are not split",
    ),
    _Needs(
        ("parallel.recompute_expert_tokens",),
        lambda run: run.parallel.most_expert_tokens is not None,
        lambda run: f"parallel.recompute={run.parallel.recompute.name} computes every expert again",
    ),
    _Needs(
        ("parallel.zero.",),
        lambda run: run.parallel.engine is EngineKind.deepspeed,
        lambda run: f"it is DeepSpeed's, and parallel.engine is {run.parallel.engine.value}",
    ),
    _Needs(
        ("fp8.recipe", "fp8.num_layers_at_start_in_bf16", "fp8.num_layers_at_end_in_bf16"),
        lambda run: run.fp8.format is not None,
        lambda run: "fp8.format is null, so linears multiply in the format of the weights",
    ),
    _Needs(
        ("parallel.fsdp.",),
        lambda run: run.parallel.engine is EngineKind.fsdp,
        lambda run: f"it is FSDP's, and parallel.engine is {run.parallel.engine.value}",
    ),
    _Needs(
        ("parallel.overlap_grad_reduce",),
        lambda run: run.parallel.engine is not EngineKind.fsdp,
        lambda run: "parallel.engine=fsdp always reduces gradients while the backward pass still runs",
    ),
    _Needs(
        ("cluster.kernels.experts", "cluster.kernels.token_permutation"),
        lambda run: has_experts(run.model),
        lambda run: "the model has no experts",
    ),
    _Needs(
        ("model.parallel_hybrid.softmax_dropout",),
        lambda run: any(dropped_branches(layer.mixers) for layer in layers(run.model)),
        lambda run: "no layer has another branch beside softmax attention, as model.mixers=[[gla,swa]] has",
    ),
    _Needs(
        ("model.parallel_hybrid.",),
        lambda run: any(len(layer.mixers) > 1 for layer in layers(run.model)),
        lambda run: "no layer has several branches, as model.mixers=[[gla,swa]] has",
    ),
    _Needs(
        ("model.fatrelu_threshold",),
        lambda run: run.model.activation_func is ActivationFunc.fatrelu,
        lambda run: f"it is fatrelu's, and model.activation_func is {run.model.activation_func.value}",
    ),
    _Needs(
        ("optimizer.mixer_lr_mult",),
        lambda run: bool(swapped_layers(layers(run.model))),
        lambda run: "every layer of the model has the mixer of a dense source",
    ),
    _Needs(
        ("dry_run_rank",),
        lambda run: run.dry_run,
        lambda run: "a run trains all ranks; it is for dry_run=true",
    ),
)


def unread_settings(config: RunConfig) -> list[UnreadSetting]:
    """Every setting of a checked run that has another value than by default and no part in the run.

    Values that come from the checkpoint in checkpoint.load are nobody's choice here and are left out, and so
    are the sizes that a model has in common with its dense source.
    """
    changed = _changed(config)
    found = {each.name: each for each in (*_of_the_model(config, changed), *_of_the_stage(config, changed))}
    for needs in _NEEDS:
        if needs.is_read(config):
            continue
        for name in changed:
            if any(name == each or (each.endswith(".") and name.startswith(each)) for each in needs.prefixes):
                found[name] = UnreadSetting(name, changed[name], needs.reason(config))
    return [found[name] for name in changed if name in found]


def _changed(config: RunConfig) -> dict[str, Any]:
    """Settings whose values are neither defaults nor those of the checkpoint, by dotted name."""
    usual = leaves(with_sections(RunConfig)())
    stored = {f"model.{name}": value for name, value in _stored_model(config).items()}
    of_the_source = {f"model.{name}" for name in leaves(DecoderConfig()) if name not in ACTIVATION_SETTINGS}
    return {
        name: value
        for name, value in leaves(config).items()
        if name not in of_the_source
        and usual.get(name, MISSING) != MISSING
        and value not in (usual[name], stored.get(name, usual[name]))
    }


def _stored_model(config: RunConfig) -> dict[str, Any]:
    if config.checkpoint.load is None:
        return {}
    try:
        return leaves(read_stored_model(latest_checkpoint(config.checkpoint.load, "checkpoint.load")))
    except SpikingBrainError:  # a dry run does without, and a run that goes on
        return {}


def _of_the_model(config: RunConfig, changed: Collection[str]) -> Iterator[UnreadSetting]:
    model, in_use = config.model, settings_in_use(config.model)
    values = leaves(model)
    for name in (each.removeprefix("model.") for each in changed if each.startswith("model.")):
        if name not in in_use:
            yield UnreadSetting(f"model.{name}", values[name], _reason_in(model, name))


def _reason_in(model: ModelConfig, name: str) -> str:
    """Why no layer reads a setting of the model, in the words of the kinds that could."""
    present = {layer.feed_forward for layer in layers(model)}.union(*(each.mixers for each in layers(model)))
    kinds = [kind for kind in (*MIXERS, *FEED_FORWARDS) if name in kind.all_settings(model)]
    section = name.rpartition(".")[0]
    if any(kind in present for kind in kinds):
        return f"it belongs to another choice in model.{section or name}"
    if kinds:
        return f"the model has no {' or '.join(kind.words for kind in kinds)}"
    for transform in LINEAR_TRANSFORMS:
        if name in transform.all_settings(model):
            if transform.projections(model):
                return f"it belongs to another choice in model.{section}"
            return f"model.{section}, as it is set, is applied nowhere"
    return "no layer reads it"


def _of_the_stage(config: RunConfig, changed: dict[str, Any]) -> Iterator[UnreadSetting]:
    stage, kind = config.stage, kind_of(config.stage)
    if "stage.teacher" in changed and not kind.needs_teacher(stage):
        yield UnreadSetting(
            "stage.teacher", stage.teacher, f"stage.kind={kind.name}, as it is set, learns from no teacher"
        )
    for name in changed:
        readers = [each for each in STAGES if name in each.all_settings(stage)]
        if not readers or name in kind.settings(stage):
            continue
        reason = f"it belongs to another choice in {name.rpartition('.')[0]}"
        if kind not in readers:
            reason = f"stage.kind={kind.name} does not read it; {' and '.join(e.name for e in readers)} would"
        yield UnreadSetting(name, changed[name], reason)
