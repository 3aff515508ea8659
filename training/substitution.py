"""New training texts by the checkpoint's own masked language model, after Wu et al. 2019.

Of the l words of a text that can be replaced, n = max(1, floor(alpha l)) are masked together and become samples of

    p(w | the words that are not masked) = softmax of the model's logits at its place, over the entries of the
                                           vocabulary that are words

Source: Wu et al. 2019, "Conditional BERT Contextual Augmentation", section 3, which replaces the bidirectional RNN
language model of Kobayashi 2018, "Contextual Augmentation", by BERT. Four differences: the model is not trained to see
the label, as it is in both papers, so a replacement may contradict the label; the softmax has temperature 1, which is a
parameter in Kobayashi's; a word is a single token of letters that begins with a space, where Wu et al. mask BERT's word
pieces; EDA's l counts all words. Words of several tokens stay, as does the first word, whose token in RoBERTa's
vocabulary has no space.

The new texts depend on (seed, epoch, row), and by rounding on the texts of the same pass.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from data.augmentation import AugmentationConfig, edits
from data.batching import EncodedSplit, collate
from roberta.masked_lm import MaskedLM
from roberta.tokenizer import TextTokenizer
from training.errors import ConfigError
from training.precision import Compute
from training.progress import say

_SEQUENCES_PER_PASS = 64


def _is_word(entry: str) -> bool:
    """Whether an entry is a space and letters. A space is Ġ in byte-level BPE, where é is two signs, ▁ elsewhere."""
    return entry[1:].isalpha() and (entry[0] == "▁" or (entry[0] == "Ġ" and entry[1:].isascii()))


def whole_words(ids: np.ndarray, entries: Sequence[str]) -> np.ndarray:
    """Which tokens are words that can be replaced, (tokens,) bool: `_is_word`, and the word does not continue.

    `ids` (tokens,) are those of a text or, as each begins with a special token, of several, `entries` the vocabulary.
    """
    is_word = np.array([*map(_is_word, entries)])
    continues = np.array([entry[:1].isalpha() and entry[0] != "Ġ" for entry in entries])  # "ing" after "Ġris"
    return is_word[ids] & ~np.append(continues[ids[1:]], False)


def check_words(split: EncodedSplit, entries: Sequence[str], origin: str) -> None:
    """Say how many training texts have no word to replace. Raises ConfigError if they are more than half."""
    has_words = np.logical_or.reduceat(whole_words(split.input_ids, entries), split.offsets[:-1])  # (texts,)
    copies, texts = int((~has_words).sum()), len(has_words)
    if 2 * copies > texts:
        raise ConfigError(
            f"{origin}: {copies:,} of {texts:,} training texts have no word that is a single token, so that their new "
            "texts would be copies; choose another data.augmentation.kind, or set data.augmentation.n_aug = 0"
        )
    if copies:
        say(f"            {copies:,} of {texts:,} training texts have no word that is a single token: they are copied")


@torch.no_grad()
def substitute(
    split: EncodedSplit,
    model: MaskedLM,
    tokenizer: TextTokenizer,
    config: AugmentationConfig,
    seed: int,
    epoch: int,
    compute: Compute,
) -> EncodedSplit:
    """All texts, each followed by its `n_aug` new ones, which have the same number of tokens, and their labels.

    Without `fresh`, the new texts of every epoch are those of epoch 0.
    """
    assert tokenizer.mask_token_id is not None, "checked by load_inputs"
    entries, epoch = tokenizer.entries, epoch if config.fresh else 0
    words = torch.from_numpy(np.flatnonzero([*map(_is_word, entries)])).to(compute.device)  # (words,) ids
    spans = [*itertools.pairwise(split.offsets)]
    whole = whole_words(split.input_ids, entries)
    positions = [np.flatnonzero(whole[start:end]).tolist() for start, end in spans]
    rows = np.repeat(np.arange(len(spans)), config.n_aug)  # (new texts,)
    new: list[np.ndarray] = []
    # disable=None shows the bar on a terminal only.
    with tqdm(total=len(rows), desc="replacing words", unit=" texts", leave=False, disable=None) as bar:
        for start in range(0, len(rows), _SEQUENCES_PER_PASS):
            chunk = rows[start : start + _SEQUENCES_PER_PASS]
            copies = collate(split, chunk, tokenizer.pad_token_id, "longest")  # input_ids: (copies, seq)
            places = []  # (copy, position, a number in [0, 1) that decides the sample)
            for copy, row in enumerate(chunk):
                draw = random.Random(f"MLM {seed} {epoch} {row} {(start + copy) % config.n_aug}")
                count = min(edits(positions[row], config.alpha), len(positions[row]))
                places += [(copy, at, draw.random()) for at in sorted(draw.sample(positions[row], count))]
            if places:
                at = tuple(torch.tensor([place[:2] for place in places]).T)  # two of (places,): rows and columns
                uniform = torch.tensor([[place[2]] for place in places], dtype=torch.float64)  # (places, 1)
                masked = torch.zeros_like(copies.attention_mask).index_put(at, torch.tensor(True))  # (copies, seq)
                inputs = copies.input_ids.masked_fill(masked, tokenizer.mask_token_id), copies.attention_mask, masked
                with compute.autocast():
                    logits = model(*(tensor.to(compute.device) for tensor in inputs))[:, words]  # (places, words)
                cumulative = logits.double().softmax(dim=1).cumsum(dim=1)  # (places, words), rising to 1
                drawn = torch.searchsorted(cumulative, uniform.to(compute.device), right=True)[:, 0]  # (places,)
                copies.input_ids[at] = words[drawn.clamp(max=len(words) - 1)].cpu()  # the last sum may round to below 1
            new += [*copies.input_ids.numpy().astype(np.int32)]
            bar.update(len(chunk))
    texts = []
    for row, (start, end) in enumerate(spans):
        own = new[row * config.n_aug : (row + 1) * config.n_aug]
        texts += [split.input_ids[start:end], *(ids[: end - start] for ids in own)]
    return EncodedSplit(
        np.concatenate(texts),
        np.cumsum([0, *map(len, texts)], dtype=np.int64),
        np.repeat(split.labels, 1 + config.n_aug, axis=0),
        split.max_length,
        split.truncated,
    )
