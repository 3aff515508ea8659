"""Texts to padded batches of token ids.

Ids are kept as one flat array with offsets: 120,000 short texts are a few arrays, not millions of Python integers.
Batches hold texts of similar length ("length buckets"), since every text is padded to the longest of its batch: on
short news in random batches of 32, half of all tokens would be padding.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
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


class Tokenizer(Protocol):
    """What batching needs of a tokenizer, such as `roberta.tokenizer.TextTokenizer`."""

    pad_token_id: int
    max_length: int

    def encode_batch_with_cuts(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Ids of each text with its special tokens, truncated to `max_length`, and whether it was longer."""


@dataclass(frozen=True)
class EncodedSplit:
    """The token ids of a split. Text i is `input_ids[offsets[i]:offsets[i + 1]]`."""

    input_ids: np.ndarray
    """(sum of lengths,) int32."""
    offsets: np.ndarray
    """(texts + 1,) int64, from 0."""
    labels: np.ndarray
    """(texts,) int64: the class; multi-label, (texts, classes) int64: 1 for each class of the text, else 0."""
    max_length: int
    """Length in tokens to which longer texts were truncated."""
    truncated: int
    """Number of truncated texts."""
    weights: np.ndarray | None = None
    """(texts,) float64: weight of each text in the training loss; None for 1 each."""

    @property
    def lengths(self) -> np.ndarray:
        """(texts,) number of tokens of each text."""
        return np.diff(self.offsets)


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

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies asynchronously."""
        tensors = (self.input_ids, self.attention_mask, self.labels, self.weights, self.indices)
        return Batch(*(tensor.pin_memory() for tensor in tensors), self.tokens, self.total_weight)


def encode_split(split: Split, tokenizer: Tokenizer, description: str = "tokenizing") -> EncodedSplit:
    """Tokenize a split; `description` labels the progress bar. Raises what the tokenizer raises."""
    ids, lengths, truncated = [np.empty(0, np.int32)], [0], 0
    # disable=None shows the bar on a terminal only.
    with tqdm(total=len(split.texts), desc=description, unit=" texts", leave=False, disable=None) as bar:
        for start in range(0, len(split.texts), _TEXTS_PER_CALL):
            chunk, cut = tokenizer.encode_batch_with_cuts(split.texts[start : start + _TEXTS_PER_CALL])
            ids.append(np.fromiter(itertools.chain.from_iterable(chunk), np.int32))
            lengths += map(len, chunk)
            truncated += sum(cut)
            bar.update(len(chunk))
    return EncodedSplit(
        np.concatenate(ids),
        np.cumsum(lengths, dtype=np.int64),
        np.asarray(split.labels, dtype=np.int64),
        tokenizer.max_length,
        truncated,
    )


def joined(splits: Sequence[EncodedSplit]) -> EncodedSplit:
    """The texts of all `splits`, one split after the other."""
    return EncodedSplit(
        np.concatenate([split.input_ids for split in splits]),
        np.cumsum([0, *itertools.chain.from_iterable(split.lengths for split in splits)], dtype=np.int64),
        np.concatenate([split.labels for split in splits]),
        max(split.max_length for split in splits),
        sum(split.truncated for split in splits),
    )


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
        labels=torch.from_numpy(split.labels[rows]),
        weights=torch.from_numpy(weights),
        indices=torch.from_numpy(rows.astype(np.int64)),
        tokens=tokens,
        total_weight=total_weight,
    )


def _loader(split: EncodedSplit, rows: list[np.ndarray], device: torch.device, **options: Any) -> Iterable[Batch]:
    """`collate(split, rows[i], **options)` for each i.

    On a GPU, worker processes collate ahead of it into pinned memory; on a CPU they would take its cores.
    """
    on_gpu = device.type == "cuda"
    return DataLoader(
        rows,
        batch_size=None,
        collate_fn=functools.partial(collate, split, **options),
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
) -> Iterable[Batch]:
    """The batches of one epoch as `bucketed_batches` orders them, without the first `skip`: a resumed run has trained
    on those.

    Each batch holds only the rows of `share`, such as rows 1, 4, 7, ... for `slice(1, None, 3)`; other processes hold
    the rest. Padding is that of `collate`.
    """
    rows = bucketed_batches(split.lengths, batch_size, seed, epoch)[skip:]
    options = {"pad_token_id": pad_token_id, "padding": padding, "share": share, "multiple_of": multiple_of}
    return _loader(split, rows, device, **options)


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
    return _loader(split, rows, device, pad_token_id=pad_token_id, padding=padding, multiple_of=WIDTH_MULTIPLE)
