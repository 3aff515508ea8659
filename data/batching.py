"""Texts to padded batches of token ids.

Ids are kept as one flat array with offsets: 120,000 short texts are a few arrays, not millions of Python integers.
Batches hold texts of similar length ("length buckets"), since every text is padded to the longest of its batch: on
short news in random batches of 32, half of all tokens would be padding.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.assets import cache_directory
from data.sources import Split

# Texts are sorted by length within so many batches: enough for near-equal lengths, few enough that epochs differ.
_BATCHES_PER_BUCKET = 50
_WORKERS_ON_GPU = 2

# Batches are a multiple of so many tokens wide: oneDNN, and a compiler, write code for each width, which takes a CPU
# longer than the few tokens of padding do (docs/performance.md).
WIDTH_MULTIPLE = 4

NO_LABEL = -100
"""A text with this label does not count: `cross_entropy` leaves it out."""

Padding = Literal["longest", "max_length"]


class Tokenizer(Protocol):
    """What is needed of a tokenizer; `roberta.tokenizer.TextTokenizer` is one."""

    pad_token_id: int
    max_length: int

    @property
    def fingerprint(self) -> str:
        """Changes whenever the ids of some text could."""

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
    """(texts,) int64."""
    max_length: int
    """Length in tokens to which texts were cut."""
    truncated: int
    """How many texts were cut."""

    @property
    def lengths(self) -> np.ndarray:
        """(texts,) tokens of each text."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Batch:
    """Some texts of a split, padded to the same length."""

    input_ids: Tensor
    """(batch, seq) int64; padding holds the padding id."""
    attention_mask: Tensor
    """(batch, seq) bool, true at real tokens."""
    labels: Tensor
    """(batch,) int64."""
    indices: Tensor
    """(batch,) int64: which rows of the split these are."""
    tokens: int
    """Number of real tokens of the whole batch, known without asking the device."""
    elsewhere: int = 0
    """Texts of the batch that are not here: other processes hold them."""

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which a GPU copies without waiting."""
        tensors = (self.input_ids, self.attention_mask, self.labels, self.indices)
        return Batch(*(tensor.pin_memory() for tensor in tensors), self.tokens, self.elsewhere)


def encode_split(
    split: Split, tokenizer: Tokenizer, description: str = "tokenizing", cache: bool = True
) -> EncodedSplit:
    """Tokenize a split in batches, with a progress bar, once: `datasets` keeps the result in the cache folder.

    The cached ids are found again by the texts and the tokenizer's fingerprint. `cache=False` leaves no trace, for a
    few texts typed by hand. Raises what the tokenizer raises, and OSError if the cache can't be written.
    """
    if cache:
        flat, offsets, truncated = _encode_cached(split.texts, tokenizer, description)
    else:
        ids, cut = tokenizer.encode_batch_with_cuts(split.texts)
        flat = np.fromiter((i for row in ids for i in row), dtype=np.int32)
        offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
        truncated = sum(cut)
    return EncodedSplit(flat, offsets, np.asarray(split.labels, dtype=np.int64), tokenizer.max_length, truncated)


def _encode_cached(texts: Sequence[str], tokenizer: Tokenizer, description: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Flat ids, offsets and the number of cut texts by way of `datasets`' cache: computed once for these texts."""
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for text in texts:
        digest.update(len(text).to_bytes(8, "little") + text.encode("utf-8", "surrogatepass"))
    path = cache_directory() / "tokenized" / f"{digest.hexdigest()}.arrow"
    try:
        table = _read_arrow(path)
    except (OSError, pa.ArrowInvalid):  # not there yet, or damaged
        path.unlink(missing_ok=True)
        _write_cache(texts, tokenizer, description, path)
        table = _read_arrow(path)
    # Arrow keeps a column of lists as flat values with offsets: taken as they are, no text becomes a Python object.
    column = table.column("input_ids")
    flat = np.concatenate([np.empty(0, np.int32), *(chunk.flatten().to_numpy() for chunk in column.chunks)])
    lengths = [chunk.value_lengths().to_numpy() for chunk in column.chunks]
    offsets = np.concatenate([[0], *lengths]).cumsum(dtype=np.int64)
    return flat, offsets, int(np.sum(table.column("cut").to_numpy()))


def _read_arrow(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all()


def _write_cache(texts: Sequence[str], tokenizer: Tokenizer, description: str, path: Path) -> None:
    """Tokenize with a progress bar into a file that is there whole or not at all. Raises OSError if it can't be."""
    import datasets  # takes a second to import, and is wanted for this alone

    path.parent.mkdir(parents=True, exist_ok=True)

    def encode(rows: dict[str, list[str]]) -> dict[str, list]:
        ids, cut = tokenizer.encode_batch_with_cuts(rows["text"])
        return {"input_ids": ids, "cut": cut}

    if not sys.stderr.isatty():  # in a pipe or CI a bar is noise
        datasets.disable_progress_bars()
    columns = {"input_ids": datasets.Sequence(datasets.Value("int32")), "cut": datasets.Value("bool")}
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=".part-"))
    try:
        datasets.Dataset.from_dict({"text": list(texts)}).map(
            encode,
            batched=True,
            batch_size=1000,
            remove_columns=["text"],
            features=datasets.Features(columns),
            cache_file_name=str(temporary / path.name),
            new_fingerprint=path.stem,
            desc=description,
        )
        (temporary / path.name).replace(path)
    except ValueError as error:
        # After a failed write `datasets` closes its file a second time, and that hides why.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def bucketed_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Row numbers of each batch of an epoch: every row exactly once, rows of a batch of similar length.

    Rows are shuffled, cut into stretches of 50 batches, sorted by length within a stretch, cut into batches, and the
    batches shuffled. Decided by (seed, epoch) alone. One batch, in any place, may be shorter than `batch_size`.
    """
    random = np.random.default_rng((seed, epoch))
    rows = random.permutation(len(lengths))
    batches = []
    for start in range(0, len(rows), batch_size * _BATCHES_PER_BUCKET):
        stretch = rows[start : start + batch_size * _BATCHES_PER_BUCKET]
        stretch = stretch[np.argsort(lengths[stretch], kind="stable")]
        batches += [stretch[i : i + batch_size] for i in range(0, len(stretch), batch_size)]
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

    The longest is rounded up to a `multiple_of` tokens, but not beyond `max_length`: what writes code for each width
    sees few of them. Of several processes each takes its `share` of the rows. One that gets none, as the batch has
    fewer rows than there are processes, takes the first row with the label NO_LABEL: the loss of it is 0, and so is
    every gradient.
    """
    texts, tokens = len(rows), int(split.lengths[rows].sum())
    if len(rows[share]):
        rows = rows[share]
        labels = split.labels[rows]
    else:
        rows, labels = rows[:1], np.array([NO_LABEL])
    lengths = split.lengths[rows]
    longest = -(-int(lengths.max()) // multiple_of) * multiple_of
    width = split.max_length if padding == "max_length" else min(longest, split.max_length)
    mask = np.arange(width) < lengths[:, None]  # (batch, seq)
    ids = np.full(mask.shape, pad_token_id, dtype=np.int64)
    ids[mask] = np.concatenate([split.input_ids[split.offsets[row] : split.offsets[row + 1]] for row in rows])
    return Batch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        labels=torch.from_numpy(labels),
        indices=torch.from_numpy(rows.astype(np.int64)),
        tokens=tokens,
        elsewhere=texts - len(rows),
    )


class _Batches(Dataset):
    """Batch number i of a fixed list, collated where it is asked for: in a worker process, if there are any."""

    def __init__(self, split: EncodedSplit, rows: list[np.ndarray], *how: Any) -> None:
        self.split, self.rows, self.how = split, rows, how

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        return collate(self.split, self.rows[index], *self.how)


def _loader(batches: _Batches, device: torch.device) -> Iterable[Batch]:
    """On a GPU, worker processes collate ahead of it into pinned memory; on a CPU they would take its cores."""
    on_gpu = device.type == "cuda"
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=_WORKERS_ON_GPU if on_gpu else 0,
        pin_memory=on_gpu,
        # A loader draws a seed for its workers each time it is gone through. From the default generator, that would
        # shift every dropout mask after it, and a resumed epoch begins its loader once more.
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
    """The batches of one epoch: length buckets in shuffled order, the same for the same seed and epoch.

    The first `skip` of them are left out: where a run goes on, they were trained on before it was cut off. Of each
    batch only the rows of `share` are made, rows 1, 4, 7, ... for `slice(1, None, 3)`: other processes take the others.
    Padding is that of `collate`.
    """
    rows = bucketed_batches(split.lengths, batch_size, seed, epoch)[skip:]
    return _loader(_Batches(split, rows, pad_token_id, padding, share, multiple_of), device)


def evaluation_batches(
    split: EncodedSplit,
    batch_size: int,
    pad_token_id: int,
    padding: Padding = "longest",
    device: torch.device = torch.device("cpu"),  # noqa: B008
    share: slice = slice(None),
) -> Iterable[Batch]:
    """Every row once, sorted by length so that hardly anything is padding; `Batch.indices` tells which row is where.

    `share` takes some of the batches, each whole: its logits are then the same bits whichever process computes them.
    """
    order = np.argsort(split.lengths, kind="stable")
    rows = [order[i : i + batch_size] for i in range(0, len(order), batch_size)][share]
    return _loader(_Batches(split, rows, pad_token_id, padding, slice(None), WIDTH_MULTIPLE), device)
