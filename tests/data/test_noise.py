"""Corrupted texts: the share that a severity means, the seed decides, and no text is lost."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.cleaning import clean_html
from data.noise import CORRUPTIONS, lost_words, markup, no_punctuation, other_case, truncation, typing_errors

ROW = "Oil prices,  which the central bank watches, rise again in New York; buyers return to (the) market today."
TEXTS = [ROW] * 100
WORDS = len(ROW.split())


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS)
@given(texts=st.lists(st.text()), severity=st.floats(0, 1), seed=st.integers(0, 9))
def test_any_corruption_is_decided_by_the_seed_and_leaves_something(corrupt, texts, severity, seed):
    assert corrupt(texts, 0, random.Random(seed)) == texts
    corrupted = corrupt(texts, severity, random.Random(seed))
    assert corrupted == corrupt(texts, severity, random.Random(seed))
    assert [bool(text.strip()) for text in corrupted] == [bool(text.strip()) for text in texts]


@pytest.mark.parametrize("corrupt", [c for c in CORRUPTIONS.values() if c is not truncation])
def test_another_seed_is_another_corruption(corrupt):
    assert corrupt(TEXTS, 0.2, random.Random(0)) != corrupt(TEXTS, 0.2, random.Random(1))


def changed_words(corrupt, severity):
    """Share of the words that differ, by position."""
    pairs = zip(TEXTS, corrupt(TEXTS, severity, random.Random(0)), strict=True)
    return sum(a != b for old, new in pairs for a, b in zip(old.split(), new.split(), strict=True)) / (100 * WORDS)


@pytest.mark.parametrize("severity", [0.1, 0.4, 1.0])
def test_the_severity_is_the_share_of_words_or_marks(severity):
    close = pytest.approx(severity, abs=0.03)  # 1,800 words: twice the standard error of a share of 0.4 is 0.023
    # Each word of the row has letters, in one run.
    assert changed_words(CORRUPTIONS["typing errors"], severity) == close
    assert changed_words(CORRUPTIONS["other case"], severity) == close
    corrupted = "".join(no_punctuation(TEXTS, severity, random.Random(0)))
    assert 1 - sum(corrupted.count(mark) for mark in ",;().") / 600 == pytest.approx(severity, abs=0.04)
    marked = "".join(markup(TEXTS, severity, random.Random(0)))
    count = marked.count("</") + marked.count("<br />") + marked.count("&nbsp;")
    assert count / (100 * WORDS) == close
    if severity < 1:  # then all words stay, rather than none
        left = sum(len(text.split()) for text in lost_words(TEXTS, severity, random.Random(0)))
        assert 1 - left / (100 * WORDS) == close


def test_typing_errors_are_of_one_letter():
    corrupted = [typing_errors(["oil"], 1, random.Random(seed))[0] for seed in range(200)]
    # Swapped, left out, twice, and beside on the keyboard.
    assert {*corrupted} == {*"iol oli il ol oi ooil oiil oill iil pil oul ool oik".split()}
    assert {typing_errors(["A 3.5 U.S."], 1, random.Random(seed))[0] for seed in range(9)} == {"A 3.5 U.S."}
    assert any(text in ("PIL", "IIL") for seed in range(99) for text in typing_errors(["OIL"], 1, random.Random(seed)))


def test_case_marks_and_words():
    draw = random.Random(0)
    assert other_case(["Oil prices at 3.5"], 1, draw) == ["oil PRICES AT 3.5"]
    assert no_punctuation(["It's 3.5 %, (again)!", "?!"], 1, draw) == ["Its 35  again", "?!"]
    assert lost_words(["oil price"], 1, draw) == ["oil price"]


@pytest.mark.parametrize(
    ("severity", "expected"), [(0.25, "a  b c"), (0.5, "a  b"), (0.74, "a"), (1, "a"), (0, "a  b c d ")]
)
def test_truncation_keeps_the_first_words(severity, expected):
    assert truncation(["a  b c d "], severity, random.Random(0)) == [expected]


def test_cleaning_removes_the_markup():
    for text in markup(TEXTS, 0.5, random.Random(0)):
        assert clean_html(text) == clean_html(ROW)
