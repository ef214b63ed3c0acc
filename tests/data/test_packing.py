"""Training samples of one domain, and of long documents first. Tokens are their positions in the file."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spikingbrain_train.config.run import DataConfig, LongDocumentsConfig, RunConfig
from spikingbrain_train.config.run_record import fingerprint, training_data_of
from spikingbrain_train.data.domains import Domains
from spikingbrain_train.data.gpt_dataset import TrainDataset, build_datasets
from spikingbrain_train.data.packing import statistics
from spikingbrain_train.data.packing.layout import LONG, SHORT, WHOLE, Packing, lay_out
from spikingbrain_train.data.packing.packed_documents import PackedDocuments, positions_of_whole
from spikingbrain_train.data.packing.section import packing_section
from spikingbrain_train.data.packing.statistics import packing_statistics
from spikingbrain_train.data.sample import Sample
from spikingbrain_train.data.token_file import TokenFile
from spikingbrain_train.errors import DataError
from tests.data.conftest import WriteTokens
from tests.data.preprocess_command import exit_code_of
from tests.planning.runs import plan_of

SEQ = 8
LENGTHS = [3, 30, 5, 9, 8, 2, 17, 40, 4, 6, 1, 25, 7, 3, 12]
DOMAINS = ["a", "b", "a", "a", "b", "b", "a", "b", "a", "b", "a", "a", "b", "a", "c"]
STARTS = np.concatenate(([0], np.cumsum(LENGTHS)))
DOCUMENT = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
"""Of each token."""
PINNED = [160, 3, 90, 52, 125, 74, 65, 30]
"""First tokens of the first samples of `corpus` with seed 1234, by domain and with half of them long."""


def write(write_tokens: WriteTokens, lengths: list[int], domains: list[str] | None, name: str = "d") -> str:
    starts = np.concatenate(([0], np.cumsum(lengths)))
    documents = [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]
    return write_tokens(name, documents, domains=domains)


@pytest.fixture
def corpus(write_tokens: WriteTokens) -> str:
    return write(write_tokens, LENGTHS, DOMAINS)


def packed(prefix: str, packing: Packing, *, seed: int = 1234, apart: bool = False) -> PackedDocuments:
    return PackedDocuments(TokenFile(prefix), packing, (seed, 0), reset_at_documents=apart)


def epoch(part: PackedDocuments, number: int = 0) -> list[np.ndarray]:
    """Tokens and last label of each sample."""
    count = part.windows_per_epoch
    return [whole(part.sample(index)) for index in range(number * count, (number + 1) * count)]


def whole(sample: Sample) -> np.ndarray:
    return np.append(sample["tokens"].numpy(), sample["labels"].numpy()[-1])


def data(prefix: str, share: float | None = None, **changes: object) -> DataConfig:
    long = LongDocumentsConfig(share=share)
    return DataConfig(train=[prefix], pack_by_domain=True, long_documents=long, **changes)  # type: ignore[arg-type]


def train(config: DataConfig, samples: int, **changes: object) -> TrainDataset:
    return build_datasets(config, SEQ, samples, **changes)[0]  # type: ignore[arg-type]


def test_a_sample_is_of_one_domain_and_an_epoch_reads_each_label_once(corpus: str) -> None:
    part = packed(corpus, Packing(SEQ, by_domain=True))
    for number in (0, 1):
        samples = epoch(part, number)
        for sample in samples:
            assert len({DOMAINS[document] for document in DOCUMENT[sample]}) == 1
        labels = np.concatenate([sample[1:] for sample in samples])
        assert len(set(labels.tolist())) == len(labels)
        for domain in ("a", "b"):  # c has 12 tokens: one sample
            tokens = sum(n for n, of in zip(LENGTHS, DOMAINS, strict=True) if of == domain)
            read = [s for s in samples if DOMAINS[DOCUMENT[s[0]]] == domain]
            assert len(read) == (tokens - 1) // SEQ
    assert [s.tolist() for s in epoch(part, 0)] != [s.tolist() for s in epoch(part, 1)]


def test_neighbours_of_a_domain_stay_neighbours(corpus: str) -> None:
    """The stream of a domain is its documents as they lie on disk; a sample is a stretch of it."""
    stream = np.concatenate([np.flatnonzero(n == DOCUMENT) for n, of in enumerate(DOMAINS) if of == "a"])
    for sample in epoch(packed(corpus, Packing(SEQ, by_domain=True))):
        if DOMAINS[DOCUMENT[sample[0]]] == "a":
            at = int(np.flatnonzero(stream == sample[0])[0])
            assert sample.tolist() == stream[at : at + SEQ + 1].tolist()


def test_long_documents_are_cut_on_their_own_and_their_rests_are_short_documents(corpus: str) -> None:
    part = packed(corpus, Packing(SEQ, by_domain=True, long_share=0.0))
    samples = epoch(part)
    firsts = {int(sample[0]) for sample in samples}
    for start, length in zip(STARTS, LENGTHS, strict=False):
        if length > SEQ:
            assert {int(start) + SEQ * n for n in range((length - 1) // SEQ)} <= firsts
    in_one = [sample for sample in samples if len(set(DOCUMENT[sample])) == 1]
    assert len(in_one) >= sum((length - 1) // SEQ for length in LENGTHS)
    masks = [part.sample(index)["loss_mask"].numpy() > 0 for index in range(len(samples))]
    labels = np.concatenate([sample[1:][mask] for sample, mask in zip(samples, masks, strict=True)])
    assert len(set(labels.tolist())) == len(labels)


@pytest.mark.parametrize(("share", "repeats", "expected"), [(0.5, 9, 0.5), (0.9, 2, None), (1.0, 99, 1.0)])
def test_long_documents_are_read_more_often_in_each_domain_alike(
    share: float, repeats: float, expected: float | None
) -> None:
    lengths = np.array(([100] * 4 + [5] * 400) * 2 + [6] * 300)
    domains = np.repeat([0, 1, 2], [404, 404, 300]).astype(np.uint16)
    pools = lay_out(lengths, domains, Packing(10, True, share, None, repeats)).pools
    natural = lay_out(lengths, domains, Packing(10, True)).pools
    for domain in (0, 1):
        mine = pools.domain == domain
        samples = dict(zip(pools.kind[mine].tolist(), pools.samples[mine].tolist(), strict=True))
        quota = dict(zip(pools.kind[mine].tolist(), pools.quota[mine].tolist(), strict=True))
        assert samples[WHOLE] == 4 * 9
        # A domain keeps its number of samples, but for what its streams leave over.
        assert abs(sum(quota.values()) - int(natural.quota[domain])) <= 1
        if expected is None:
            assert quota[WHOLE] == repeats * samples[WHOLE]
        else:
            assert quota[WHOLE] == round(expected * sum(quota.values()))
    (short,) = np.flatnonzero(pools.domain == 2)  # has no long documents, and stays as it is
    assert pools.kind[short] == SHORT and pools.quota[short] == pools.samples[short] == (1800 - 1) // 10


def test_a_pool_that_is_read_more_often_is_gone_through_before_it_is_read_again(
    write_tokens: WriteTokens,
) -> None:
    lengths = [41, 41] + [5] * 60
    part = packed(write(write_tokens, lengths, None), Packing(SEQ, False, 0.5))
    long = [sample[0] for n in range(3) for sample in epoch(part, n) if sample[-1] < 82]
    per_epoch = len(long) // 3
    assert per_epoch > 10 and len(long) == 3 * per_epoch
    seen = np.unique(long, return_counts=True)[1]
    assert len(seen) == 10 and seen.max() - seen.min() <= 1  # whole passes, and part of one


def test_documents_shorter_than_a_sample_can_count_as_long() -> None:
    lengths = np.array([6] * 50 + [2] * 100)
    layout = lay_out(lengths, None, Packing(SEQ, False, 0.5, min_tokens=6))
    assert layout.pools.kind.tolist() == [LONG, SHORT]
    assert layout.pools.samples.tolist() == [(300 - 1) // SEQ, (200 - 1) // SEQ]
    # 7 long documents fill one sample; 1 does not, and is read among the short ones.
    alone = lay_out(np.array([6] + [2] * 100), None, Packing(SEQ, False, 0.5, min_tokens=6))
    assert alone.pools.kind.tolist() == [SHORT] and int(alone.pools.tokens[0]) == 206


def test_samples_are_a_function_of_seed_and_index(corpus: str) -> None:
    config = data(corpus, share=0.5)
    run, again = train(config, 90), train(config, 90)
    order = [whole(run[index]).tolist() for index in range(90)]
    shuffled = np.random.RandomState(0).permutation(90)
    assert [whole(again[int(index)]).tolist() for index in shuffled] == [order[index] for index in shuffled]
    assert [whole(train(config, 40)[index]).tolist() for index in range(40)] == order[:40]
    other = train(config, 90, seed=7)
    assert [whole(other[index]).tolist() for index in range(90)] != order


def test_the_order_is_pinned(corpus: str) -> None:
    # A checkpoint stores consumed_samples only: were this to change, resumed runs would see other data.
    dataset = train(data(corpus, share=0.5), 8)
    assert [int(dataset[index]["tokens"][0]) for index in range(8)] == PINNED


def test_documents_can_be_kept_apart(corpus: str) -> None:
    part = packed(corpus, Packing(SEQ, True, 0.0), apart=True)
    joined = packed(corpus, Packing(SEQ, True, 0.0))
    masked = 0
    for index in range(part.windows_per_epoch):
        sample, tokens = part.sample(index), whole(part.sample(index))
        new = np.flatnonzero((np.diff(tokens) != 1) | np.isin(tokens[1:], STARTS)) + 1
        assert sample["cu_seqlens"].tolist() == [0, *new[new < SEQ].tolist(), SEQ]
        expected = np.ones(SEQ)
        expected[new - 1] = 0
        assert sample["loss_mask"].tolist() == expected.tolist()
        # Without it only the middle of a document carries no loss where it follows another one.
        rests = [at for at in new if tokens[at] not in STARTS]
        mask = joined.sample(index)["loss_mask"].numpy()
        assert np.flatnonzero(mask == 0).tolist() == [at - 1 for at in rests]
        masked += len(rests)
    assert masked > 0


def test_blends_compose_and_held_out_data_stay_as_they_are(corpus: str, write_tokens: WriteTokens) -> None:
    plain = write(write_tokens, [200], None, name="plain")  # stores no domains: it is one
    config = data(corpus, share=0.5, valid=[corpus])
    config = replace(config, train=[{"prefix": corpus, "weight": 1}, {"prefix": plain, "weight": 3}])
    blend, valid = build_datasets(config, SEQ, 80)
    assert blend.samples_per_part() == [20, 60]
    assert valid is not None
    unpacked = build_datasets(DataConfig(train=[corpus], valid=[corpus]), SEQ, 8)[1]
    assert unpacked is not None and len(valid) == len(unpacked)
    for index in range(len(valid)):
        assert whole(valid[index]).tolist() == whole(unpacked[index]).tolist()


def test_a_dataset_without_a_long_enough_domain_is_refused(write_tokens: WriteTokens) -> None:
    prefix = write(write_tokens, [5, 5, 5], ["a", "b", "c"])
    with pytest.raises(DataError, match=r"no domain of the train dataset .*d has 9 tokens"):
        train(data(prefix), 1)
    assert packing_statistics(prefix, Packing(SEQ, True)).left_out == 15


def test_other_domains_are_other_data_to_a_run_that_packs_by_them(corpus: str) -> None:
    config = RunConfig(data=data(corpus))
    before, by_tokens = training_data_of(config), fingerprint(corpus)
    np.save(f"{corpus}.domains.npy", np.zeros(len(LENGTHS), dtype=np.uint16))
    assert training_data_of(config) != before and fingerprint(corpus) == by_tokens
    assert "domains" in before[0].describe() and "domains" not in by_tokens.describe()


PACKINGS = st.builds(
    Packing,
    st.integers(1, 12),
    st.booleans(),
    st.sampled_from([None, 0.0, 0.3, 1.0]),
    st.sampled_from([None, 1, 3, 99]),
    st.sampled_from([1.0, 4.0]),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), min_size=1, max_size=30), PACKINGS)
def test_statistics_are_those_of_the_samples(documents: list[tuple[int, int]], packing: Packing) -> None:
    """Against the samples themselves, each document's place followed by hand."""
    length = packing.seq_length
    lengths = np.array([each for each, _ in documents], dtype=np.int32)
    domains = np.array([domain for _, domain in documents], dtype=np.uint16)
    layout = lay_out(lengths, domains if packing.by_domain else None, packing)
    found, pools = _statistics_of(lengths, domains, packing), layout.pools
    document = np.repeat(np.arange(len(lengths)), lengths)
    counts, weights, seen = [], [], np.zeros(lengths.sum(), dtype=int)
    for pool in range(len(pools.quota)):
        for window in range(int(pools.samples[pool])):
            pieces = list(layout.actual(_position(layout, pool, window), length + 1))
            tokens = np.concatenate([np.arange(first, first + count) for first, count, _ in pieces])
            assert len(tokens) == length + 1
            if packing.by_domain:
                assert set(domains[document[tokens]]) == {pools.domain[pool]}
            followed = [np.arange(first + rest, first + count) for first, count, rest in pieces[1:]]
            seen[np.concatenate([np.arange(pieces[0][0] + 1, sum(pieces[0][:2])), *followed])] += 1
            counts.append(len(np.unique(document[tokens[:-1]])))
            weights.append(pools.quota[pool] / pools.samples[pool])
    assert seen.max(initial=0) <= 1  # a label with loss, once
    assert found.samples == sum(pools.quota)
    if counts:
        assert found.documents_per_sample == pytest.approx(np.average(counts, weights=weights))
        assert found.most_documents == max(counts)
    in_streams = sum(_tokens_in_streams(int(each), packing) for each in lengths)
    streams = pools.kind != WHOLE
    assert found.left_out == in_streams - pools.tokens[streams].sum()
    assert found.left_over == sum(
        int(tokens) - 1 - length * int(samples)
        for tokens, samples in zip(pools.tokens[streams], pools.samples[streams], strict=True)
    )
    assert all(0 <= share <= 1 for share in (found.full, found.full_in_samples, found.half_in_samples))
    assert found.full == pytest.approx(lengths[lengths >= length].sum() / max(lengths.sum(), 1))


def _tokens_in_streams(length: int, packing: Packing) -> int:
    if packing.long_share is None or length <= packing.seq_length:
        return length
    rest = (length - 1) % packing.seq_length + 1
    return rest if rest > 1 else 0


def _position(layout, pool: int, window: int) -> int:
    if layout.pools.kind[pool] != WHOLE:
        return int(layout.pools.begin[pool]) + window * layout.packing.seq_length
    return int(positions_of_whole(layout, pool, np.array([window]))[0])


def _statistics_of(lengths: np.ndarray, domains: np.ndarray, packing: Packing):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "document_lengths", lambda prefix: (np.dtype("uint16"), lengths))
        patch.setattr(statistics, "read_domains", lambda prefix, documents: Domains(["a", "b", "c"], domains))
        patch.setattr(statistics, "_CHUNK_DOCUMENTS", 7)
        return packing_statistics("x", packing)


def test_ways_to_pack_stand_beside_each_other(corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(["--describe", corpus, "--seq-length", str(SEQ)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (share,) = (line for line in lines if line.startswith("... data.long_documents.share=0.5"))
    expected = packing_statistics(corpus, Packing(SEQ, True, 0.5))
    assert share.split()[2:5] == [
        str(expected.samples),
        f"{expected.documents_per_sample:.1f}",
        f"{expected.of_one_document:.1%}",
    ]
    for domain in "abc":
        documents = [n for n, of in zip(LENGTHS, DOMAINS, strict=True) if of == domain]
        assert any(line.split()[:3] == [domain, str(len(documents)), str(sum(documents))] for line in lines)
    assert exit_code_of(["--describe", corpus, "--seq-length", str(SEQ), "--json"]) == 0
    (ways,) = json.loads(capsys.readouterr().out)["packing"]
    assert [way["samples"] for way in ways["ways"]][-1] == expected.samples
    assert ways["ways"][1]["settings"] == "data.pack_by_domain=true"


def test_a_plan_says_what_samples_are_made_of_and_what_is_odd(corpus: str, write_tokens: WriteTokens) -> None:
    small = write(write_tokens, [60, 7, 7], ["a", "b", "c"], name="small")
    settings = f"model=tiny_hybrid stage.seq_length={SEQ} stage.train_iters=2 data.pack_by_domain=true"
    once = "data.long_documents.max_repeats=1"
    plan = plan_of(settings, f"data.train=[{corpus},{small},/absent] data.long_documents.share=0.99 {once}")
    section = packing_section(plan)
    assert section is not None
    found, odd = section.facts["datasets"], section.facts["warnings"]
    assert [each["prefix"] for each in found] == [corpus, small]
    assert found[0] == packing_statistics(corpus, Packing(SEQ, True, 0.99, None, 1.0)).as_values()
    assert any(line.startswith(f"{corpus} ") for line in section.text(100))
    # Those of b and c, and of the rest of the document in a.
    assert any("data.train[1]" in line and "18 tokens (24.32%) are never read" in line for line in odd)
    assert any("data.train[0]" in line and "data.long_documents.share=0.99 asks for" in line for line in odd)
    assert packing_section(plan_of("model=tiny_hybrid stage.train_iters=2", f"data.train=[{corpus}]")) is None
