"""docs/metrics.md names what runs report, no more and no less, and how the console shows it."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spikingbrain_train.config.batch_size import BatchSizeRampConfig
from spikingbrain_train.config.linear_transforms import (
    Int8InputsConfig,
    Projection,
    Q8InputsConfig,
    QuantizationConfig,
    SpikingConfig,
    TernaryConfig,
)
from spikingbrain_train.config.model import ActivationFunc, MoEConfig
from spikingbrain_train.config.parallel import ParallelConfig
from spikingbrain_train.config.run import DataConfig, LoggingConfig, RunConfig
from spikingbrain_train.config.stage import DistillationConfig, SparsityConfig, SubNormAnnealingConfig
from spikingbrain_train.parallel.process_groups import ProcessGroups
from spikingbrain_train.reporting.metrics import read_events, read_metrics
from spikingbrain_train.training.callbacks.callback import Callback
from spikingbrain_train.training.report import Report
from tests.distributed.pool import RankPool
from tests.distributed.small_runs import MODEL, MODEL_76B, checkpoint_config, run_config, write_text
from tests.docs.pages import fenced, prose

PAGE = "docs/metrics.md"
NOT_METRICS = {"iteration", "time"}


@dataclass
class Documented:
    """A row of the page."""

    of: set[str]
    """steps, evaluations, start"""
    console: str | None
    """Its label there."""


def documented() -> dict[str, Documented]:
    """The rows of the page's tables of metrics, by name."""
    rows = re.findall(r"^\| `(\w+/[^`]+)` \|([^|]*)\|([^|]*)\|([^|]*)\|[^|]*\|[^|]*\|$", prose(PAGE), re.M)
    assert len({name for name, *_ in rows}) == len(rows), "a name stands there twice"
    found = {}
    for name, _unit, of, console in rows:
        label = re.match(r" `([^`]+)`", console)
        found[name] = Documented(set(of.strip().split(", ")), None if label is None else label[1])
    return found


@dataclass
class Reported:
    """What runs said of a metric."""

    of: set[str] = field(default_factory=set)
    console: str | None = None


class Listen(Callback):
    """Remembers what every report says and shows, by the names of the page."""

    def __init__(self) -> None:
        self.found: dict[str, Reported] = {}

    def log(self, report: Report) -> None:
        of = "steps" if "train/loss" in report.metrics else "evaluations"
        if "align/start/error" in report.metrics:
            of = "start"
        for name in [*report.metrics, *report.heat_maps]:
            reported = self.found.setdefault(_as_documented(name), Reported())
            reported.of.add(of)
            if (shown := report.shown.get(name)) is not None:
                unit = re.sub(r"{[^}]*}", "", shown.format).strip()  # of what has no label
                reported.console = shown.label or unit


def _as_documented(name: str) -> str:
    name = re.sub(r"layer_\d+$", "layer_<n>", name)
    return re.sub(r"^valid/cross_entropy/.*", "valid/cross_entropy/<name>", name)


def _listen(groups: ProcessGroups, config: RunConfig) -> tuple[dict[str, Reported], str]:
    from spikingbrain_train.training.trainer import Trainer

    listen = Listen()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        Trainer(config, groups, [listen]).train()
    return listen.found, printed.getvalue()


@dataclass
class Runs:
    """Runs that report everything that there is."""

    folder: Path
    found: dict[str, Reported]
    printed: str


@pytest.fixture(scope="module")
def runs(
    ranks: RankPool,
    tmp_path_factory: pytest.TempPathFactory,
    text: Path,
    hybrid_checkpoint: Path,
    hybrid_76b_checkpoint: Path,
    dense_checkpoint: Path,
) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    short = str(
        write_text(folder, lines=6)
    )  # of the eight windows of an evaluation, four are of a second one

    def config(name: str, load: Path | None, **changes: object) -> RunConfig:
        run = run_config(folder / name, text, checkpoint=checkpoint_config(load), **changes)
        run.stage = replace(run.stage, train_iters=2, teacher=str(dense_checkpoint))
        run.optimizer.lr_warmup_iters = 0
        run.logging = LoggingConfig(log_interval=1, eval_iters=2, tensorboard=True)
        run.data = DataConfig(train=[str(text)], valid=[str(text)], source_tokens=1e6)
        return run

    align = config("align", hybrid_checkpoint)
    align.stage.kind = "align"
    spiking_model = replace(
        MODEL,
        spiking=SpikingConfig(list(Projection), k=3.0),
        quantization=QuantizationConfig([Projection.qkv], group_size=8),
    )
    spiking = config("spiking", hybrid_checkpoint, model=spiking_model)
    spiking.stage.kind = "distill"
    spiking.stage.distillation = DistillationConfig(weight=0.5)
    spiking.data.valid = [short, short]
    moe = MoEConfig(num_experts=4, router_topk=1, num_shared_experts=1, capacity_factor=1.0)
    in_experts = [Projection.mlp_fc1, Projection.mlp_fc2]
    bitnet = replace(
        MODEL_76B,
        moe=moe,
        int8_inputs=Int8InputsConfig(in_experts),
        q8_inputs=Q8InputsConfig([Projection.qkv]),
        ternary=TernaryConfig(in_experts),
    )
    spread = ParallelConfig(expert_model_parallel_size=2, replicate_expert_load=1.0)
    experts = config("experts", hybrid_76b_checkpoint, model=bitnet, parallel=spread)

    zeros = config("zeros", hybrid_checkpoint, model=replace(MODEL, activation_func=ActivationFunc.relu))
    zeros.stage.sparsity = SparsityConfig([0.1], [2])
    zeros.stage.batch_size_ramp = BatchSizeRampConfig(start=2, samples=2)

    norms = config("norms", None, model=replace(MODEL, ffn_sub_norm=True))
    norms.stage.sub_norm_annealing = SubNormAnnealingConfig(2)

    all_found: dict[str, Reported] = {}
    all_printed = ""
    for each in (align, spiking, experts, zeros, norms):
        size = each.parallel.expert_model_parallel_size
        (found, printed), *_ = ranks.run(_listen, each, world_size=size, parallel=each.parallel)
        all_printed += printed
        for name, reported in found.items():
            known = all_found.setdefault(name, Reported())
            known.of |= reported.of
            known.console = reported.console or known.console
    return Runs(folder, all_found, all_printed)


def test_every_metric_is_documented_and_every_documented_one_exists(runs: Runs) -> None:
    assert set(runs.found) == set(documented())


def test_the_page_says_when_a_metric_is_reported_and_how_the_console_shows_it(runs: Runs) -> None:
    page = documented()
    assert {name: each.of for name, each in runs.found.items()} == {name: page[name].of for name in page}
    shown = {name: each.console for name, each in runs.found.items()}
    assert shown == {name: page[name].console for name in page}
    lines = [line for line in runs.printed.splitlines() if line.startswith("iteration")]
    for label in filter(None, shown.values()):
        assert any(f"| {label} " in f"{line} " or f" {label} |" in f"{line} |" for line in lines), label


@pytest.mark.parametrize("run", ["align", "spiking", "experts", "zeros"])
def test_file_and_tensorboard_have_the_same_names(run: str, runs: Runs) -> None:
    events = EventAccumulator(str(runs.folder / run / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"]) | set(events.Tags()["images"])
    assert tags == {name for point in read_metrics(runs.folder / run) for name in point} - NOT_METRICS


def test_the_page_names_every_key_of_an_event(runs: Runs) -> None:
    (started,) = read_events(runs.folder / "align")
    keys = {key for key in started if key != "run"} | {f"run.{key}" for key in started["run"]} | {"changed"}
    table = prose(PAGE).partition("| key | what it is |")[2].partition("\n\n")[0]
    first_columns = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert {key for column in first_columns for key in re.findall(r"`([^`]+)`", column)} == keys


def test_the_lines_for_pandas_work(
    runs: Runs, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pandas")
    ((_, block),) = fenced(PAGE, "python")
    namespace: dict = {}
    exec(block.replace("outputs/smollm2/cpt", str(runs.folder / "experts")), namespace)
    points = read_metrics(runs.folder / "experts")
    assert len(namespace["points"]) == len(points)
    assert namespace["loss"].tolist() == [point["train/loss"] for point in points if "train/loss" in point]
    assert list(namespace["layers"]) == [f"moe/load_max_over_mean/layer_{layer}" for layer in (1, 3)]
    assert capsys.readouterr().out.splitlines()[-1] == "0 started {}"
