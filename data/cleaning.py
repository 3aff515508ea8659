"""Cleaning of text: markup and entities, punctuation, case, lemmas.

Each step is a function from a string to a string with a setting of its own. The steps that are on are applied in this
order, each to the output of the one before:

    html          &lt;b&gt;Oil&lt;/b&gt; rises, it #39;s said  ->  Oil rises, it's said
    punctuation   “Oil” rises – again !!                         ->  "Oil" rises - again!
    lowercase     Oil rises                                       ->  oil rises
    lemmatize     oil companies were sold                         ->  oil company be sell

Every step is idempotent, and no step empties a text that has words.
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
    """Decode entities, AG News' broken ones too, and remove tags."""
    punctuation: bool = False
    """Replace typographic marks by plain ones, and repeated marks by one."""
    lowercase: bool = False
    """Convert to lower case."""
    lemmatize: bool = False
    """Replace every word by its dictionary form (English)."""


# Only these names are tags, so that a ticker in angle brackets (<STX.N>) or a comparison (x < 3) stays.
_ELEMENTS = (
    "a abbr acronym address article aside b base big blockquote body br button caption center cite code col dd del dfn "
    "div dl dt em embed fieldset figcaption figure font footer form frame h1 h2 h3 h4 h5 h6 head header hr html i "
    "iframe img input ins kbd label legend li link main map mark marquee meta nav nobr noscript object ol option p "
    "param pre q s samp script section select small span strike strong style sub sup table tbody td textarea tfoot th "
    "thead title tr tt u ul var video wbr"
)
# Block elements separate words; other tags are inline, possibly within a word.
_BLOCKS = frozenset(
    "address article aside blockquote body br center dd div dl dt fieldset figure footer form h1 h2 h3 h4 h5 h6 head "
    "header hr html li main nav ol option p pre section table tbody td tfoot th thead title tr ul".split()
)
# An attribute must have a value, so that "a<b and c>d" is not a tag.
_TAG = re.compile(
    rf"</?({_ELEMENTS.replace(' ', '|')})(?:\s[^<>]*=[^<>]*)?\s*/?>|<!--.*?-->", re.IGNORECASE | re.DOTALL
)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z]\w{1,31});", re.IGNORECASE)
# In AG News, the ampersand of many entities is a space: "Sudan #39;s" for "Sudan&#39;s".
_BROKEN_ENTITY = re.compile(r"(?:^| )(#\d{2,4}|quot|amp|lt|gt|nbsp|apos|hellip|[mn]dash|[lr][sd]quo);")
# In AG News, a backslash precedes a dollar sign or replaces a line break.
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
    """The step, repeated until it changes nothing: removing a tag or mark can create another one."""

    @functools.wraps(step)
    def stable(text: str) -> str:
        while (changed := step(text)) != text:
            text = changed
        return text

    return stable


@_until_stable
def clean_html(text: str) -> str:
    """Decode entities, remove tags, replace backslashes and runs of white space by one space.

    Only tags of HTML elements are removed: `<STX.N>`, `x < 3` and `<3` stay. AG News' broken entities (" #39;" for
    "&#39;") are decoded too.
    """
    text = _BROKEN_ENTITY.sub(r"&\1;", text)
    text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    text = _TAG.sub(lambda tag: " " if tag[1] and tag[1].lower() in _BLOCKS else "", text)
    text = _BACKSLASH.sub(lambda slash: "$" if slash[1] else " ", text)
    return _SPACES.sub(" ", text).strip()


@_until_stable
def clean_punctuation(text: str) -> str:
    """Replace typographic quotes, dashes and ellipses by plain ones, repeated marks by one; no space before a mark."""
    text = text.translate(_PLAIN)
    text = _TWO_QUOTES.sub('"', text)
    text = _DOUBLE_HYPHEN.sub(" - ", text)
    text = _SPACE_BEFORE_MARK.sub(r"\1", text)
    text = _REPEATED.sub(r"\1", _DOTS.sub("...", text))
    return _SPACES.sub(" ", text).strip()


def lowercase(text: str) -> str:
    """Convert to lower case."""
    return text.lower()


def lemmatize(text: str) -> str:
    """Replace every word by its lemma in simplemma's English tables: "Companies were sold" -> "Company be sell".

    Words in capitals, mostly abbreviations, stay: "US" is not a form of "we".
    """
    return _WORD.sub(lambda word: word[0] if word[0].isupper() else _lemma(word[0]), text)


@functools.lru_cache(maxsize=1 << 18)
def _lemma(word: str) -> str:
    """The lemma of the lemma of ... a word: the tables lead from "bettered" to "better", and from there to "good"."""
    seen = [word]
    while (lemma := _lemma_in_table(seen[-1])) not in seen:
        if not _WORD.fullmatch(lemma):  # two words, or a word and a mark: not idempotent
            return seen[-1]
        seen.append(lemma)
    return min(seen[seen.index(lemma) :])  # a cycle, mostly of one word: the same result from any of its words


def _lemma_in_table(word: str) -> str:
    """simplemma's lemma, capitalized if and only if the word is."""
    import simplemma  # loads its tables at the first call

    lemma = simplemma.lemmatize(word, lang="en")
    return lemma[:1].upper() + lemma[1:] if word[:1].isupper() else lemma.lower()


def make_cleaner(config: CleaningConfig) -> Step:
    """The steps that `config` switches on, as one function.

    A text of nothing but markup is returned unchanged, rather than empty.
    """
    switches = (
        (config.html, clean_html),
        (config.punctuation, clean_punctuation),
        (config.lowercase, lowercase),
        (config.lemmatize, lemmatize),
    )
    steps = [step for on, step in switches if on]

    @_until_stable  # later steps can create markup: <p--=> becomes <p - =>, and <bases> becomes <base>
    def apply_steps(text: str) -> str:
        return functools.reduce(lambda cleaned, step: step(cleaned), steps, text)

    def clean(text: str) -> str:
        cleaned = apply_steps(text)
        return cleaned if cleaned.strip() else text

    return clean
