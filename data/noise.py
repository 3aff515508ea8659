"""Corruptions of texts that leave their class as it is: typing errors, case, lost marks, markup, lost words and ends.

Each function takes texts, a severity s from 0 to 1 and a random generator, and returns as many new texts:

    typing errors   each run of two or more letters has one, with probability s: two letters swapped, one left out,
                    written twice, or replaced by its neighbour on the keyboard
    other case      each word is written in capitals, or without them if it has some, with probability s
    no punctuation  each mark is left out, with probability s
    markup          each word gets tags around it, or a tag or an entity after it, with probability s
    lost words      each word is left out, with probability s
    truncation      the last s n of the n words of a text are left out

Words are separated by white space. Severity 0 returns the same texts, and no text becomes empty. Scores by corruption
and severity are after Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", who corrupt images.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

Corruption = Callable[[Sequence[str], float, random.Random], list[str]]

SEVERITIES = (0.05, 0.1, 0.2, 0.4)  # those that are measured

_LETTERS = re.compile(r"[^\W\d_]{2,}")
_WORD = re.compile(r"\S+")
_WORD_AND_BLANKS = re.compile(r"\S+\s*")
_MARK = re.compile(r"[^\w\s]")
_MARKUP = ("<b>{}</b>", '<a href="https://example.com">{}</a>', "{}<br />", "{}&nbsp;")
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
# Each letter -> the letters beside it in its row: "q" -> "w", "w" -> "qe".
_BESIDE = {key: row[max(0, i - 1) : i] + row[i + 1 : i + 2] for row in _ROWS for i, key in enumerate(row)}


def _each(pattern: re.Pattern[str], change: Callable[[str, random.Random], str]) -> Corruption:
    """The corruption that changes each match with probability `severity`, unless nothing of a text would be left."""

    def corrupt(texts: Sequence[str], severity: float, draw: random.Random) -> list[str]:
        def new(found: re.Match[str]) -> str:
            return change(found[0], draw) if draw.random() < severity else found[0]

        return [changed if (changed := pattern.sub(new, text)).strip() else text for text in texts]

    return corrupt


def _mistype(letters: str, draw: random.Random) -> str:
    i = draw.randrange(len(letters))
    before, letter, after = letters[:i], letters[i], letters[i + 1 :]
    beside = draw.choice(_BESIDE.get(letter.lower(), letter))
    swapped = before + after[:1] + letter + after[1:]
    replaced = before + (beside.upper() if letter.isupper() else beside) + after
    return draw.choice(
        [new for new in (swapped, before + after, before + 2 * letter + after, replaced) if new != letters]
    )


def _recase(word: str, draw: random.Random) -> str:
    return word.upper() if word == word.lower() else word.lower()


def _leave_out(found: str, draw: random.Random) -> str:
    return ""


def _mark_up(word: str, draw: random.Random) -> str:
    return draw.choice(_MARKUP).format(word)


def _truncate(text: str, severity: float) -> str:
    words = list(_WORD.finditer(text))
    kept = max(1, round((1 - severity) * len(words)))
    return text[: words[kept].start()].rstrip() if kept < len(words) else text


typing_errors = _each(_LETTERS, _mistype)
other_case = _each(_WORD, _recase)
no_punctuation = _each(_MARK, _leave_out)
markup = _each(_WORD, _mark_up)
lost_words = _each(_WORD_AND_BLANKS, _leave_out)


def truncation(texts: Sequence[str], severity: float, draw: random.Random) -> list[str]:
    """The first max(1, round((1 - severity) n)) of the n words of each text; `draw` is not used."""
    return [_truncate(text, severity) for text in texts]


# What is drawn and printed, by name.
CORRUPTIONS: dict[str, Corruption] = {
    "typing errors": typing_errors,
    "other case": other_case,
    "no punctuation": no_punctuation,
    "markup": markup,
    "lost words": lost_words,
    "truncation": truncation,
}
