"""Probes ask what their text answers, have the length that was asked for, and repeat with their seed."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spikingbrain_train.errors import ConfigurationError, DataError
from spikingbrain_train.evaluation.probes.haystacks import Text
from spikingbrain_train.evaluation.probes.materials import Materials
from spikingbrain_train.evaluation.probes.names import words
from spikingbrain_train.evaluation.probes.plan import ProbePlan
from spikingbrain_train.evaluation.probes.registry import PROBES
from tests.evaluation.probes import solver
from tests.evaluation.probes.tokenizers import Bytes, Pieces, Words

TEXT = Text(
    " ".join(f"This is sentence {n}, and it says nothing of keys. Is it so?" for n in range(60)), "a text"
)
SOLVERS = {"passkey": solver.pass_key, "variable_tracking": solver.chain}
PIECES = [
    "The",
    " The",
    ". ",
    ".\n",
    "\nWhat",
    " is",
    "is ",
    " is:",
    " 1",
    "12",
    "345",
    " pass key",
    "s for",
    ", A",
    ".\nOne",
]

tokenizers = st.one_of(
    st.just(Bytes()),
    st.builds(Words, space_in_front=st.booleans(), split_digits=st.booleans()),
    st.builds(Pieces, st.lists(st.sampled_from(PIECES), unique=True)),
)


@pytest.mark.parametrize("name", PROBES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    tokenizer=tokenizers,
    length=st.integers(1400, 3000),
    depth=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    begin=st.sampled_from([[], [7]]),
)
def test_text_answers_its_question_and_has_the_length(name, tokenizer, length, depth, seed, begin):
    probe, materials = PROBES[name], Materials(tokenizer, begin, TEXT)
    plan = ProbePlan((probe,), (length,), (depth,), samples=1, seed=seed)
    (sample,) = plan.questions(probe, length, materials)
    assert len(sample.context) + len(sample.continuation) == length
    assert sample.context[: len(begin)] == begin
    spans = [sample.continuation[answer.start : answer.stop] for answer in sample.answers]
    if name == "associative_recall":
        starts = [answer.start for answer in sample.answers]
        assert [span[0] for span in spans] == solver.pairs(sample.context, sample.continuation, starts)
        assert len(set(map(tuple, spans))) == len(spans) >= 2
        return
    prompt = tokenizer.decode(sample.context[len(begin) :])
    answers = [answer.text for answer in sample.answers]
    assert SOLVERS.get(name, solver.needle)(prompt) == answers
    assert [tokenizer.decode(span).strip() for span in spans] == answers
    assert not prompt.endswith(" ")


@pytest.mark.parametrize("name", PROBES)
def test_same_seed_same_questions_whatever_else_is_measured(name):
    probe = PROBES[name]
    alone = ProbePlan((probe,), (2000,), (0.5,), samples=2)
    among = ProbePlan(tuple(PROBES.values()), (1500, 2000), (0.0, 0.5), samples=3)
    first = list(alone.questions(probe, 2000, Materials(Bytes(), text=TEXT)))
    assert first[0] != first[1]
    again = list(among.questions(probe, 2000, Materials(Bytes(), text=TEXT)))
    assert first == again[3 * probe.at_depths :][:2]
    other = ProbePlan((probe,), (2000,), (0.5,), samples=2, seed=7)
    assert first != list(other.questions(probe, 2000, Materials(Bytes(), text=TEXT)))


@pytest.mark.parametrize("name", [name for name, probe in PROBES.items() if probe.at_depths])
def test_needle_lies_at_its_depth(name):
    depths = (0.0, 0.3, 0.5, 1.0)
    probe, tokenizer = PROBES[name], Words()
    plan = ProbePlan((probe,), (6000,), depths, samples=1)
    for depth, sample in zip(
        depths, plan.questions(probe, 6000, Materials(tokenizer, text=TEXT)), strict=True
    ):
        prompt = tokenizer.decode(sample.context)
        head, body = prompt.split(".\n", 1)[0], prompt.rsplit("\n", 1)[0]
        place = prompt.index(sample.answers[0].text)
        # To a piece of the haystack, and the beginning of the needle in front of what it hides.
        assert (place - len(head)) / (len(body) - len(head)) == pytest.approx(depth, abs=0.02)


def test_answers_of_associative_recall_tell_the_depths_of_their_pairs():
    probe = PROBES["associative_recall"]
    plan = ProbePlan((probe,), (2000,), samples=1)
    (sample,) = plan.questions(probe, 2000, Materials(Words(), text=TEXT))
    for answer in sample.answers:
        token = sample.continuation[answer.start]
        assert sample.context.index(token) / len(sample.context) == pytest.approx(answer.depth, abs=0.03)


def test_too_short_a_length_is_refused_with_what_it_takes():
    plan = ProbePlan((PROBES["needle"],), (60,))
    with pytest.raises(ConfigurationError, match=r"probe needle takes at least \d+ tokens .* length of 60"):
        next(plan.questions(PROBES["needle"], 60, Materials(Bytes())))


def test_plan_as_users_write_it():
    plan = ProbePlan.of("needle,passkey,needle", "4k,1K,1000", depths="0,50%,100", samples=3)
    assert [probe.name for probe in plan.probes] == ["needle", "passkey"]
    assert plan.lengths == (1000, 1024, 4096)
    assert plan.depths == (0.0, 0.5, 1.0)
    assert len(ProbePlan.of("all", "1k").probes) == len(PROBES)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"probes": "neddle"}, "--probes names neddle, which is no probe; choose among passkey"),
        ({"lengths": "1g"}, "--probe-lengths has 1g"),
        ({"lengths": ","}, "--probe-lengths is empty"),
        ({"depths": "0,120"}, "--probe-depths has 120"),
        ({"samples": 0}, "--probe-samples is 0"),
        ({"scoring": "luck"}, "--probe-scoring is luck; choose one of likelihood, generation, both"),
    ],
)
def test_wrong_plan_is_refused_by_its_setting(given, said):
    with pytest.raises(ConfigurationError, match=said):
        ProbePlan.of(**{"probes": "needle", "lengths": "1k", **given})


def test_text_without_sentences_is_refused(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("Too short.")
    with pytest.raises(DataError, match=r"short\.txt has 1 sentences"):
        Text.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"short\.txt cannot be read as UTF-8"):
        Text.read(path)


def test_names_do_not_repeat_even_where_pairs_of_words_run_out():
    from random import Random

    for count in (20, 40_000):
        assert len(set(words(count, Random(1)))) == count
