"""New training texts by the checkpoint's own masked language model (Kobayashi 2018, section 2).

Of a text's l words, n = max(1, floor(alpha l)) are masked, and each is replaced by a sample of

    p(w | the other words) = softmax of the model's logits at its place, over the entries of the vocabulary that are
                             words

Two differences: the model does not see the label, on which the paper conditions it, so a replacement may contradict
the label; and the n words are masked together, which needs one forward pass instead of n. A word is here a single token
of letters that begins with a space. Words of several tokens stay, as does the first word, whose token in RoBERTa's
vocabulary has no space. The new texts depend on (seed, epoch, row), and by rounding on the texts of the same batch.
"""

from __future__ import annotations

import itertools
import random

import numpy as np
import torch

from data.augmentation import AugmentationConfig, edits
from data.batching import EncodedSplit, collate
from roberta.masked_lm import MaskedLM
from roberta.tokenizer import TextTokenizer
from training.precision import Compute

_TEXTS_PER_PASS = 64


def _is_word(entry: str) -> bool:
    """Whether an entry is a space and letters. A space is Ġ in byte-level BPE, where é is two signs, ▁ elsewhere."""
    return entry[1:].isalpha() and (entry[0] == "▁" or (entry[0] == "Ġ" and entry[1:].isascii()))


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
    entries = tokenizer.entries
    is_word = np.array([*map(_is_word, entries)])
    continues = np.array([entry[:1].isalpha() and entry[0] != "Ġ" for entry in entries])  # "ing" after "Ġris"
    words = torch.from_numpy(np.flatnonzero(is_word)).to(compute.device)
    texts = [split.input_ids[start:end] for start, end in itertools.pairwise(split.offsets)]
    new: list[np.ndarray] = []
    for start in range(0, len(texts), _TEXTS_PER_PASS):
        chunk = range(start, min(start + _TEXTS_PER_PASS, len(texts)))
        copies = collate(split, np.repeat(chunk, config.n_aug), tokenizer.pad_token_id, "longest")
        places = []  # (copy, position, a number in [0, 1) that decides the sample)
        for row in chunk:
            draw = random.Random(f"MLM {seed} {epoch if config.fresh else 0} {row}")
            whole = is_word[texts[row]] & ~np.append(continues[texts[row][1:]], False)
            positions = np.flatnonzero(whole).tolist()
            for copy in range((row - start) * config.n_aug, (row - start + 1) * config.n_aug):
                for position in sorted(draw.sample(positions, min(edits(positions, config.alpha), len(positions)))):
                    places.append((copy, position, draw.random()))
        if places:
            at = tuple(torch.tensor([place[:2] for place in places]).T)
            uniform = torch.tensor([[place[2]] for place in places], dtype=torch.float64)
            masked = torch.zeros_like(copies.attention_mask).index_put(at, torch.tensor(True))
            inputs = copies.input_ids.masked_fill(masked, tokenizer.mask_token_id or 0), copies.attention_mask, masked
            with compute.autocast():
                logits = model(*(tensor.to(compute.device) for tensor in inputs))[:, words]  # (places, words)
            cumulative = logits.double().softmax(dim=1).cumsum(dim=1)
            drawn = torch.searchsorted(cumulative, uniform.to(compute.device), right=True)[:, 0]
            copies.input_ids[at] = words[drawn.clamp(max=len(words) - 1)].cpu()  # the last sum may round to below 1
        changed = copies.input_ids.numpy().astype(np.int32)
        for row in chunk:
            own = changed[(row - start) * config.n_aug : (row - start + 1) * config.n_aug, : len(texts[row])]
            new += [texts[row], *own]
    return EncodedSplit(
        np.concatenate(new),
        np.cumsum([0, *map(len, new)], dtype=np.int64),
        np.repeat(split.labels, 1 + config.n_aug, axis=0),
        split.max_length,
        split.truncated,
    )
