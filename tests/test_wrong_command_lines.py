"""Whatever is wrong with a tool's command line is said in one sentence, with exit code 2, before torch is
imported: in a second instead of the twenty that torch and transformers take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from spikingbrain_train.config.compose import compose_run
from spikingbrain_train.config.load import save_config, to_run_config
from spikingbrain_train.storage.checkpoint_folder import MODEL_CONFIG_FILE

REPOSITORY = Path(__file__).resolve().parents[1]

# Runs one command line after the other as programs in one process, and says how each ended.
RUN_ALL = """
import contextlib, io, json, runpy, signal, sys

def hang(*_):
    raise TimeoutError("it hangs")

signal.signal(signal.SIGALRM, hang)
for line in sys.stdin:
    sys.argv = json.loads(line)
    said, code, modules = io.StringIO(), 0, None
    signal.alarm(60)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        code = repr(error)
    signal.alarm(0)
    print(json.dumps([code, said.getvalue(), "torch" in sys.modules]), flush=True)
"""

EVALUATE = ("evaluate", "--model", "model", "--data", "text")
GENERATE = ("generate", "--model", "model", "--prompt", "x")
IMPORT = ("convert_checkpoint", "import", "--hf", "model", "--output", "out")
RESHARD = ("convert_checkpoint", "reshard", "--checkpoint", "experts", "--output", "out")
AVERAGE = ("convert_checkpoint", "average", "--output", "out", "--checkpoints")
EXPORT = ("export", "--checkpoint", "checkpoint", "--output", "out")
PREPROCESS = ("preprocess_data", "--input", "text.txt", "--tokenizer", "model", "--output-prefix", "out/text")
CHOOSE = ("choose_layers", "--model", "model", "--data", "text", "--output", "out")
SPARSITY = ("analyze_sparsity", "--model", "whole", "--text", "text.txt")
NEURONS = ("bricks", "neurons", "--model", "whole", "--text", "text.txt")
PREDICTORS = ("bricks", "predictors", "--model", "whole", "--text", "text.txt")
ABILITIES = ("bricks", "abilities", "--model", "whole", "--texts")
ANALYZE = ("analyze_spikes", "--model", "whole", "--text", "text.txt")
PROFILE = ("profile_step", "--output", "out")
DEMO = ("demo", "--output", "out", "--model", "model")
BATCH = ("stage.seq_length=64", "stage.train_iters=1", "stage.global_batch_size=1", "dry_run=true")
NUMBERS = ("-1", "0", "nan", "1e999", "many", "", "[1]", "99999999999999999999999")

# (command line, words of the sentence); "model" has no weights, "checkpoint" is empty, "file" is a file
WRONG: list[tuple[tuple[str, ...], str]] = [
    # paths
    (EVALUATE, "model holds no weights in safetensors"),
    (("evaluate", "--model", "nowhere", "--data", "text"), "nowhere is not a folder"),
    (("evaluate", "--model", "broken", "--data", "text"), "broken/config.json cannot be read as JSON"),
    (("evaluate", "--model", "export", "--data", "text"), "add --trust-remote-code"),
    (("evaluate", "--model", "whole", "--data", "nowhere"), "--data=nowhere: there is no nowhere.bin"),
    (("evaluate", "--model", "whole", "--data", "text", "--output", "model"), "--output model is a folder"),
    (("evaluate", "--model", "whole"), "there is nothing to measure; name held-out datasets with --data"),
    (("evaluate", "--model", "whole", "--probes", "nedle"), "--probes names nedle, which is no probe"),
    (
        ("evaluate", "--model", "whole", "--probes", "needle", "--probe-lengths", "4q"),
        "--probe-lengths has 4q",
    ),
    ((*EVALUATE, "--probe-samples", "3"), "--probe-samples is read with --probes only"),
    ((*EVALUATE, "--plot", "x.png"), "--plot x.png would be empty"),
    (("evaluate", "--model", "whole", "--probes", "needle", "--plot", "x.gif"), "ends in none of .png"),
    (
        ("evaluate", "--model", "whole", "--probes", "needle", "--plot", "x.png", "--output", "./x.png"),
        "--plot and --output both name x.png",
    ),
    (("evaluate", "--model", "whole", "--teacher", "whole"), "--teacher whole needs prompts"),
    ((*EVALUATE, "--teacher-prompts", "3"), "--teacher-prompts is read with --teacher only"),
    ((*EVALUATE, "--teacher", "nowhere"), "--teacher nowhere is not a folder"),
    ((*EVALUATE, "--teacher", "whole", "--teacher-new-tokens", "0"), "--teacher-new-tokens is 0"),
    (("evaluate", "--model", "whole", "--data", "text", "--output", "file/x"), "--output=file"),
    (("evaluate", "--model", "checkpoint", "--data", "text"), "neither a Hugging Face folder"),
    (
        ("evaluate", "--model", "whole", "--data", "text", "--parallel", "tp2"),
        "spreads a Megatron",
    ),
    (("evaluate", "--model", "whole", "--data", "text", "parallel=tp2"), "spreads a Megatron"),
    (("evaluate", "--model", "whole", "--data", "text", "--micro-batch-size", "2"), "is for Megatron"),
    (("evaluate", "--model", "whole", "--data", "text", "--nproc-per-node", "2"), "which one process loads"),
    (("generate", "--model", "whole", "--prompt", "x", "--nproc-per-node", "no"), "--nproc-per-node is no"),
    (
        ("evaluate", "--model", "whole", "--data", "text", "--tokenizer", "nowhere"),
        "nowhere does not exist",
    ),
    (("analyze_spikes", "--model", "model", "--text", "text.txt"), "model holds no weights in safetensors"),
    (("analyze_spikes", "--model", "nowhere", "--text", "text.txt"), "--model nowhere is not a folder"),
    (("analyze_spikes", "--model", "whole", "--data", "nowhere"), "--data=nowhere: there is no nowhere.bin"),
    ((*ANALYZE, "--seq-length", "500"), "--seq-length 500 would be padded, and padding counted; g"),
    ((*ANALYZE, "--window", "0"), "--window is 0; give 1 to 32 steps"),
    ((*ANALYZE, "--k", "-1"), "--k has -1; give k above 0"),
    ((*ANALYZE, "--sweep", "3", "nan"), "--sweep has nan; give k above 0"),
    ((*ANALYZE, "--energy-int8-add", "0"), "--energy-int8-add is 0; give pJ above 0, e.g. 0.03"),
    ((*ANALYZE, "--output", "file"), "--output=file"),
    ((*SPARSITY, "--thresholds", "0", "-0.1"), "--thresholds has -0.1; a gate's threshold is at least 0"),
    ((*SPARSITY, "--thresholds", "0.02", "0", "0.02"), "are to rise; give --thresholds 0 0.02"),
    ((*SPARSITY, "--loss-budget", "0.1"), "--loss-budget is read with --fit-threshold only"),
    (
        (*SPARSITY, "--fit-threshold", "--loss-budget", "-1"),
        "--loss-budget is -1; give nats per token of at l",
    ),
    ((*SPARSITY, "--seq-length", "500"), "--seq-length 500 would be padded"),
    ((*SPARSITY, "--output", "file"), "--output=file"),
    ((*NEURONS, "--mask", "50", "100"), "--mask has 100; give percent of at least 0 and below 100"),
    ((*NEURONS, "--output", "file"), "--output=file"),
    ((*PREDICTORS, "--held-out", "39"), "--held-out is 39 of 40 windows; give at least 1, and at least 2"),
    ((*PREDICTORS, "--hidden", "0"), "--hidden is 0; give at least 1"),
    ((*PREDICTORS, "--recall", "1.5"), "--recall has 1.5; give shares above 0 and at most 1"),
    ((*PREDICTORS, "--output", "file"), "--output=file"),
    ((*ABILITIES, "a=text.txt"), "--texts names one ability, and only two or more can be told apart"),
    ((*ABILITIES, "a=text.txt", "text.txt"), "--texts has 'text.txt'; write each as name=file"),
    ((*ABILITIES, "a=text.txt", "a=b.txt"), "--texts names a twice; give each ability one file"),
    ((*ABILITIES, "a=text.txt", "b=text.txt", "--windows", "3"), "--windows is 3; give an even number"),
    ((*ABILITIES, "a=text.txt", "b=text.txt", "--prune", "0"), "--prune is 0; give percent above 0"),
    (CHOOSE, "model holds no weights in safetensors"),
    ((*CHOOSE, "--tokens", "0"), "--tokens is 0"),
    ((*CHOOSE, "--model", "nowhere"), "--model nowhere is not a folder"),
    ((*CHOOSE, "--model", "whole"), "num_attention_heads is missing"),
    (GENERATE, "model holds no weights in safetensors"),
    ((*GENERATE, "--prefill-chunk", "0"), "--prefill-chunk is 0; give at least 1, or leave it out"),
    (("generate", "--model", "nowhere", "--prompt", "x"), "nowhere is not a folder"),
    (("generate", "--model", "whole", "--prompt", ""), "--prompt is empty"),
    (("generate", "--model", "whole", "--prompt", "\udcff"), "--prompt holds bytes that are no UTF-8"),
    (("convert_checkpoint", "import", "--hf", "nowhere", "--output", "out"), "nowhere is not a folder"),
    (("convert_checkpoint", "import", "--hf", "file", "--output", "out"), "file"),
    (("convert_checkpoint", "import", "--hf", "broken", "--output", "out"), "cannot be read as JSON"),
    (("convert_checkpoint", "import", "--hf", "whole", "--output", "file"), "--output file is a file"),
    (("convert_checkpoint", "import", "--hf", "whole", "--output", "model"), "--output model is not empty"),
    (("convert_checkpoint", "import", "--hf", "whole", "--output", "whole/x"), "overlap"),
    (IMPORT, "model.safetensors"),
    ((*IMPORT, "--conversion", "nothing"), "there is no conversion nothing"),
    ((*IMPORT, "--conversion", "broken/config.json.yaml"), "there is no conversion"),
    ((*IMPORT, "seed=3"), "add --conversion"),
    ((*IMPORT, "--plugins", "nowhere.kinds"), "plugins names nowhere.kinds, which cannot be imported"),
    ((*IMPORT, "--plugins", ""), "the command line has plugins=['']"),
    (
        (*IMPORT, "--conversion", "spikingbrain_7b", "plugins=[nowhere]"),
        "plugins names nowhere, which cannot",
    ),
    ((*IMPORT, "--conversion", "spikingbrain_7b", "plugins=3"), "has plugins=3; it takes a list"),
    ((*IMPORT, "--conversion", "spikingbrain_7b", "mixers=[gla_swa]"), "gla_swa is written [gla,swa] now"),
    ((*IMPORT, "--conversion", "spikingbrain_7b", "mixers=[rwkv]"), "rwkv, which is no mixer"),
    ((*IMPORT, "--conversion", "spikingbrain_7b", "feed_forwards=[mo]"), "mo, which is no feed-forward"),
    ((*IMPORT, "--conversion", "dense", "seed"), "name=value"),
    ((*IMPORT, "--conversion", "dense", "seeed=3"), "did you mean seed?"),
    ((*IMPORT, "--conversion", "dense", "mixers=[nothing]"), "mixers"),
    ((*IMPORT, "--conversion", "dense", "mixers=[[gla]]"), "mixers[0]"),
    ((*IMPORT, "--conversion", "dense", "gla=null"), "gla"),
    ((*IMPORT, "--conversion", "dense", "sliding_window=nan"), "sliding_window"),
    (("convert_checkpoint", *EXPORT[:2], "nowhere", "--output", "out"), "nowhere is not a folder"),
    (("convert_checkpoint", "inspect", "nowhere"), "nowhere is not a folder"),
    (("convert_checkpoint", "inspect", "broken"), "cannot be read as JSON"),
    (("convert_checkpoint", "inspect", "checkpoint"), "error: checkpoint is neither a Hugging Face folder"),
    (
        ("convert_checkpoint", "import", "--hf", "other", "--output", "out"),
        "GemmaForCausalLM is not supported",
    ),
    (EXPORT, "latest_checkpointed_iteration.txt"),
    (("convert_checkpoint", "diff", "whole", "nowhere"), "B=nowhere is not a folder"),
    (("convert_checkpoint", "diff", "checkpoint", "whole"), "A=checkpoint is neither a Hugging Face folder"),
    (("convert_checkpoint", "diff", "whole", "model"), "model has neither model.safetensors nor"),
    (
        ("convert_checkpoint", "diff", "whole", "whole", "--tolerance", "nan"),
        "nan is not a number of at least",
    ),
    (("convert_checkpoint", "diff", "whole", "whole", "--top", "-1"), "-1"),
    (("convert_checkpoint", "diff", "whole"), "the following arguments are required: B"),
    ((*RESHARD, "--tp", "0"), "0 is not a whole number of at least 1"),
    ((*RESHARD, "--pp", "3"), "does not divide model.num_layers"),
    ((*RESHARD, "--ep", "3"), "does not divide model.moe.num_experts"),
    ((*RESHARD[:3], "nowhere", *RESHARD[4:]), "nowhere is not a folder"),
    ((*RESHARD[:5], "experts/out"), "overlap"),
    ((*RESHARD[:5], "file"), "--output file is a file"),
    ((*AVERAGE, "whole"), "--checkpoints whole is one checkpoint; name two or more, or add --last N"),
    ((*AVERAGE, "whole", "nowhere"), "--checkpoints=nowhere is not a folder"),
    ((*AVERAGE, "whole", "other", "--weights", "1"), "--weights lists 1 numbers for 2 checkpoints"),
    ((*AVERAGE, "whole", "other", "--weights", "0", "0"), "--weights are all 0"),
    ((*AVERAGE, "whole", "other", "--weights", "1", "-1"), "-1"),
    ((*AVERAGE, "whole", "other", "--ema", "1"), "--ema 1.0 must be between 0 and 1"),
    ((*AVERAGE, "whole", "other", "--ema", "0.5", "--weights", "1", "1"), "not allowed with"),
    ((*AVERAGE, "whole", "other", "--last", "2"), "--last 2 takes checkpoints of one run"),
    (
        (EXPORT[0], EXPORT[1], "experts", *EXPORT[3:], "--format", "gla_swa"),
        "--format gla_swa cannot hold mixture-of-experts layers",
    ),
    (("export", "--checkpoint", "nowhere", "--output", "out"), "nowhere is not a folder"),
    ((*EXPORT, "--max-shard-size", "5XB"), "--max-shard-size 5XB is not a size"),
    (("preprocess_data", "--input", "nowhere", *PREPROCESS[3:]), "nowhere"),
    ((*PREPROCESS[:4], "nowhere", *PREPROCESS[5:]), "there is no tokenizer at nowhere"),
    ((*PREPROCESS[:4], "file", *PREPROCESS[5:]), "file is not a tokenizer"),
    (PREPROCESS, "holds no tokenizer files"),
    ((*PREPROCESS[:6], "out/"), "--output-prefix"),
    ((*PREPROCESS[:6], "text"), "exists already"),
    ((*PREPROCESS, "--workers", "9999999"), "--workers is 9999999"),
    (("plot_metrics", "nowhere"), "nowhere/metrics.jsonl does not exist"),
    (("plot_metrics", "file"), "file"),
    (("demo", "--output", "out", "--model", "nowhere"), "nowhere is not a Hugging Face folder"),
    ((*DEMO, "--align-args", "optimizer.lr=fast"), "optimizer.lr=fast"),
    ((*DEMO, "--budget", "0"), "budget is 0 minutes; give at least 1"),
    (("run_pipeline", "run", "nowhere.yaml"), "nowhere.yaml is not a file"),
    (("run_pipeline", "run", "demoo"), "there is no pipeline demoo"),
    (("run_pipeline", "run", "file.yaml"), "file.yaml"),
    (("run_pipeline", "run", "demo", "output=out", "model=nowhere"), "nowhere is not a Hugging Face folder"),
    (("run_pipeline", "run", "demo", "output=out", "budgt=3"), "did you mean budget?"),
    (("run_pipeline", "run", "demo", "output=file"), "output file is a file"),
    (("run_pipeline", "run", "demo", "output=model"), "was not made by a pipeline"),
    (("run_pipeline", "status", "spikingbrain_7b", "steps.cpt.output=x"), "there is no step cpt"),
    (
        ("run_pipeline", "run", "spikingbrain_7b", "output=out"),
        "model, train, valid, foundational, chat, reasoning have no value",
    ),
    ((*DEMO, "--cpt-args", "stage=null"), "stage=null"),
    ((*DEMO, "--cpt-args", "model=[tiny_hybrid,tiny_76b]"), "model"),
    (("download_smollm2", "--output", "file"), "file"),
    (("download_smollm2", "--output", "checkpoint"), "checkpoint exists"),
    # numbers: some are legal, and the folder is refused
    *(((*EVALUATE, flag, value), "") for flag in ("--seq-length", "--max-windows") for value in NUMBERS),
    *(((*ANALYZE, flag, value), "") for flag in ("--windows", "--k") for value in NUMBERS[:5]),
    *(
        ((*GENERATE, flag, value), "")
        for flag in ("--max-new-tokens", "--temperature", "--top-p", "--seed")
        for value in NUMBERS
    ),
    *(
        ((*PREPROCESS, flag, value), "")
        for flag in ("--workers", "--valid-fraction", "--max-text-chars")
        for value in NUMBERS
    ),
    *(((*EXPORT, "--max-shard-size", value), "") for value in NUMBERS),
    *(((*IMPORT, "--conversion", "dense", f"seed={value}"), "") for value in NUMBERS if value != "0"),
    *(
        ((*PROFILE, flag, value, "seed=1"), "")
        for flag in ("--steps", "--warm-up")
        for value in NUMBERS
        if value != "0"
    ),
    ((*PROFILE, "--steps", "0", "seed=1"), "--steps is 0; give 1 to 100"),
    ((*PROFILE, "--ranks", "1", "seed=1"), "--ranks 1: give all, or numbers from 0 to 0"),
    ((*PROFILE, "--ranks", "first", "seed=1"), "--ranks first: give all, or numbers"),
    (("profile_step", "--output", "file", "seed=1"), "--output=file cannot be a folder"),
    ((*PROFILE, "model=tiny_hybrid", "data.train=[nowhere]", *BATCH[:3]), "nowhere"),
    (PROFILE, ""),
    # flags
    *(((tool, "--nothing"), "") for tool in ("evaluate", "generate", "export", "preprocess_data", "demo")),
    *(((tool,), "") for tool in ("evaluate", "generate", "export", "convert_checkpoint", "plot_metrics")),
    *((("run_pipeline", *rest), "") for rest in ((), ("--nothing",), ("run",), ("walk", "demo"))),
    *((("measure_speed", *rest), "") for rest in ((), ("--nothing",), ("--output", "speed.json"))),
    ((*EVALUATE, "--dtype", "int3"), "invalid choice"),
    ((*GENERATE, "--device", "tpu"), "invalid choice"),
]


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int | str, str, bool]]:
    """How every command line of WRONG ended: (exit code, what it said, whether torch was imported)."""
    folder = tmp_path_factory.mktemp("tools")
    dense = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    export = {"architectures": ["GLAswaForCausalLM"], "auto_map": {"AutoConfig": "x.X"}}
    other = {"architectures": ["GemmaForCausalLM"]}
    folders = {"model": dense, "whole": dense, "export": export, "other": other, "broken": None}
    for name, config in folders.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{" if config is None else json.dumps(config))
    for name in ("whole", "other"):
        (folder / name / "model.safetensors").write_bytes(b"\0" * 8)
    (folder / "experts").mkdir()
    (folder / "experts" / ".metadata").write_text("")
    model = to_run_config(compose_run(["model=tiny_76b", *BATCH])).model
    save_config(replace(model, mixers=["full"], num_sink_tokens=0), folder / "experts" / MODEL_CONFIG_FILE)
    (folder / "checkpoint").mkdir()
    for name in ("file", "text.txt", "text.bin", "text.idx"):
        (folder / name).write_text("text")
    before = sorted(str(path) for path in folder.rglob("*"))
    lines = [json.dumps([str(REPOSITORY / "tools" / f"{tool}.py"), *rest]) for (tool, *rest), _ in WRONG]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input="\n".join(lines),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(str(path) for path in folder.rglob("*")) == before, "something was written"
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(WRONG)), ids=[" ".join(line) for line, _ in WRONG])
def test_a_wrong_command_line_is_one_sentence_without_torch(endings, number: int) -> None:
    code, said, torch = endings[number]
    line, words = WRONG[number]
    assert code == 2, (line, code, said)
    *usage, sentence = said.strip().splitlines()
    assert "error: " in sentence and words in sentence
    assert not usage or usage[0].startswith("usage: "), "more than a sentence"
    assert not torch, "torch was imported first"


@pytest.mark.parametrize("benchmark", ["training_step", "sequence_length", "live_spike_metrics"])
@pytest.mark.parametrize(
    ("model", "hint"),
    [("tiny_hybird", "; did you mean tiny_hybrid?"), ("outputs/x", ";"), ("tiny,hybrid", "")],
)
def test_a_benchmark_says_which_models_there_are(
    benchmark: str,
    model: str,
    hint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [benchmark, "--model", model])
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # else they set it for whatever runs here next
    with pytest.raises(SystemExit) as end:
        import_module(f"benchmarks.{benchmark}").main()
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith(f"error: --model {model} is no choice of conf/model{hint}")
    assert "choose one of bitnet_2b4t, " in said and "from_checkpoint" not in said and said.count("\n") == 1


def test_there_are_a_hundred_of_them() -> None:
    assert len(set(WRONG)) == len(WRONG) >= 100
