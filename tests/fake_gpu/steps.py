"""One training step of a run of conf/ on the rank of a GPU that computes nothing: see fake_cuda.py.

A process of its own, in which no patch for CPUs is in force:

    python -m tests.fake_gpu.steps RUN ...

For each run and rank a line of JSON: what the step did that a GPU would not like. Behind a run that ends in
" reported" comes a second step, which is reported, with an evaluation, and the plan of a save.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

os.environ["TORCHDYNAMO_DISABLE"] = (
    "1"  # megatron-core compiles small functions on GPUs; here they run as they stand
)

os.environ["DS_ACCELERATOR"] = "cuda"  # DeepSpeed asks when it is imported, which transformers does, too

import numpy as np
import torch
from torch import Tensor
from torch.distributed.remote_device import _remote_device
from torch.testing._internal.distributed.fake_pg import FakeStore

from spikingbrain_train.architecture.layers import dense_source, layers
from spikingbrain_train.config.batch_size import BatchSizeRampConfig
from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import to_run_config
from spikingbrain_train.config.parallel import EngineKind
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.run_record import RunRecord
from spikingbrain_train.config.yaml_files import conf_folder
from spikingbrain_train.data.loader import local_micro_batch
from spikingbrain_train.parallel import process_groups
from spikingbrain_train.planning.planner import smallest_stage
from spikingbrain_train.planning.stages.registry import kind_of
from spikingbrain_train.runtime import patches
from spikingbrain_train.runtime.accelerator import Accelerator
from spikingbrain_train.runtime.patches import PATCHES
from tests.evaluation.multiple_choice.small_tasks import write_tasks
from tests.fake_gpu import engine, kernels
from tests.fake_gpu.cuda_build import cuda_build
from tests.fake_gpu.fake_cuda import GPU, Findings, fake_cuda, place
from tests.small_source import save_small_source

if TYPE_CHECKING:
    from spikingbrain_train.training.trainer import Trainer

MICRO_BATCHES = 2
REPORTED = " reported"
gpu_that_computes_nothing = fake_cuda if torch.version.cuda is None else cuda_build
FOLDER = "FOLDER"
"""In a run: a folder with a tokenizer, multiple choice and held-out text."""


def composed(run: str, *more: str) -> RunConfig:
    """A run of conf/, on CUDA; a bare model gets a stage, and what takes its model from a file a preset."""
    group, _, name = run.partition("=")
    overrides = [run, "output_dir=unused", "precision=bf16", *more]
    if not any(each.startswith("cluster=") for each in more):
        overrides.append("cluster=nvidia")
    if group == "model":
        overrides += ["stage.train_iters=1", "stage.seq_length=8192", "stage.global_batch_size=8"]
    elif "override /model" not in (conf_folder() / group / f"{name}.yaml").read_text():
        overrides.append("model=smollm2_135m_hybrid")
    return to_run_config(compose_run(overrides))


def shortened(config: RunConfig) -> RunConfig:
    """Pipeline stages of as few layers as have every mixer and feed-forward; all other sizes stay."""
    model, stages = config.model, config.parallel.pipeline_model_parallel_size
    kinds = layers(model)
    mixers = list(dict.fromkeys(tuple(kind.name for kind in layer.mixers) for layer in kinds))
    feed_forwards = list(dict.fromkeys(layer.feed_forward.name for layer in kinds))
    number = stages * config.parallel.virtual_stages * max(len(mixers), len(feed_forwards))
    model = replace(
        model,
        num_layers=number,
        mixers=[list(mixers[i % len(mixers)]) for i in range(number)],
        feed_forwards=[feed_forwards[i % len(feed_forwards)] for i in range(number)],
    )
    return replace(config, model=model)


def step(config: RunConfig, last: bool, *, is_reported: bool) -> dict[str, Any]:
    """Build, forward, backward, update and describe for a checkpoint, on the first or the last rank."""
    parallel = config.parallel
    # As few replicas as shard the optimizer's state.
    of_stage = smallest_stage(parallel)
    if of_stage == parallel.tensor_model_parallel_size * parallel.context_parallel_size:
        of_stage *= 2
    world = parallel.pipeline_model_parallel_size * of_stage
    config = replace(config, parallel=replace(parallel, data_parallel_size=None))
    rank = world - 1 if last else 0
    launched = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    os.environ |= {name: str(value) for name, value in launched.items()} | {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    packages = {name: "1.0" for name in kernels.packages_of(config.cluster.kernels)}
    in_fp8 = config.fp8.format is not None
    if in_fp8:
        packages["transformer_engine"] = engine.RELEASE
    kind = config.cluster.accelerator
    accelerator = Accelerator(kind, "a GPU that computes nothing", 8, packages)

    def join(launch: Any, accelerator: Any, timeout: Any) -> None:
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)

    with (
        gpu_that_computes_nothing(partial(value_of, config), partial(selected_by, config)) as findings,
        kernels.installed(packages, with_engine=in_fp8),
        mock.patch.object(process_groups, "_join_world", join),
        comparing_engine(config),
        few_chunks(),
        built_teachers(config),
    ):
        groups = process_groups.initialize(config.parallel, accelerator, seed=1)
        try:
            found = _step(config, groups, accelerator, findings, is_reported=is_reported)
            if in_fp8:
                found["engine"] = sorted(map(list, set(engine.PRODUCTS)), key=str)
                found["added"] = sorted(set(engine.ADDED))
            return found
        finally:
            process_groups.destroy()


_COMPARED: dict[EngineKind, tuple[str, str, Callable[[Any], Any]]] = {
    # ZeRO 3: the order of modules in a run's first steps with that of other ranks.
    EngineKind.deepspeed: (
        "deepspeed.runtime.zero.partitioned_param_coordinator",
        "assert_ints_same_as_other_ranks",
        lambda numbers: None,
    ),
    # FSDP2: the device that it makes of a mesh's name and a number with those of parameters.
    EngineKind.fsdp: (
        "torch.distributed.fsdp._fully_shard._fully_shard",
        "_get_device_from_mesh",
        lambda mesh: GPU,
    ),
}
"""What an engine compares, and what it finds where it looks: module, function, its result."""


def comparing_engine(config: RunConfig) -> contextlib.AbstractContextManager[Any]:
    """The run's engine finds what it would on GPUs that compute."""
    if config.parallel.engine not in _COMPARED:
        return contextlib.nullcontext()
    module, name, found = _COMPARED[config.parallel.engine]
    return mock.patch.object(import_module(module), name, found)


@contextlib.contextmanager
def few_chunks() -> Iterator[None]:
    """Of up to thirty equal chunks and blocks of the loss, which do the same, three: the first, one between
    and the last."""
    from spikingbrain_train.ops import linear_cross_entropy

    spans = linear_cross_entropy._spans
    with mock.patch.object(
        linear_cross_entropy, "_spans", lambda length, parts: spans(length, min(parts, 3))
    ):
        yield


@contextlib.contextmanager
def built_teachers(config: RunConfig) -> Iterator[None]:
    """The checkpoint of a teacher that an evaluator reads is of no file: the run's dense source is built."""
    from spikingbrain_train.evaluation.against_teacher import evaluator, recording

    def build(_: object, groups: Any) -> SimpleNamespace:
        return SimpleNamespace(model=dense_teacher(config, groups))

    with (
        mock.patch.object(evaluator, "is_megatron_checkpoint", lambda folder, flag: True),
        mock.patch.object(evaluator, "request_in_run", lambda folder, config, flag: None),
        mock.patch.object(evaluator, "for_reading", lambda request: request),
        mock.patch.object(recording, "open_checkpoint", build),
    ):
        yield


def dense_teacher(config: RunConfig, groups: Any) -> Any:
    from spikingbrain_train.training import build

    chosen = build.kernels_of(config, groups.accelerator)
    teacher = build._build(dense_source(config.model), config, chosen, groups, initialize=True)
    return teacher.requires_grad_(False).eval()


def value_of(config: RunConfig, x: Tensor) -> Tensor:
    """Ones, tokens that are written among them; False, also as a byte, but for what was counted or is finite;
    the votes of a good step, and no failure; as many tokens for every expert, where x counts those."""
    if x.dtype in (torch.bool, torch.uint8):
        true = ("/callbacks/", "ops/finite.py:first_not_finite")
        return torch.full(x.shape, any(each in place() for each in true), dtype=x.dtype, device="cpu")
    if "/agreement.py:agreed_failure" in place():
        return torch.zeros(x.shape, dtype=x.dtype, device="cpu")  # no rank has failed
    if x.dtype == torch.int32 and x.dim() == 1:
        return torch.tensor(good_votes(config), dtype=x.dtype, device="cpu")
    parallel, experts = config.parallel, config.model.moe.num_experts
    ranks, tensor = parallel.expert_model_parallel_size, parallel.expert_tensor_size
    value = 1
    if not x.is_floating_point() and x.dim() > 0 and "/evaluation/" not in place():  # that asks for tokens
        of_rank = config.stage.micro_batch_size * (config.stage.seq_length + config.model.num_sink_tokens)
        of_rank //= parallel.context_parallel_size
        if parallel.sequence_parallel:
            of_rank //= parallel.tensor_model_parallel_size
        chosen = of_rank * config.model.moe.router_topk
        if x.shape == (1,) and parallel.replicate_expert_load is not None:
            return torch.zeros(x.shape, dtype=x.dtype, device="cpu")  # the first expert is replicated
        if x.shape == (ranks,) and ranks > 1:  # sent to, or got from, a rank
            value = chosen // ranks
        elif x.dim() == 1:  # got by an expert
            value = chosen // experts * ranks * tensor
        else:  # got by an expert from a rank
            value = chosen // experts
    return torch.full(x.shape, value, dtype=x.dtype, device="cpu")


def good_votes(config: RunConfig) -> list[int]:
    """What all ranks agree on of a step that is fine, in a run that nobody asks to stop."""
    from spikingbrain_train.training.callbacks.bad_batches import BadBatches
    from spikingbrain_train.training.callbacks.callback import Callback
    from spikingbrain_train.training.callbacks.defaults import callbacks_of
    from spikingbrain_train.training.stages.losses import FINE

    voters = [each for each in callbacks_of(config) if type(each).vote is not Callback.vote]
    return [FINE if isinstance(each, BadBatches) else 0 for each in voters]


def selected_by(config: RunConfig, mask: Tensor) -> int:
    """Masks say which tokens experts get, [experts, tokens], which one gets, [tokens], or which of them are
    replicated, [experts]: one."""
    experts = config.model.moe.num_experts
    assert mask.dim() <= 2, f"how many elements of a mask {list(mask.shape)} are true is not known"
    if mask.shape == (experts,):
        return 1
    return mask.shape[-1] * config.model.moe.router_topk // (experts if mask.dim() == 1 else 1)


def _step(
    config: RunConfig, groups: Any, accelerator: Accelerator, findings: Findings, *, is_reported: bool
) -> dict[str, Any]:
    from spikingbrain_train.checkpoint.sharded_state import state_to_save

    size = MICRO_BATCHES * config.stage.micro_batch_size * groups.data_parallel_size
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        config = replace(
            config,
            checkpoint=replace(config.checkpoint, load=None),
            # One step of many, between two reports and behind a ramp of the batch size.
            stage=replace(
                config.stage, train_iters=1000, global_batch_size=size, batch_size_ramp=BatchSizeRampConfig()
            ),
            logging=replace(config.logging, log_interval=1000, tensorboard=False),
            cluster=replace(config.cluster, peak_tflops=1.0),  # else it is measured
            output_dir=folder,
        )
        trainer = trainer_of(config, groups, accelerator)
        model = trainer.model
        whole = batches(config)
        findings.clear()
        trainer.callbacks.start()
        started = findings.as_dict()  # with evaluations of what it starts from
        findings.clear()
        trainer._step(local(each, config, groups) for each in whole)
        found: dict[str, Any] = dict(findings.as_dict())
        if is_reported:
            findings.clear()
            _report(trainer, whole)
            found["report"] = {name: started[name] | later for name, later in findings.as_dict().items()}
        trainer.callbacks.end(None)
        findings.clear()
        saved = state_to_save(trainer.state, groups)
        if is_reported:
            found["pieces"] = _planned(trainer, saved)
            found["save"] = findings.as_dict()
    assert trainer.state.iteration == 1 + is_reported and trainer.stop_reason is None
    named = [*model.named_parameters(), *model.named_buffers()]
    for_cpu = [each.name for each in PATCHES if accelerator.kind not in each.platforms]
    return {
        "off the GPU": [name for name, each in named if not each.is_cuda],
        "patches for CPUs": [name for name in for_cpu if name in patches._applied],
        "saved": len(saved["model"]),
        **found,
    }


def _planned(trainer: Trainer, saved: dict[str, Any]) -> dict[str, int]:
    """What a save does until ranks tell each other of it: all is looked through for NaN, and this rank's part
    of the plan is made. How many pieces of tensors and of other values that has."""
    from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
    from megatron.core.dist_checkpointing.strategies import torch as torch_dist

    from spikingbrain_train.checkpoint.finite_state import first_not_finite_of_run

    state = trainer.state
    state.gather_updated_weights()
    assert first_not_finite_of_run(state.model, state.optimizer, trainer.groups) is None
    sharded, _ = save_preprocess(saved, validate_access_integrity=False)
    sharded, *_ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded, True)
    planner = torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    with mock.patch.object(_remote_device, "device", lambda place: GPU):  # of a shard, read from its name
        planner.set_up_planner(torch_dist.mcore_to_pyt_state_dict(sharded, False))
        items = planner.create_local_plan().items
    return dict(Counter("values" if each.tensor_data is None else "tensors" for each in items))


def _report(trainer: Trainer, whole: list[Any]) -> None:
    """Another step, which is reported, and the evaluation behind it on held-out batches."""
    config, groups = trainer.config, trainer.groups
    logging = replace(config.logging, log_interval=1, eval_interval=1)
    trainer.config = replace(config, logging=logging)
    trainer.data = SimpleNamespace(  # type: ignore[assignment]
        held_out=SimpleNamespace(
            datasets=[],
            num_batches=len(whole),
            batches=lambda: (local(each, config, groups) for each in whole),
        )
    )
    trainer._step(local(each, config, groups) for each in whole)


def trainer_of(config: RunConfig, groups: Any, accelerator: Accelerator) -> Trainer:
    """A run's trainer with its callbacks, whose weights and batches are of no file."""
    from spikingbrain_train.checkpoint.run_checkpoints import RunCheckpoints
    from spikingbrain_train.training import build
    from spikingbrain_train.training.beginning import facts_of, started
    from spikingbrain_train.training.build import kernels_of
    from spikingbrain_train.training.callbacks.callbacks import Callbacks
    from spikingbrain_train.training.callbacks.defaults import callbacks_of
    from spikingbrain_train.training.console import Console
    from spikingbrain_train.training.data_waits import DataWaits
    from spikingbrain_train.training.engines.build import build_engine
    from spikingbrain_train.training.optimizer import build_scheduler
    from spikingbrain_train.training.stages.build import stage_class
    from spikingbrain_train.training.trainer import Trainer
    from spikingbrain_train.training.training_state import TrainingState

    trainer = Trainer.__new__(Trainer)  # its __init__ opens data, and the checkpoint of a teacher
    trainer.config, trainer.groups, trainer.stop_reason = config, groups, None
    trainer.data_waits, trainer.data = DataWaits(), SimpleNamespace(held_out=None)  # type: ignore[assignment]
    trainer.console = Console(
        config.stage.train_iters, config.output_dir, is_main_process=groups.is_main_process
    )
    trainer.checkpoints = RunCheckpoints(config, groups, trainer.say)
    trainer.callbacks = Callbacks(callbacks_of(config), trainer)
    chosen = kernels_of(config, accelerator)
    teacher = dense_teacher(config, groups) if kind_of(config.stage).needs_teacher(config.stage) else None
    trainer.stage = stage_class(config.stage)(config.stage, groups, teacher)
    student = build.build_student(config, chosen, groups)
    trainer.stage.freeze(student)
    trainer.engine = build_engine(config, student, groups)
    trainer.model = trainer.engine.model
    scheduler = build_scheduler(config.optimizer, config.stage.train_iters, trainer.engine.optimizer)
    trainer.state = TrainingState(trainer.engine, scheduler, trainer.callbacks)
    trainer.record = RunRecord(groups.world_size, [])
    trainer.beginning = started(config, facts_of(config, groups.world_size, None))
    return trainer


def batches(config: RunConfig) -> list[Any]:
    shape = (config.stage.micro_batch_size, config.stage.seq_length)
    return [
        {
            "tokens": torch.zeros(shape, dtype=torch.int64, device="cpu"),
            "labels": torch.zeros(shape, dtype=torch.int64, device="cpu"),
            "loss_mask": torch.ones(shape, device="cpu"),
            "cu_seqlens": ((0, shape[1] // 3, shape[1]),) * shape[0]
            if config.data.reset_at_documents
            else None,
            "datasets": None,
            "sequence_seeds": tuple(f"1/{row}" for row in range(shape[0])),
        }
        for _ in range(MICRO_BATCHES)
    ]


def local(whole: Any, config: RunConfig, groups: Any) -> Any:
    return local_micro_batch(
        whole,
        groups.device,
        num_sink_tokens=config.model.num_sink_tokens,
        context_parallel_rank=groups.context_parallel_rank,
        context_parallel_size=groups.context_parallel_size,
    )


def main(runs: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if any(FOLDER in run for run in runs):
            import_module("transformers.modeling_utils")  # which looks for packages that are only played here
            save_small_source(Path(folder))
            write_tasks(Path(folder))
            write_text(Path(folder))
        _main(runs, folder)


def write_text(folder: Path) -> None:
    """Held-out text for prompts, ``text``."""
    from spikingbrain_train.data.indexed import IndexedDatasetWriter
    from spikingbrain_train.data.tokenizers import load_tokenizer

    (folder / "staging").mkdir()
    tokenizer = load_tokenizer(folder)
    writer = IndexedDatasetWriter(folder / "text", tokenizer, folder / "staging")
    writer.add_document(np.asarray(tokenizer.encode(topics["lambda"]), dtype=writer.dtype), text_bytes=1)
    writer.finish()
    writer.publish()


def _main(runs: list[str], folder: str) -> None:
    for run in runs:
        name, *more = run.removesuffix(REPORTED).replace(FOLDER, folder).split()
        config = shortened(composed(name, *more))
        parallel = config.parallel
        ranks = parallel.pipeline_model_parallel_size * parallel.context_parallel_size
        for last in (False, True) if ranks > 1 else (False,):
            # To describe an optimizer, megatron-core looks for garbage: not in what is imported.
            gc.freeze()
            began = time.perf_counter()
            found = step(config, last, is_reported=run.endswith(REPORTED))
            found["seconds"] = round(time.perf_counter() - began, 2)
            print(json.dumps([f"{run}, {'last' if last else 'first'} rank", found]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
