"""Who can read finds everything, who guesses next to nothing; results say where, and what was declared."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from spikingbrain_train.evaluation.probes.measure import measure_probes
from spikingbrain_train.evaluation.probes.plan import ProbePlan
from spikingbrain_train.evaluation.probes.result import ProbeResults
from tests.evaluation.probes import solver
from tests.evaluation.probes.tokenizers import Bytes, Words
from tests.evaluation.written_models import Written, copy

WRITTEN = (
    "passkey",
    "needle",
    "needle_text",
    "needle_uuid",
    "multikey",
    "multikey_lines",
    "variable_tracking",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"Sentence {n} of a text speaks of nothing." for n in range(80)))
    return path


def reader(tokenizer: Bytes | Words) -> Callable[[list[int]], int]:
    """Reads the question in the text so far and writes its answer on."""

    def following(tokens: list[int]) -> int:
        whole = tokenizer.decode(tokens)
        prompt = whole[: whole.rindex(" is" if "What is" in whole else "they are:") + 2]
        if "pass key" in prompt:
            answer = solver.pass_key(prompt)
        elif "VAR" in prompt:
            prompt, answer = whole[: whole.rindex("they are:") + 9], solver.chain(whole)
        else:
            prompt = whole[: whole.rindex("mentioned in the provided text is") + 33]
            answer = solver.needle(prompt)
        if "pass key" in whole:
            prompt = whole[: whole.rindex("The pass key is") + 15]
        rest = (" " + ", ".join(answer))[len(whole) - len(prompt) :]
        return tokenizer.encode(rest + "\n")[0]

    return following


def test_a_reader_finds_everything_by_likelihood_and_in_what_it_writes(text: Path) -> None:
    tokenizer = Words()
    model = Written(reader(tokenizer), tokenizer)
    plan = ProbePlan.of(",".join(WRITTEN), "600", depths="0,60,100", samples=1, scoring="both", text=text)
    results = measure_probes(model, plan)
    for name in WRITTEN:
        total = results.found[name][600].total
        assert total.accuracy == 1.0 and total.written == total.answers, name
        assert total.nats / total.tokens < 0.01
    assert results.metrics() == {f"probes/{name}/600": 1.0 for name in WRITTEN}
    assert results.text is not None and results.text["name"] == str(text)


def test_a_model_that_copies_finds_pass_keys_and_pairs() -> None:
    model = Written(copy, Words())
    results = measure_probes(model, ProbePlan.of("passkey,associative_recall", "512,1k", samples=2))
    assert set(results.metrics().values()) == {1.0}
    by_depth = results.found["associative_recall"][1024].by_depth
    assert sorted(by_depth) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert sum(cell.answers for cell in by_depth.values()) == 64


def test_who_guesses_finds_next_to_nothing(text: Path) -> None:
    def guess(tokens: list[int]) -> int:
        return zlib.crc32(bytes(str(tokens[-8:]), "ascii")) % 256

    plan = ProbePlan.of("all", "2k", depths="50", samples=2, scoring="both", text=text)
    results = measure_probes(Written(guess, Bytes()), plan)
    for name, share in results.metrics().items():
        assert share <= 0.05, name
    total = results.found["needle"][2048].total
    assert (total.answers, total.found, total.written) == (2, 0, 0)


def test_lengths_beyond_the_declared_one_are_one_warning_and_a_mark(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = Written(copy, Words(), max_length=600)
    results = measure_probes(model, ProbePlan.of("passkey,associative_recall", "512,700,1k", samples=1))
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert warning.startswith(
        "warning: probes of 700, 1k are longer than the 600 tokens that the model declares"
    )
    table = results.describe()
    assert "\n512 " in table and "\n700*" in table and "\n1k*" in table
    assert "* beyond the 600 tokens that the model declares" in table


def test_table_and_report_say_length_depth_and_how_it_was_counted() -> None:
    model = Written(copy, Words())
    results: ProbeResults = measure_probes(model, ProbePlan.of("passkey", "512", depths="0,50", samples=2))
    lines = results.describe().splitlines()
    assert lines[0] == "pass key: 5 digits in noise: % of answers that greedy decoding gives, by depth"
    assert lines[1].split() == ["length", "0", "%", "50", "%", "all", "answers", "nats/token"]
    assert lines[3].split()[:5] == ["512", "100", "100", "100", "4"]
    report = results.as_json()
    cell = report["results"]["passkey"]["512"]
    assert cell["accuracy"] == 1.0 and cell["answers"] == 4
    assert {depth: each["answers"] for depth, each in cell["by_depth"].items()} == {"0": 2, "0.5": 2}
    assert (report["seed"], report["samples"], report["scoring"]) == (1234, 2, "likelihood")
    assert report["text"] is None  # no probe of these reads one
