"""train.py as a user meets it: help, printed configs, dry runs, one-line errors and exit codes."""

from __future__ import annotations

import errno
import os
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from spikingbrain_train.config.command_line import DIVERGED, USER_ERROR, sentence_of, user_errors
from spikingbrain_train.errors import ConfigurationError, DataError, NumericalError
from tests.programs import Programs

REPOSITORY = Path(__file__).resolve().parents[2]

Train = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def train(programs_without_torch: Programs) -> Train:
    """Run train.py with arguments, in a folder ``cwd`` and with further environment variables."""

    def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        words = [str(REPOSITORY / "tests/config/watched.py"), str(REPOSITORY / "train.py"), *arguments]
        with tempfile.TemporaryDirectory() as elsewhere:  # some see that nothing is written
            done = programs_without_torch.run(words, cwd, said_in=Path(elsewhere), **environment)
        return subprocess.CompletedProcess(words, done.code, done.output, done.errors)

    return run


def errors_of(result: subprocess.CompletedProcess[str], *, with_torch: bool = False) -> list[str]:
    *lines, torch = result.stderr.splitlines()
    assert torch == ("torch imported" if with_torch else "torch not imported")
    # With torch it takes seconds, and says what it is doing.
    return [line for line in lines if not (with_torch and re.fullmatch(r"[^.]+ \.\.\.( \d+s)?", line))]


def test_help_teaches_usage_groups_settings_and_examples(train, tmp_path):
    result = train("--help", cwd=tmp_path, COLUMNS="100")
    assert result.returncode == 0 and errors_of(result) == []
    for expected in (
        "--nproc-per-node",
        "experiment=",
        "dry_run=true",
        "*from_checkpoint, hybrid_1b",
        "seq_length=2048",
        "Peak learning rate",
    ):
        assert expected in result.stdout
    assert "${" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_help_shows_the_values_of_its_command_line(train, tmp_path):
    result = train("model=tiny_hybrid", "stage.seq_length=7", "--help", cwd=tmp_path)
    assert "num_layers=4" in result.stdout and "seq_length=7" in result.stdout


@pytest.mark.parametrize("ask", [["--help=optimizer.lr"], ["--help", "optimizer.lr"], ["-h", "optimizer.lr"]])
def test_help_tells_all_about_one_setting(train, tmp_path, ask):
    result = train(*ask, cwd=tmp_path)
    assert result.returncode == 0 and errors_of(result) == []
    for expected in ("optimizer.lr = 0.0005", "Peak learning rate", "greater than 0", "takes effect"):
        assert expected in result.stdout
    assert "min_lr" not in result.stdout


def test_help_about_a_plugins_section(train, tmp_path):
    result = train("--help=fixed_decay", "plugins=[tests.plugins.fixed_decay]", cwd=tmp_path)
    assert result.returncode == 0 and errors_of(result) == []
    assert "model.fixed_decay.max_slope = from checkpoint.load" in result.stdout
    assert "Slope of the first query group" in result.stdout and "default    0.5" in result.stdout


def test_printing_a_config_without_its_checkpoint_says_where_the_model_comes_from(train, tmp_path):
    result = train("--cfg", "job", "model.sliding_window=3", cwd=tmp_path)
    assert result.returncode == 0 and "${" not in result.stdout
    assert "model:  # what is not listed here is that of the checkpoint in checkpoint.load" in result.stdout
    assert yaml.safe_load(result.stdout)["model"] == {"sliding_window": 3}


def test_printing_the_config_shows_every_section(train, tmp_path):
    result = train("--cfg", "job", "model=tiny_hybrid", cwd=tmp_path)
    assert result.returncode == 0 and errors_of(result) == []
    for expected in ("num_layers: 4", "gate_low_rank_dim: 16", "adam_beta2: 0.95", "output_dir: ???"):
        assert expected in result.stdout


def test_a_dry_run_prints_the_plan_and_one_rank_and_leaves_nothing_behind(train, tmp_path):
    result = train("experiment=spikingbrain_7b_8k", "dry_run=true", "dry_run_rank=31", cwd=tmp_path)
    assert result.returncode == 0 and errors_of(result, with_torch=True) == []
    for expected in (
        *("14 gla + 14 swa", "32 = 8 data x 1 tensor x 4 pipeline", "4,194,304 tokens", "21-27"),
        *("31 of 32: data 7, tensor 0, pipeline 3", "2,176,604,032 built on this rank"),
    ):
        assert expected in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_plans_for_the_ranks_that_were_started(train, tmp_path):
    arguments = ("model=tiny_hybrid", "parallel=tp2", "dry_run=true")
    result = train(*arguments, cwd=tmp_path, RANK="0", LOCAL_RANK="0", WORLD_SIZE="8")
    assert "8 = 4 data x 2 tensor x 1 pipeline" in result.stdout
    assert train(*arguments, cwd=tmp_path, RANK="3", LOCAL_RANK="3", WORLD_SIZE="8").stdout == ""


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--help=optimizer.lrr"], ["optimizer.lrr", "did you mean --help=optimizer.lr?"]),
        (["--help=stag"], ["did you mean --help=stage?"]),
        (["--help=model=tiny"], ["model=tiny", "did you mean tiny_76b?"]),
        (["--help", "model=tiny_hybird"], ["did you mean tiny_hybrid?"]),
        (["optimizer.lrr=1"], ["optimizer.lrr", "did you mean optimizer.lr?"]),
        (["+optimizer.lrr=1", "model=tiny_hybrid"], ["optimizer.lrr", "did you mean optimizer.lr?"]),
        (["parallel.engine=FSDP"], ["parallel.engine=FSDP does not fit", "did you mean fsdp?"]),
        (["fp8.format=hybird"], ["takes one of e4m3, hybrid, or null; did you mean hybrid?"]),
        (["train_iters=3"], ["train_iters", "did you mean stage.train_iters?"]),
        (["modell=tiny_hybrid"], ["modell", "did you mean model?"]),
        (["model=tiny_hybird"], ["model=tiny_hybird", "did you mean tiny_hybrid?", "qwen2_5_7b"]),
        (["precision=fp16"], ["precision=fp16", "fp32, bf16"]),
        (["optimizer.lr=fast"], ["optimizer.lr=fast", "a number"]),
        (["stage.train_iters=null"], ["stage.train_iters=null", "a whole number"]),
        (["model=tiny_hybrid", "stage.teacher=${nowhere}"], ["${...}", "'nowhere' not found"]),
        (["optimizer.lr"], ["'optimizer.lr'", "name=value"]),
        (["data.train=[a"], ["'data.train=[a'", "quotes"]),
        (["--dry_run=true"], ["without dashes", "dry_run=true"]),
        (["conversion=dense"], ["spikingbrain-convert"]),
        (["dry_run=true"], ["checkpoint.load", "null"]),
        (["--cfg", "job", "--resolve", "checkpoint.load=nowhere"], ["checkpoint.load=nowhere"]),
        (
            ["model=tiny_hybrid", "dry_run=true", "parallel.tensor_model_parallel_size=4"],
            ["num_query_groups=2"],
        ),
        (["model=tiny_hybrid", "output_dir=run", "data.train=[nowhere]"], ["nowhere.bin"]),
        (
            ["model=tiny_hybrid", "output_dir=run", "data.train=[a]", "parallel=pp2"],
            ["world size 1", "2 ranks"],
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else None,
)
def test_a_wrong_command_line_is_one_sentence_and_exit_code_2(
    tmp_path, monkeypatch, capsys, arguments, parts
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPOSITORY / "train.py"), run_name="__main__")
    assert end.value.code == USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_run_is_refused_before_anything_slow_is_imported(train, tmp_path):
    result = train("model=tiny_hybrid", "output_dir=run", "data.train=[nowhere]", cwd=tmp_path)
    assert result.returncode == USER_ERROR
    (line,) = errors_of(result)
    assert line.startswith("error: data.train[0]=nowhere")
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_rank_of_a_node_speaks_and_all_end_with_code_2(train, tmp_path):
    ranks = [
        train("precision=fp16", cwd=tmp_path, RANK=rank, LOCAL_RANK=local_rank, WORLD_SIZE="4")
        for rank, local_rank in (("2", "0"), ("3", "1"))
    ]
    assert [rank.returncode for rank in ranks] == [USER_ERROR] * 2
    assert [len(errors_of(rank)) for rank in ranks] == [1, 0]


@pytest.mark.slow
def test_under_torchrun_every_rank_ends_with_an_error_that_is_said_once(tmp_path):
    pytest.importorskip("torch")
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(REPOSITORY / "train.py")]
        + ["model=tiny_hybrid", "output_dir=run", "data.train=[nowhere]"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode != 0
    assert result.stderr.count("error: data.train[0]=nowhere") == 1
    assert "exitcode  : 2" in result.stderr and "exitcode  : -15" not in result.stderr
    assert list(tmp_path.iterdir()) == []


class TestUserErrors:
    @pytest.fixture(autouse=True)
    def no_launcher(self, monkeypatch):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)

    def test_errors_of_ours_become_one_line(self, capsys):
        with pytest.raises(SystemExit) as end, user_errors():
            raise DataError("a.jsonl, line 3:\n  not JSON")
        assert end.value.code == USER_ERROR
        assert capsys.readouterr().err == "error: a.jsonl, line 3: not JSON\n"

    def test_a_run_that_diverged_is_told_from_one_that_is_set_wrongly(self, capsys):
        with pytest.raises(SystemExit) as end, user_errors():
            raise NumericalError("the loss became nan at iteration 7")
        assert end.value.code == DIVERGED != USER_ERROR
        assert capsys.readouterr().err == "error: the loss became nan at iteration 7\n"

    def test_any_rank_may_speak_when_the_others_may_not_know(self, capsys, monkeypatch):
        monkeypatch.setenv("RANK", "3")
        monkeypatch.setenv("LOCAL_RANK", "3")
        with pytest.raises(SystemExit), user_errors():
            raise DataError("no data here")
        assert capsys.readouterr().err == "error: no data here (rank 3)\n"

    def test_defects_keep_their_traceback(self):
        with pytest.raises(ZeroDivisionError), user_errors():
            raise ZeroDivisionError

    def test_a_body_without_errors_goes_on(self):
        with user_errors(same_on_all_ranks=True):
            pass

    def test_it_can_decorate_an_entry_point(self, capsys):
        @user_errors()
        def main() -> None:
            raise ConfigurationError("change this")

        with pytest.raises(SystemExit):
            main()
        assert capsys.readouterr().err == "error: change this\n"

    def test_an_interrupt_is_silent(self, capsys):
        with pytest.raises(SystemExit) as end, user_errors():
            raise KeyboardInterrupt
        assert end.value.code == 130 and capsys.readouterr().err == ""

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.ENOENT, errno.ENOTDIR])
    def test_operating_system_errors_over_a_file_name_it(self, number):
        sentence = sentence_of(OSError(number, os.strerror(number), "runs/a.pt"))
        assert sentence is not None and sentence.startswith(f"runs/a.pt: {os.strerror(number)}; ")

    def test_a_full_disk_needs_no_name(self):
        assert "free some space" in str(sentence_of(OSError(errno.ENOSPC, "No space left on device")))

    def test_other_operating_system_errors_are_defects(self):
        assert sentence_of(OSError(errno.ENOENT, "No such file or directory")) is None
        assert sentence_of(OSError(errno.EBADF, "Bad file descriptor", "a")) is None
