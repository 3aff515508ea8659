"""Texts to padded batches of token ids.

Ids are kept as one flat array with offsets: 120,000 short texts are a few arrays, not millions of Python integers.
Batches hold texts of similar length ("length buckets"), since every text is padded to the longest of its batch: on
short news in random batches of 32, half of all tokens would be padding.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.sources import Split

_TEXTS_PER_CALL = 1000  # of the tokenizer, whose lists of Python integers take most of the memory
# Texts are sorted by length within this many batches: enough for near-equal lengths, few enough that epochs differ.
_BATCHES_PER_BUCKET = 50

# The width of a batch is a multiple of this: oneDNN, and a compiler, generate code for each width, which takes a CPU
# longer than the few tokens of padding do (docs/performance.md).
WIDTH_MULTIPLE = 4

Padding = Literal["longest", "max_length"]
_Collate = Callable[[Any], "Batch"]


class Tokenizer(Protocol):
    """What batching needs of a tokenizer, such as `roberta.tokenizer.TextTokenizer`."""

    pad_token_id: int
    max_length: int
    windows: int
    overlap: int

    def encode_windows(self, texts: Sequence[str]) -> tuple[list[list[list[int]]], list[bool]]:
        """Ids of the at most `windows` windows of each text, of `max_length` tokens, and whether a part is in none."""


@dataclass(frozen=True)
class EncodedSplit:
    """The token ids of a split. Row i is `input_ids[offsets[i]:offsets[i + 1]]`: a text, or a window of one."""

    input_ids: np.ndarray
    """(sum of lengths,) int32."""
    offsets: np.ndarray
    """(rows + 1,) int64, from 0."""
    labels: np.ndarray
    """(texts,) int64: the class; multi-label, (texts, classes) int64: 1 for each class of the text, else 0."""
    max_length: int
    """Length in tokens of the longest possible row."""
    truncated: int
    """Number of texts of which a part is in no row."""
    weights: np.ndarray | None = None
    """(rows,) float64: weight of each row in the training loss; None for 1 each."""
    texts: np.ndarray | None = None
    """(rows,) int64: the text of which a row is a window; None if row i is text i."""

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) number of tokens of each row."""
        return np.diff(self.offsets)

    @property
    def longer(self) -> int:
        """Number of texts longer than `max_length`."""
        return self.truncated if self.texts is None else int((np.bincount(self.texts) > 1).sum())

    def labels_of(self, rows: np.ndarray) -> np.ndarray:
        """The labels of the texts of the given rows."""
        return self.labels[rows if self.texts is None else self.texts[rows]]

    def weighted(self, weights: np.ndarray) -> EncodedSplit:
        """The same split with the given weight of each text, (texts,), in equal parts on the text's n windows."""
        if self.texts is not None:
            weights = (weights / np.bincount(self.texts))[self.texts]
        return dataclasses.replace(self, weights=weights)


@dataclass(frozen=True)
class Batch:
    """Texts of a split, padded to the same length."""

    input_ids: Tensor
    """(batch, seq) int64; padding holds the padding id."""
    attention_mask: Tensor
    """(batch, seq) bool, true at real tokens."""
    labels: Tensor
    """(batch,) int64, or (batch, classes) int64 of 0 and 1."""
    weights: Tensor
    """(batch,) float64: weight of each text in the loss; 0 for a text that only fills an empty share."""
    indices: Tensor
    """(batch,) int64: rows of the split."""
    tokens: int
    """Number of real tokens of the batch, over all processes; on the CPU, so that reading it synchronizes nothing."""
    total_weight: float
    """Sum of the weights of the batch, over all processes."""
    unlabelled: Batch | None = None
    """Texts without labels that belong to the same step."""
    changed: Batch | None = None
    """The same texts, changed: row for row those of `unlabelled`."""

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies asynchronously."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Batch(**{name: x.pin_memory() if isinstance(x, Tensor | Batch) else x for name, x in values.items()})


def encode_split(split: Split, tokenizer: Tokenizer, description: str = "tokenizing") -> EncodedSplit:
    """Tokenize a split; `description` labels the progress bar. Raises what the tokenizer raises.

    If the tokenizer cuts windows, each is a row, and has the weight 1/n for the n windows of its text.
    """
    ids, lengths, counts, truncated = [np.empty(0, np.int32)], [0], [np.empty(0, np.int64)], 0
    # disable=None shows the bar on a terminal only.
    with tqdm(total=len(split.texts), desc=description, unit=" texts", leave=False, disable=None) as bar:
        for start in range(0, len(split.texts), _TEXTS_PER_CALL):
            chunk, cut = tokenizer.encode_windows(split.texts[start : start + _TEXTS_PER_CALL])
            rows = [*itertools.chain.from_iterable(chunk)]
            ids.append(np.fromiter(itertools.chain.from_iterable(rows), np.int32))
            lengths += map(len, rows)
            counts.append(np.array([*map(len, chunk)]))
            truncated += sum(cut)
            bar.update(len(chunk))
    encoded = EncodedSplit(
        np.concatenate(ids),
        np.cumsum(lengths, dtype=np.int64),
        np.asarray(split.labels, dtype=np.int64),
        tokenizer.max_length,
        truncated,
    )
    if tokenizer.windows == 1:
        return encoded
    texts = np.repeat(np.arange(len(split.texts)), np.concatenate(counts))
    return dataclasses.replace(encoded, texts=texts).weighted(np.ones(len(split.texts)))


def describe_long(splits: Sequence[EncodedSplit], tokenizer: Tokenizer) -> str:
    """How many texts are longer than `max_length`, and how they are read, for display."""
    line = f"{sum(split.longer for split in splits):,} texts are longer than {tokenizer.max_length} tokens and are "
    if tokenizer.windows == 1:
        return line + "truncated"
    partly = sum(split.truncated for split in splits)
    shared = f"{tokenizer.windows} windows that share {tokenizer.overlap} tokens"
    return line + f"read in at most {shared}, {partly:,} of them in part"


def joined(splits: Sequence[EncodedSplit]) -> EncodedSplit:
    """The rows of all `splits`, one split after the other, each as a text of its own."""
    return EncodedSplit(
        np.concatenate([split.input_ids for split in splits]),
        np.cumsum([0, *itertools.chain.from_iterable(split.lengths for split in splits)], dtype=np.int64),
        np.concatenate([split.labels_of(np.arange(len(split.lengths))) for split in splits]),
        max(split.max_length for split in splits),
        sum(split.truncated for split in splits),
    )


@dataclass(frozen=True)
class Unlabelled:
    """Texts without labels for the batches of an epoch."""

    split: EncodedSplit
    """The texts."""
    changed: EncodedSplit
    """Row for row the same texts, changed."""
    ratio: int
    """Number of these texts per labelled text of a batch."""


def batches_per_epoch(rows: int, batch_size: int, unlabelled: int = 0, ratio: int = 1) -> int:
    """Number of batches of `batch_size` rows and `ratio` times as many unlabelled ones that hold each at least once."""
    return max(-(-rows // batch_size), -(-unlabelled // (ratio * batch_size)))


def bucketed_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Row numbers of each batch of an epoch: every row exactly once, rows of a batch of similar length.

    Rows are shuffled and cut into buckets of 50 batches; each bucket is sorted by length and cut into batches, and all
    batches are shuffled. The result depends on (seed, epoch) alone. One batch, at any position, may be smaller than
    `batch_size`.
    """
    random = np.random.default_rng((seed, epoch))
    rows = random.permutation(len(lengths))
    batches = []
    for start in range(0, len(rows), batch_size * _BATCHES_PER_BUCKET):
        bucket = rows[start : start + batch_size * _BATCHES_PER_BUCKET]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def collate(
    split: EncodedSplit,
    rows: np.ndarray,
    pad_token_id: int,
    padding: Padding,
    share: slice = slice(None),
    multiple_of: int = 1,
) -> Batch:
    """Pad the given rows on the right: to the longest of them, or to the split's `max_length`.

    The width is rounded up to a multiple of `multiple_of` tokens, but not beyond `max_length`. With several processes,
    each holds its `share` of the rows. A process whose share is empty, because the batch has fewer rows than there are
    processes, holds the first row with the weight 0: its loss and its gradients are 0.
    """
    tokens = int(split.lengths[rows].sum())
    weights = np.ones(len(rows)) if split.weights is None else split.weights[rows]
    total_weight = float(weights.sum())  # every process makes every batch, so it knows the weights of all its texts
    if len(rows[share]):
        rows, weights = rows[share], weights[share]
    else:
        rows, weights = rows[:1], np.zeros(1)
    lengths = split.lengths[rows]
    longest = -(-int(lengths.max()) // multiple_of) * multiple_of
    width = split.max_length if padding == "max_length" else min(longest, split.max_length)
    mask = np.arange(width) < lengths[:, None]  # (batch, seq)
    ids = np.full(mask.shape, pad_token_id, dtype=np.int64)
    ids[mask] = np.concatenate([split.input_ids[split.offsets[row] : split.offsets[row + 1]] for row in rows])
    return Batch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        labels=torch.from_numpy(split.labels_of(rows)),
        weights=torch.from_numpy(weights),
        indices=torch.from_numpy(rows.astype(np.int64)),
        tokens=tokens,
        total_weight=total_weight,
    )


def repeated_batches(rows: int, batch_size: int, seed: int, epoch: int, number: int) -> list[np.ndarray]:
    """Row numbers of `number` full batches, cut from one random permutation of the rows after the other.

    Not sorted by length: few rows would be in the same batch each time.
    """
    random = np.random.default_rng((seed, epoch))
    passes = [random.permutation(rows) for _ in range(-(-number * batch_size // rows))]
    return np.split(np.concatenate(passes)[: number * batch_size], number)


def _collate_all(labelled: _Collate, unlabelled: _Collate, changed: _Collate, rows: tuple[Any, Any]) -> Batch:
    """The batch of the labelled rows, with the unlabelled rows and their changed copies."""
    batch, texts, copies = labelled(rows[0]), unlabelled(rows[1]), changed(rows[1])
    tokens = batch.tokens + texts.tokens + copies.tokens
    return dataclasses.replace(batch, unlabelled=texts, changed=copies, tokens=tokens)


def _loader(collated: _Collate, rows: list[Any], device: torch.device) -> Iterable[Batch]:
    """`collated(rows[i])` for each i.

    On a GPU, worker processes collate ahead of it into pinned memory; on a CPU they would take its cores.
    """
    on_gpu = device.type == "cuda"
    return DataLoader(
        rows,
        batch_size=None,
        collate_fn=collated,
        num_workers=2 if on_gpu else 0,
        pin_memory=on_gpu,
        # Each iteration over a loader draws a seed for its workers. Drawn from the default generator, it would shift
        # every later dropout mask, and a resumed epoch starts its loader a second time.
        generator=torch.Generator(),
    )


def training_batches(
    split: EncodedSplit,
    batch_size: int,
    pad_token_id: int,
    seed: int,
    epoch: int,
    padding: Padding = "longest",
    device: torch.device = torch.device("cpu"),  # noqa: B008  a device is immutable
    skip: int = 0,
    share: slice = slice(None),
    multiple_of: int = WIDTH_MULTIPLE,
    unlabelled: Unlabelled | None = None,
) -> Iterable[Batch]:
    """The batches of one epoch as `bucketed_batches` orders them, without the first `skip`: a resumed run has trained
    on those.

    Each batch holds only the rows of `share`, such as rows 1, 4, 7, ... for `slice(1, None, 3)`; other processes hold
    the rest. Padding is that of `collate`.

    With `unlabelled` texts, each batch has `ratio` times `batch_size` of them, or what is left of them. An epoch then
    has every text, labelled or not, at least once; of what needs fewer batches, `repeated_batches`.
    """
    options = {"pad_token_id": pad_token_id, "padding": padding, "share": share, "multiple_of": multiple_of}
    collated: _Collate = functools.partial(collate, split, **options)
    if unlabelled is None:
        return _loader(collated, bucketed_batches(split.lengths, batch_size, seed, epoch)[skip:], device)
    ratio, others, rows = unlabelled.ratio, unlabelled.split.lengths, []
    number = batches_per_epoch(len(split.lengths), batch_size, len(others), ratio)
    for lengths, size in ((split.lengths, batch_size), (others, ratio * batch_size)):
        once = bucketed_batches(lengths, size, seed, epoch)
        rows.append(once if len(once) == number else repeated_batches(len(lengths), size, seed, epoch, number))
    parts = (functools.partial(collate, each, **options) for each in (unlabelled.split, unlabelled.changed))
    return _loader(functools.partial(_collate_all, collated, *parts), [*zip(*rows, strict=True)][skip:], device)


def evaluation_batches(
    split: EncodedSplit,
    batch_size: int,
    pad_token_id: int,
    padding: Padding = "longest",
    device: torch.device = torch.device("cpu"),  # noqa: B008
    share: slice = slice(None),
) -> Iterable[Batch]:
    """Every row once, sorted by length so that little is padding; `Batch.indices` holds the row numbers.

    `share` selects whole batches, so that the logits of a batch are the same bits whichever process computes them.
    """
    order = np.argsort(split.lengths, kind="stable")
    rows = [order[i : i + batch_size] for i in range(0, len(order), batch_size)][share]
    collated = functools.partial(collate, split, pad_token_id=pad_token_id, padding=padding, multiple_of=WIDTH_MULTIPLE)
    return _loader(collated, rows, device)
