"""EDA and AEDA: random edits that make new training texts from old ones (Wei & Zou 2019; Karimi et al. 2021).

EDA: for a text of l words and a strength alpha, n = max(1, floor(alpha l)), and each new text is made by one of

    synonym replacement   n words that are not stop words are replaced by a synonym
    random insertion      n times: a synonym of such a word is inserted at a random position
    random swap           n times: two words change places
    random deletion       every word is dropped with probability alpha, but never all of them

(section 2 there). Synonyms come from WordNet 3.0, as in the paper (wordnet/build.py).

AEDA: each new text has all words in their order, and n punctuation marks between them, n uniform in 1 ... l / 3
(section 3 there).

Each text is kept and followed by n_aug new ones. The new texts of a text depend on (seed, epoch, row) alone, not on
other rows or on the process.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.errors import DataError

_TABLE = Path(__file__).parent / "wordnet" / "synonyms.txt"

# Function words: they are not replaced, as a synonym would make the sentence ungrammatical.
STOP_WORDS = frozenset(
    # articles, demonstratives, quantities
    "a an the this that these those some any no every each either neither both all another other such same few more "
    "most many much several enough own "
    # pronouns
    "i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers "
    "herself it its itself they them their theirs themselves one who whom whose which what whatever whoever anyone "
    "anything everyone everything nobody nothing someone something "
    # auxiliary verbs
    "am is are was were be been being have has had having do does did doing done can could may might must shall should "
    "will would ought cannot "
    # prepositions
    "of in on at by for with about against between into through during before after above below to from up down out "
    "off over under upon within without among across along around behind beside beyond near per since toward towards "
    "until via like as than "
    # conjunctions
    "and or but nor so yet if because while although though unless whether "
    # adverbs of time, place, degree and negation
    "not then once here there when where why how again further only very too just also now ever never always already "
    "still even rather quite almost "
    # parts of "it's", "don't", "we'll" split at the apostrophe
    "s t d ll m o re ve don".split()
)

# A word and the punctuation around it: '"Oil,' is '"', 'Oil', ','.
_PIECES = re.compile(r"^(\W*)(.*?)(\W*)$", re.DOTALL)
_LETTER = re.compile(r"[^\W\d_]")
_LATIN_LETTER = re.compile(r"[A-Za-z\u00c0-\u024f]")
# WordNet's rules for regular forms of nouns, verbs and adjectives: suffix, and suffix of the base form (morphy(7WN)).
_ENDINGS = (
    ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y"),
    ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", ""),
    ("er", ""), ("est", ""), ("er", "e"), ("est", "e"),
)  # fmt: skip


@dataclass(frozen=True)
class AugmentationConfig:
    """New training texts by EDA (Wei & Zou 2019), AEDA (Karimi et al. 2021) or a masked LM (Wu et al. 2019)."""

    kind: Literal["eda", "aeda", "mlm"] = "eda"
    """eda replaces, inserts, swaps or deletes words; aeda inserts punctuation marks; mlm replaces words by samples of
    the checkpoint's masked language model."""
    n_aug: int = 0
    """New texts per text; 0 is no augmentation. EDA's paper: 16 for 500 texts, 8 for 2,000, 4 for 5,000 or more."""
    alpha: float = 0.1
    """EDA and MLM: share of the words that an edit changes. EDA's paper: 0.05 up to 2,000 texts, 0.1 beyond."""
    fresh: bool = True
    """Make other new texts in every epoch, or the same ones in all."""

    def __post_init__(self) -> None:
        if self.n_aug < 0:
            raise DataError(f"data.augmentation.n_aug is {self.n_aug!r}; it must be 0 or more")
        if not 0 <= self.alpha < 1:
            raise DataError(f"data.augmentation.alpha is {self.alpha!r}; it must be in [0, 1)")
        for name in ("kind", "alpha", "fresh"):
            if self.n_aug == 0 and (value := getattr(self, name)) != getattr(AugmentationConfig, name):
                raise DataError(f"data.augmentation.{name} is {value!r}, but n_aug is 0; set that, or remove {name}")
        if self.kind == "aeda" and self.alpha != AugmentationConfig.alpha:
            raise DataError(f"data.augmentation.alpha is {self.alpha:g}, but AEDA has no alpha; remove it")


def edits(words: Sequence[str], alpha: float) -> int:
    """Number of words that an edit changes: n = max(1, floor(alpha l)); 0 if alpha is 0."""
    return max(1, int(alpha * len(words))) if alpha > 0 else 0


def synonym_replacement(words: list[str], alpha: float, draw: random.Random) -> list[str]:
    """Replace n words that are not stop words by a synonym; fewer, if fewer have any."""
    words = list(words)
    positions = _replaceable(words)
    for position in draw.sample(positions, min(edits(words, alpha), len(positions))):
        before, word, after = _PIECES.match(words[position]).groups()
        words[position] = before + _in_case_of(draw.choice(synonyms(word.lower())), word) + after
    return words


def random_insertion(words: list[str], alpha: float, draw: random.Random) -> list[str]:
    """n times: insert a synonym of a word that is not a stop word at a random position."""
    longer = list(words)
    positions = _replaceable(words)
    for _ in range(edits(words, alpha) if positions else 0):
        _, word, _ = _PIECES.match(words[draw.choice(positions)]).groups()
        longer.insert(draw.randint(0, len(longer)), draw.choice(synonyms(word.lower())))
    return longer


def random_swap(words: list[str], alpha: float, draw: random.Random) -> list[str]:
    """n times: swap two random words."""
    words = list(words)
    for _ in range(edits(words, alpha) if len(words) > 1 else 0):
        i, j = draw.sample(range(len(words)), 2)
        words[i], words[j] = words[j], words[i]
    return words


def random_deletion(words: list[str], alpha: float, draw: random.Random) -> list[str]:
    """Drop every word with probability alpha; if none would be left, keep a random one."""
    return [word for word in words if draw.random() >= alpha] or [draw.choice(words)]


def punctuation_insertion(words: list[str], draw: random.Random) -> list[str]:
    """AEDA: insert n random marks, each before another random word; n is uniform in 1 ... max(1, floor(l / 3)).

    Source: Karimi et al. 2021, section 3; that the words differ is as in the authors' program.
    """
    n = draw.randint(1, max(1, len(words) // 3))
    marks = {position: draw.choice(MARKS) for position in draw.sample(range(len(words)), n)}
    return [piece for i, word in enumerate(words) for piece in (marks.get(i), word) if piece is not None]


MARKS = (".", ";", "?", ":", "!", ",")
OPERATIONS = (synonym_replacement, random_insertion, random_swap, random_deletion)


def augment(text: str, config: AugmentationConfig, draw: random.Random) -> list[str]:
    """`n_aug` new texts: EDA's are each made by one of the four operations, drawn at random.

    Raises ValueError for mlm, which replaces tokens: `training.substitution.substitute`.
    """
    if config.kind == "mlm":
        raise ValueError("mlm replaces tokens, not words of a text; use training.substitution.substitute")
    words = text.split()
    if not words:
        return [text] * config.n_aug
    if config.kind == "aeda":
        return [" ".join(punctuation_insertion(words, draw)) for _ in range(config.n_aug)]
    return [" ".join(draw.choice(OPERATIONS)(words, config.alpha, draw)) for _ in range(config.n_aug)]


def augment_texts(
    texts: Sequence[str], labels: Sequence[int], config: AugmentationConfig, seed: int, epoch: int
) -> tuple[list[str], list[int]]:
    """All texts, each followed by its `n_aug` new ones, and their labels.

    Without `fresh`, the new texts of every epoch are those of epoch 0.
    """
    epoch = epoch if config.fresh else 0
    new_texts: list[str] = []
    for row, text in enumerate(texts):
        new_texts += [text, *augment(text, config, random.Random(f"{config.kind.upper()} {seed} {epoch} {row}"))]
    return new_texts, [label for label in labels for _ in range(1 + config.n_aug)]


def check_texts(texts: Sequence[str], origin: str, kind: str, fix: str = "set data.augmentation.n_aug = 0") -> None:
    """Raise DataError if most texts can't be augmented: not in Latin script for EDA, of a single word for AEDA."""
    if kind == "eda":
        unsuited = [text for text in texts if 2 * len(_LATIN_LETTER.findall(text)) < len(_LETTER.findall(text))]
        problem, reason = "are not in Latin script", "EDA's synonyms are English"
    else:
        unsuited = [text for text in texts if len(text.split()) < 2]
        problem, reason = "have no space", "AEDA needs words"
    if 2 * len(unsuited) > len(texts):
        raise DataError(
            f"{origin}: {len(unsuited):,} of {len(texts):,} texts {problem} (the first: "
            f"{unsuited[0][:30]!r}), but {reason}; {fix}"
        )


@functools.lru_cache(maxsize=1 << 17)
def synonyms(word: str) -> tuple[str, ...]:
    """WordNet's synonyms of a lower-case word and of its base forms, in alphabetical order; none for a stop word.

    All meanings of the word count, as in the paper's program.
    """
    if word in STOP_WORDS:
        return ()
    table, irregular = _read_table()
    bases = [word, *irregular.get(word, ())]
    bases += [word.removesuffix(end) + base for end, base in _ENDINGS if word.endswith(end)]
    return tuple(sorted(set().union(*(table.get(base, ()) for base in bases)) - set(bases)))


@functools.cache
def _read_table() -> tuple[dict[str, set[str]], dict[str, list[str]]]:
    """Word -> words that share a meaning with it; irregular form -> base forms."""
    table: dict[str, set[str]] = {}
    irregular: dict[str, list[str]] = {}
    for line in _TABLE.read_text(encoding="ascii").splitlines()[1:]:
        form, arrow, lemma = line.partition(" > ")
        if arrow:
            irregular.setdefault(form, []).append(lemma)
        else:
            words = line.split()
            for word in words:
                table.setdefault(word, set()).update(words)
    return table, irregular


def _replaceable(words: Sequence[str]) -> list[int]:
    """Positions of the words that have synonyms."""
    return [position for position, word in enumerate(words) if synonyms(_PIECES.match(word)[2].lower())]


def _in_case_of(synonym: str, word: str) -> str:
    """ "price" for "cost", "Price" for "Cost", "PRICE" for "COST"."""
    if word.isupper() and len(word) > 1:
        return synonym.upper()
    return synonym.capitalize() if word[:1].isupper() else synonym
