"""Damaged text to clean text: markup and entities, punctuation, case, lemmas.

Each step is a function from a string to a string, switched on by its own setting. The steps that are on are applied in
this order, which is fixed because each one reads what the one before left:

    html          &lt;b&gt;Oil&lt;/b&gt; rises, it #39;s said  ->  Oil rises, it's said
    punctuation   “Oil” rises – again !!                         ->  "Oil" rises - again!
    lowercase     Oil rises                                       ->  oil rises
    lemmatize     oil companies were sold                         ->  oil company be sell

A step applied twice is the step applied once, and no step leaves nothing of a text that had words.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Callable
from dataclasses import dataclass

Step = Callable[[str], str]


@dataclass(frozen=True)
class CleaningConfig:
    """Which steps are applied to every text."""

    html: bool = False
    """Entities to characters, tags away; mends AG News' broken entities too."""
    punctuation: bool = False
    """Typographic marks to plain ones, repeated marks to one."""
    lowercase: bool = False
    """Every letter to its lower case."""
    lemmatize: bool = False
    """Every word to its dictionary form (English)."""


# Names of elements, so that a ticker in angle brackets (<STX.N>) or a comparison (x < 3) is not taken for a tag.
_ELEMENTS = (
    "a abbr acronym address article aside b base big blockquote body br button caption center cite code col dd del dfn "
    "div dl dt em embed fieldset figcaption figure font footer form frame h1 h2 h3 h4 h5 h6 head header hr html i "
    "iframe img input ins kbd label legend li link main map mark marquee meta nav nobr noscript object ol option p "
    "param pre q s samp script section select small span strike strong style sub sup table tbody td textarea tfoot th "
    "thead title tr tt u ul var video wbr"
)
# Their ends part words; other tags stand within a line, or within a word.
_BLOCKS = frozenset(
    "address article aside blockquote body br center dd div dl dt fieldset figure footer form h1 h2 h3 h4 h5 h6 head "
    "header hr html li main nav ol option p pre section table tbody td tfoot th thead title tr ul".split()
)
# Attributes have a value, so that "a<b and c>d" is none of them.
_TAG = re.compile(
    rf"</?({_ELEMENTS.replace(' ', '|')})(?:\s[^<>]*=[^<>]*)?\s*/?>|<!--.*?-->", re.IGNORECASE | re.DOTALL
)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z]\w{1,31});", re.IGNORECASE)
# In AG News the ampersand of many entities has become a space: "Sudan #39;s" was "Sudan&#39;s".
_BROKEN_ENTITY = re.compile(r"(?:^| )(#\d{2,4}|quot|amp|lt|gt|nbsp|apos|hellip|[mn]dash|[lr][sd]quo);")
# A backslash stands before a dollar sign, or where a line of the original ended.
_BACKSLASH = re.compile(r"\\+(\$?)")
_SPACES = re.compile(r"\s+")

_PLAIN = str.maketrans(
    {mark: plain for marks, plain in (("‘’‚‛′`´", "'"), ("“”„‟″«»", '"'), ("‐‑‒–−", "-")) for mark in marks}
    | {"—": " - ", "―": " - ", "…": "...", "\u200b": "", "\ufeff": "", "\u00ad": ""}
)
_DOUBLE_HYPHEN = re.compile(r"\s*-{2,}\s*")
_SPACE_BEFORE_MARK = re.compile(r"\s+([,.;:!?]+)(?=\s|$)")
_DOTS = re.compile(r"\.{3,}")
_REPEATED = re.compile(r"([!?,;:])\1+")
_TWO_QUOTES = re.compile(r"''+")
_WORD = re.compile(r"[^\W\d_]{2,}(?:'[^\W\d_]+)*")  # single letters are initials


def _until_stable(step: Step) -> Step:
    """The step, applied until it changes nothing: what it removes can leave a new piece of the same kind behind."""

    @functools.wraps(step)
    def stable(text: str) -> str:
        while (changed := step(text)) != text:
            text = changed
        return text

    return stable


@_until_stable
def clean_html(text: str) -> str:
    """Entities to characters, tags away, backslashes to spaces, runs of white space to one space.

    Only the tags of HTML's own elements go: `<STX.N>`, `x < 3` and `<3` stay. AG News' broken entities (" #39;" for
    "&#39;") are read as what they were.
    """
    text = _BROKEN_ENTITY.sub(r"&\1;", text)
    text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    text = _TAG.sub(lambda tag: " " if tag[1] and tag[1].lower() in _BLOCKS else "", text)
    text = _BACKSLASH.sub(lambda slash: "$" if slash[1] else " ", text)
    return _SPACES.sub(" ", text).strip()


@_until_stable
def clean_punctuation(text: str) -> str:
    """Typographic quotes, dashes and ellipses to plain ones, repeated marks to one, no space before a mark."""
    text = text.translate(_PLAIN)
    text = _TWO_QUOTES.sub('"', text)
    text = _DOUBLE_HYPHEN.sub(" - ", text)
    text = _SPACE_BEFORE_MARK.sub(r"\1", text)
    text = _REPEATED.sub(r"\1", _DOTS.sub("...", text))
    return _SPACES.sub(" ", text).strip()


def lowercase(text: str) -> str:
    """Every letter to its lower case."""
    return text.lower()


def lemmatize(text: str) -> str:
    """Every word to its dictionary form, by simplemma's English tables: "Companies were sold" -> "Company be sell".

    Words in capitals, mostly abbreviations, stay: the US is no "we".
    """
    return _WORD.sub(lambda word: word[0] if word[0].isupper() else _lemma(word[0]), text)


@functools.lru_cache(maxsize=1 << 18)
def _lemma(word: str) -> str:
    """The lemma of the lemma of ... a word: tables lead from "bettered" to "better", and from there to "good"."""
    seen = [word]
    while (lemma := _lemma_in_table(seen[-1])) not in seen:
        if not _WORD.fullmatch(lemma):  # two words, or a word and a mark: would be taken apart the next time
            return seen[-1]
        seen.append(lemma)
    return min(seen[seen.index(lemma) :])  # a circle, mostly of one word; from any of its members the same one


def _lemma_in_table(word: str) -> str:
    """simplemma's lemma, with a capital if and only if the word has one."""
    import simplemma  # reads its tables when it is first used

    lemma = simplemma.lemmatize(word, lang="en")
    return lemma[:1].upper() + lemma[1:] if word[:1].isupper() else lemma.lower()


def make_cleaner(config: CleaningConfig) -> Step:
    """The steps that `config` switches on, as one function.

    A text of nothing but markup is left as it was, rather than empty.
    """
    switches = (
        (config.html, clean_html),
        (config.punctuation, clean_punctuation),
        (config.lowercase, lowercase),
        (config.lemmatize, lemmatize),
    )
    steps = [step for on, step in switches if on]

    def clean(text: str) -> str:
        cleaned = functools.reduce(lambda so_far, step: step(so_far), steps, text)
        # What is left can read as markup that it was not: <p--=> is <p - => by now, and <bases> is <base>.
        while config.html and clean_html(cleaned) != cleaned:
            cleaned = functools.reduce(lambda so_far, step: step(so_far), steps, cleaned)
        return cleaned if cleaned.strip() else text

    return clean
