"""Texts to batches: nothing lost, nothing twice, padding where it belongs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data import batching
from data.batching import (
    EncodedSplit,
    Unlabelled,
    bucketed_batches,
    collate,
    encode_split,
    evaluation_batches,
    training_batches,
)
from data.sources import Split
from roberta.tokenizer import TextTokenizer
from tests.conftest import tiny_tokenizer


def split_of(lengths, first_id=5):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return EncodedSplit(np.arange(offsets[-1], dtype=np.int32) + first_id, offsets, np.arange(len(lengths)) % 3, 12, 0)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=200),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
def test_every_row_is_in_exactly_one_batch(lengths, batch_size, seed, epoch):
    batches = bucketed_batches(np.array(lengths), batch_size, seed, epoch)
    assert sorted(np.concatenate(batches)) == list(range(len(lengths)))
    assert sorted(map(len, batches))[1:] == [batch_size] * (len(batches) - 1)


def test_batches_depend_on_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).integers(1, 100, 500)

    def order(seed, epoch):
        return [batch.tolist() for batch in bucketed_batches(lengths, 16, seed, epoch)]

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3) and order(1, 2) != order(2, 2)


def test_buckets_leave_little_padding():
    lengths = np.random.default_rng(0).integers(5, 128, 4000)
    batches = bucketed_batches(lengths, 32, 0, 0)
    padded = sum(lengths[batch].max() * len(batch) for batch in batches)
    assert lengths.sum() / padded > 0.95  # in random batches it is about 0.53
    widths = [lengths[batch].max() for batch in batches]
    assert widths != sorted(widths), "batches must not come in order of length"


def test_collate_pads_on_the_right_and_masks():
    batch = collate(split_of([3, 1, 2]), np.array([2, 0]), pad_token_id=1, padding="longest")
    assert batch.input_ids.tolist() == [[9, 10, 1], [5, 6, 7]]
    assert batch.attention_mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.labels.tolist() == [2, 0] and batch.indices.tolist() == [2, 0] and batch.tokens == 5


def test_fixed_padding_is_to_the_maximum_length():
    batch = collate(split_of([3, 1]), np.array([0, 1]), pad_token_id=1, padding="max_length")
    assert batch.input_ids.shape == (2, 12) and int(batch.attention_mask.sum()) == 4


@pytest.mark.parametrize(("multiple", "width"), [(1, 5), (4, 8), (32, 12)])
def test_widths_are_rounded_up_but_not_beyond_the_maximum(multiple, width):
    batch = collate(split_of([5, 3]), np.array([0, 1]), pad_token_id=1, padding="longest", multiple_of=multiple)
    assert batch.input_ids.shape == (2, width) and batch.attention_mask.sum(dim=1).tolist() == [5, 3]


def test_training_and_evaluation_batches_have_few_widths():
    split = split_of([7, 2, 9, 1, 4, 11, 12, 3])  # max_length is 12
    for batches in (training_batches(split, 1, 1, seed=0, epoch=1), evaluation_batches(split, 1, 1)):
        assert sorted(batch.input_ids.shape[1] for batch in batches) == [4, 4, 4, 4, 8, 12, 12, 12]
    assert {batch.input_ids.shape[1] for batch in training_batches(split, 1, 1, 0, 1, multiple_of=1)} > {7, 9}


def test_evaluation_batches_are_sorted_by_length_and_hold_their_rows():
    split = split_of([7, 2, 9, 1, 4])
    batches = list(evaluation_batches(split, 2, 1))
    assert torch.cat([batch.indices for batch in batches]).tolist() == [3, 1, 4, 0, 2]
    for batch in batches:
        assert torch.equal(batch.labels, torch.from_numpy(split.labels)[batch.indices])


def test_training_batches_hold_the_ids_of_their_rows():
    split = split_of([7, 2, 9, 1, 4])
    for batch in training_batches(split, 2, 1, seed=0, epoch=1):
        for row, ids, mask in zip(batch.indices, batch.input_ids, batch.attention_mask, strict=True):
            assert ids[mask].tolist() == split.input_ids[split.offsets[row] : split.offsets[row + 1]].tolist()


@pytest.fixture
def tokenizer():
    return TextTokenizer(tiny_tokenizer(), 6)


TEXTS = Split(["oil price", "the cup", "a goal in the match says the coach today"], [1, 0, 0])


@pytest.mark.parametrize(("labelled", "unlabelled"), [(13, 60), (50, 30)])
def test_unlabelled_texts_fill_the_batches_and_the_smaller_set_is_repeated_in_other_batches(labelled, unlabelled):
    """Batches of 4 labelled texts and 8 others: an epoch has each text, and resumes anywhere with the same batches."""
    first, others, changed = (
        split_of(np.arange(rows) % 7 + 3, start) for rows, start in ((labelled, 5), (unlabelled, 6), (unlabelled, 7))
    )
    arguments = (first, 4, 1, 0, 3)
    batches = [*training_batches(*arguments, unlabelled=Unlabelled(others, changed, 2))]
    assert len(batches) == max(-(-labelled // 4), -(-unlabelled // 8))
    for rows, size, found in (
        (labelled, 4, [batch.indices.tolist() for batch in batches]),
        (unlabelled, 8, [batch.unlabelled.indices.tolist() for batch in batches]),
    ):
        counts = np.bincount(np.concatenate(found), minlength=rows)
        assert counts.min() >= 1 and counts.max() - counts.min() <= 1
        if len(found) > -(-rows // size):  # repeated: full batches, of other rows each time
            assert {*map(len, found)} == {size} and len({frozenset(batch) for batch in found}) == len(found)
            assert np.concatenate(found)[:rows].tolist() != [*range(rows)]
    for batch in batches:
        assert torch.equal(batch.changed.indices, batch.unlabelled.indices)
        assert batch.tokens == sum(int(one.attention_mask.sum()) for one in (batch, batch.unlabelled, batch.changed))
        for one, split in ((batch.unlabelled, others), (batch.changed, changed)):
            row = int(one.indices[0])
            expected = split.input_ids[split.offsets[row] : split.offsets[row + 1]]
            assert one.input_ids[0][one.attention_mask[0]].tolist() == expected.tolist()
    rest = [*training_batches(*arguments, skip=2, unlabelled=Unlabelled(others, changed, 2))]
    assert [b.changed.indices.tolist() for b in rest] == [b.changed.indices.tolist() for b in batches[2:]]


def test_encoding_counts_truncated_texts(tokenizer):
    split = encode_split(TEXTS, tokenizer)
    assert split.lengths.tolist() == [4, 4, 6] and split.truncated == 1 and split.labels.tolist() == [1, 0, 0]
    assert split.input_ids[:4].tolist() == tokenizer.encode_batch(["oil price"])[0]


def test_encoding_in_chunks_is_the_same_as_in_one_call(tokenizer, monkeypatch):
    whole = encode_split(TEXTS, tokenizer)
    monkeypatch.setattr(batching, "_TEXTS_PER_CALL", 2)
    chunked = encode_split(TEXTS, tokenizer)
    assert np.array_equal(chunked.input_ids, whole.input_ids) and np.array_equal(chunked.offsets, whole.offsets)
    assert chunked.truncated == whole.truncated == 1
    assert (chunked.input_ids.dtype, chunked.offsets.dtype, chunked.labels.dtype) == (np.int32, np.int64, np.int64)


def test_an_empty_split_has_no_ids(tokenizer):
    split = encode_split(Split([], []), tokenizer)
    assert split.input_ids.shape == (0,) and split.offsets.tolist() == [0] and split.lengths.shape == (0,)


def test_a_progress_bar_is_shown_on_a_terminal_only(tokenizer, monkeypatch, capsys):
    encode_split(TEXTS, tokenizer, description="tokenizing train")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    encode_split(TEXTS, tokenizer, description="tokenizing train")
    assert "tokenizing train" in capsys.readouterr().err
