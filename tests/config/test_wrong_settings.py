"""Whatever is written behind train.py, it starts or ends with one sentence and exit code 2: no traceback, no
hang, nothing on disk, no torch."""

from __future__ import annotations

import contextlib
import io
import runpy
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spikingbrain_train.config.command_line import USER_ERROR
from spikingbrain_train.config.run import RunConfig
from spikingbrain_train.config.schema import setting_types

REPOSITORY = Path(__file__).resolve().parents[2]
# A run that would start.
VALID = (
    *("model=tiny_hybrid", "cluster=cpu", "precision=fp32", "data.train=[text]", "output_dir=run"),
    *("stage.train_iters=4", "stage.seq_length=64", "stage.global_batch_size=2"),
)
SECONDS = 30  # composing takes a fifth of one; the rest is for busy machines


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A function that runs train.py in this process and returns its sentence, or None if it would train."""
    folder = tmp_path_factory.mktemp("run")
    for suffix in (".bin", ".idx"):
        (folder / f"text{suffix}").write_bytes(b"\0")
    share = types.SimpleNamespace(render=lambda: "")

    def hang(*_: object) -> None:
        raise TimeoutError("the check hangs")

    def run(*arguments: str) -> str | None:
        errors = io.StringIO()
        signal.signal(signal.SIGALRM, hang)
        signal.alarm(SECONDS)
        try:
            patch.setattr(sys, "argv", ["train.py", *VALID, *arguments])
            with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
                runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")
        except SystemExit as end:
            assert end.code == USER_ERROR, f"{arguments} ends with {end.code}"
            (line,) = errors.getvalue().splitlines()
            assert line.startswith("error: ") and len(line) < 1000
            return line.removeprefix("error: ")
        finally:
            signal.alarm(0)
            assert sorted(path.name for path in folder.iterdir()) == ["text.bin", "text.idx"]
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        # What comes after the checks brings torch.
        trainer = types.SimpleNamespace(run=lambda config: None)
        patch.setitem(sys.modules, "spikingbrain_train.training.trainer", trainer)
        patch.setattr("spikingbrain_train.training.trainer", trainer, raising=False)
        dry_run = types.SimpleNamespace(build_share=lambda plan: share)
        patch.setitem(sys.modules, "spikingbrain_train.training.dry_run", dry_run)
        yield run


def test_the_valid_run_would_train(outcome) -> None:
    assert outcome() is None


GROUPS = ("model", "parallel", "cluster", "data", "optimizer", "stage", "logging")
HUGE = "99999999999999999999999"
WRONG = [
    # a group takes one choice
    *(f"{group}=null" for group in GROUPS),
    *(f"{group}=7" for group in GROUPS),
    *(f"~{group}" for group in GROUPS),
    *("model=[tiny_hybrid,tiny_76b]", "stage=[cpt,align]", "parallel=[]", "logging=[default]"),
    *("experiment=[smollm2_align,smollm2_cpt]", "experiment=3", "model=true", "optimizer=0.5"),
    # Hydra's own affairs
    *("hydra.mode=MULTIRUN", "hydra.run.dir=elsewhere", "hydra/launcher=basic", "hydra.output_subdir=x"),
    *("optimizer.lr=1,2", "optimizer.lr=range(1,3)", "--resolve", "--shell-completion", "=1", "a"),
    # texts and lists
    *("output_dir=", "output_dir=' '", "data.tokenizer=''", "data.train=['']", "checkpoint.load=''"),
    *("data.train=[[text]]", "data.train=text", "data.train=[]", "data.valid=[nowhere]"),
    *("model.mixers=[gla,[swa]]", "model.mixers=[]", "model.mixers=[nothing]", "model.feed_forwards=[{}]"),
    *("data.train=[{prefix: a, weight: nan}]", "data.train=[{prefix: a, weight: -1}]", "data.train=[{}]"),
    *("data.train=[a,{prefix: b, weight: 1}]", "data.train=[a,a]", "data.train_weights=[1]"),
    *("callbacks=7", "callbacks=[7]", "callbacks=[nowhere.at.All]", "callbacks=[os.path.join]"),
    *("callbacks=[{path: a.B, more: 1}]", "logging.evaluators=[[a.B]]", "logging.evaluators=a.B"),
    # numbers
    *(f"stage.train_iters={value}" for value in ("0", "-1", "1.5", "nan", "many", "[4]", "null", HUGE)),
    *(f"optimizer.lr={value}" for value in ("0", "-1", "nan", "inf", "-inf", "fast", "[1]", "null")),
    *("stage.micro_batch_size=0", "stage.micro_batch_size=3", "stage.global_batch_size=0"),
    *("stage.seq_length=0", "stage.seq_length=999999", "optimizer.min_lr=1", "optimizer.adam_beta1=1"),
    *("optimizer.adam_eps=0", "optimizer.clip_grad=-1", "optimizer.lr_warmup_iters=4"),
    *("optimizer.lr_wsd_decay_iters=2", "optimizer.lr_decay_style=WSD", "seed=-1", "seed=4294967296"),
    *("stage.alignment.calibration_tokens=-1", "stage.alignment.calibration_ridge=-1"),
    *("stage.alignment.calibration_ridge=0", "stage.distillation.weight=2", "stage.distillation.weight=0.5"),
    *("cluster.timeout_minutes=0", "cluster.timeout_minutes=1e30", "cluster.peak_tflops=0"),
    *("checkpoint.keep_last=0", "checkpoint.save_interval=0", "logging.eval_interval=-1"),
    *("data.num_workers=-1", "data.num_workers=9999999", f"data.num_workers={HUGE}"),
    # the network
    *(f"model.num_layers={value}" for value in ("0", "-4", "1001", "999999999", HUGE)),
    *("model.num_attention_heads=3", "model.num_attention_heads=4294967290", "model.kv_channels=15"),
    *("model.hidden_size=999999999", "model.vocab_size=4294967290", "model.spiking.k=0"),
    *("model.gla.gate=tied", "model.rope_scaling.factor=0.5", "model.num_sink_tokens=-1"),
    *("model.moe.num_experts=0", "model.moe.router_topk=99", "model.moe.pad_to_capacity=true"),
    # ranks
    *("parallel=tp2", "parallel.data_parallel_size=2", "parallel.sequence_parallel=true"),
    *("parallel.overlap_param_gather=true", "parallel.expert_model_parallel_size=2"),
    *("parallel.pipeline_model_parallel_size=0", "parallel.context_parallel_size=-1"),
    *("cluster.kernels.gated_linear_attention=fla", "cluster.accelerator=tpu"),
    *("cluster.kernels.gated_linear_attention=recurrent", "cluster.kernels.softmax_attention=reference"),
]


@pytest.mark.parametrize("argument", WRONG)
def test_a_wrong_setting_is_one_sentence(outcome, argument: str) -> None:
    sentence = outcome(argument)
    assert sentence is not None, f"{argument} was accepted"
    name = argument.lstrip("~-").partition("=")[0]
    # Large models are refused for their size, in which several settings meet.
    assert name.lstrip("-") in sentence or "GiB of memory" in sentence or argument.startswith("--")


def test_there_are_a_hundred_of_them() -> None:
    assert len(set(WRONG)) == len(WRONG) >= 100


SETTINGS = [name for name, _ in setting_types(RunConfig)]
SCALARS = st.one_of(
    st.sampled_from(["null", "true", "nan", "-inf", "''", "abc", "{}", "{a:1}", "${nowhere}", "1e-400"]),
    st.integers(-(10**24), 10**24).map(str),
    st.floats().map(repr),
    st.text("abc xyz_/.-0", max_size=8).map(lambda text: f"'{text}'"),
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3).map(lambda items: f"[{','.join(items)}]")


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(SETTINGS), VALUES)
def test_any_value_of_any_setting_is_taken_or_refused_with_a_sentence(outcome, name: str, value: str) -> None:
    outcome(f"{name}={value}")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "29500"}, "RANK=5"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "missing: MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE=0"),
    ],
    ids=["rank beyond the world", "half a launcher", "empty world"],
)
def test_a_wrong_environment_is_one_sentence(outcome, monkeypatch, variables, words: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    sentence = outcome("parallel.data_parallel_size=null")
    assert sentence is not None and words in sentence
