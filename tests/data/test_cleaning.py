"""Cleaning: each step on the kinds of damage in AG News, and properties of any text."""

import csv
import functools
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data.cleaning import CleaningConfig, clean_html, clean_punctuation, lemmatize, lowercase, make_cleaner
from data.sources import LabelledText, Split

HTML = [
    # entities, with an ampersand or with a space instead
    ("Sun&amp;Moon Ltd. sues", "Sun&Moon Ltd. sues"),
    ("Tokyo #39;s index slips", "Tokyo's index slips"),
    ("the  #39;hands-off #39; plan", "the 'hands-off' plan"),
    (" quot;We won, quot; she said", '"We won," she said'),
    ("he called it  quot;a joke quot; twice", 'he called it "a joke" twice'),
    ("a deal worth  #36;30 million", "a deal worth $30 million"),
    ("US #36;600 a ton", "US$600 a ton"),
    ("Procter  amp; Gamble", "Procter & Gamble"),
    ("J amp;J and S amp;P fell", "J&J and S&P fell"),
    ("late  #151; very late  #151; goal", "late — very late — goal"),
    ("wait for it  hellip; there", "wait for it … there"),
    ("caf&eacute; and r&#233;sum&#xE9;", "café and résumé"),
    ("one&nbsp;two nbsp;three", "one two three"),
    ("5 &lt; 7 &gt; 3", "5 < 7 > 3"),
    ("&amp;lt;b&amp;gt;twice escaped&amp;lt;/b&amp;gt;", "twice escaped"),
    ("#39;tis the season", "'tis the season"),
    # tags
    ("&lt;b&gt;Update:&lt;/b&gt; rates hold", "Update: rates hold"),
    ("&lt;B&gt;ANALYSIS&lt;/B&gt;: why", "ANALYSIS: why"),
    ('shares of &lt;A HREF="http://example.com/q?s=ABC.X"&gt;ABC.X&lt;/A&gt; rose', "shares of ABC.X rose"),
    ("(&lt;a href='x'&gt;ABC.X&lt;/a&gt;)", "(ABC.X)"),
    ("first&lt;br&gt;second", "first second"),
    ("first&lt;BR/&gt;second", "first second"),
    ("first&lt;p&gt;second&lt;/p&gt;third", "first second third"),
    ('&lt;FONT face="verdana,arial" size=-2&gt;small&lt;/FONT&gt; print', "small print"),
    ("&lt;strong&gt;Live&lt;/strong&gt; from &lt;cite&gt;The Log&lt;/cite&gt;", "Live from The Log"),
    ("&lt;em&gt;very&lt;/em&gt; fast", "very fast"),
    ('see &lt;img src="a.gif" alt=""/&gt; here', "see here"),
    ("&lt;!-- a note --&gt;text", "text"),
    ("<<b>b>nested", "nested"),
    ("un<i>break</i>able", "unbreakable"),
    # backslashes
    (r"costs \$5 or \$6", "costs $5 or $6"),
    ("a line\\of the wire\\another", "a line of the wire another"),
    (r"ends here\\ and goes on", "ends here and goes on"),
    # spaces
    ("  two   spaces \t and\n lines ", "two spaces and lines"),
    # not markup
    ("x < 3 and y > 2", "x < 3 and y > 2"),
    ("R&D at AT&T", "R&D at AT&T"),
    ("I <3 football", "I <3 football"),
    ("maker Acme &lt;ACM.N&gt; said", "maker Acme <ACM.N> said"),
    ("<unknown> stays", "<unknown> stays"),
    ("a<b and c>d", "a<b and c>d"),
    ("No. #1 on the list", "No. #1 on the list"),
    ("bed &breakfast; a name", "bed &breakfast; a name"),
    ("the quote; amplitude", "the quote; amplitude"),
]
PUNCTUATION = [
    ("“Oil” and ‘gas’", "\"Oil\" and 'gas'"),
    ("«Oil» „gas“", '"Oil" "gas"'),
    ("``Oil'' rises", '"Oil" rises'),
    ("2004–2005", "2004-2005"),
    ("late—very late", "late - very late"),
    ("millions -- but few", "millions - but few"),
    ("wait…", "wait..."),
    ("wait.......", "wait..."),
    ("Really??? Yes!!!", "Really? Yes!"),
    ("one,, two;; three", "one, two; three"),
    ("a word , a stop .", "a word, a stop."),
    ("rose .5 percent", "rose .5 percent"),
    ("again ! !", "again!"),
    ("zero\u200bwidth and soft\u00adhyphen", "zerowidth and softhyphen"),
    ("U.S. G.D.P.", "U.S. G.D.P."),
    ("1,000.50", "1,000.50"),
]
LEMMAS = [
    ("prices were rising", "price be rise"),
    ("companies were selling shares", "company be sell share"),
    ("Reuters", "Reuters"),
    ("Companies in the US", "Company in the US"),
    ("china and China", "china and China"),
    ("U.S. and N. Korea", "U.S. and N. Korea"),
    ("3 goals, 2 cups!", "3 goal, 2 cup!"),
]


@pytest.mark.parametrize(("before", "after"), HTML)
def test_html(before, after):
    assert clean_html(before) == after


@pytest.mark.parametrize(("before", "after"), PUNCTUATION)
def test_punctuation(before, after):
    assert clean_punctuation(before) == after


@pytest.mark.parametrize(("before", "after"), LEMMAS)
def test_lemmas(before, after):
    assert lemmatize(before) == after


STEPS = [clean_html, clean_punctuation, lowercase, lemmatize]
ALL = make_cleaner(CleaningConfig(html=True, punctuation=True, lowercase=True, lemmatize=True))
# Pieces of markup among random characters, so that the rules apply.
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from(["&lt;", "&gt;", "&amp;", " #39;", " quot;", "<b>", "</b>", "<br", "b", ">", "<", "&", ";"]),
        st.sampled_from(["\\", "\\$", "--", "—", "...", " ,", "!!", "''", "saw", "Bases", "better", " ", "İ", "ΑΣ"]),
    ),
    max_size=12,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("step", [*STEPS, ALL])
@given(text=TEXTS)
@example("&amp;amp;amp;lt;b&gt;")
@example("&l<b>t;")
@example("rose , .5")
@example("0<P--=&GT;")
@example("a <b\u200b>x")
@example("to &HEARTS; and <bases> of")
def test_steps_are_idempotent(step, text):
    assert step(step(text)) == step(text)


@pytest.mark.parametrize("step", [*STEPS, ALL])
@given(words=st.lists(st.from_regex(r"[A-Za-z]{1,9}", fullmatch=True), min_size=1, max_size=6), text=TEXTS)
def test_words_outside_markup_are_never_emptied(step, words, text):
    assert step(" ".join(words)).strip()
    assert ALL(text).strip() or not text.strip()


@pytest.mark.parametrize("text", ["<br>", " &nbsp; ", "\\", "&lt;b&gt;&lt;/b&gt;"])
def test_a_text_of_nothing_but_markup_stays(text):
    assert make_cleaner(CleaningConfig(html=True))(text) == text


def test_steps_are_switched_one_by_one_and_applied_in_order():
    text = "&lt;b&gt;PRICES&lt;/b&gt; Rising – again !!"
    assert make_cleaner(CleaningConfig())(text) == text
    assert make_cleaner(CleaningConfig(html=True))(text) == "PRICES Rising – again !!"
    assert make_cleaner(CleaningConfig(html=True, punctuation=True))(text) == "PRICES Rising - again!"
    assert make_cleaner(CleaningConfig(html=True, punctuation=True, lowercase=True))(text) == "prices rising - again!"
    assert ALL(text) == "price rise - again!"


def test_every_split_is_cleaned_and_nothing_else_changes():
    text = LabelledText(Split(["A"], [1]), Split(["B"], [0]), Split(["C"], [1]), ("x", "y"), "here")
    cleaned = text.cleaned(CleaningConfig(lowercase=True))
    assert cleaned == LabelledText(Split(["a"], [1]), Split(["b"], [0]), Split(["c"], [1]), ("x", "y"), "here")


@functools.cache
def real_texts(folder):
    rows = [row for name in ("train", "test") for row in csv.reader((folder / f"{name}.csv").open(encoding="utf-8"))]
    return [f"{title} {description}" for _, title, description in rows]


def test_real_news_is_left_without_damage(shared):
    texts = real_texts(shared / "ag_news_csv")
    cleaned = [clean_html(text) for text in texts]
    assert cleaned == [clean_html(text) for text in cleaned]
    damage = re.compile(r"&(#\d+|\w+);|(^|\s)(#\d+|quot|amp|nbsp);|</?(a|b|i|p|br|font|strong)\b|\\", re.IGNORECASE)
    assert sum(bool(damage.search(text)) for text in texts) > 1000
    assert not [text for text in cleaned if damage.search(text)]
    everything = [ALL(text) for text in texts]
    assert all(everything) and everything == [ALL(text) for text in everything]


def test_undamaged_real_news_keeps_its_words(shared):
    untouched = re.compile(r"[\w\s.,'()-]*")
    texts = [text for text in real_texts(shared / "ag_news_csv") if untouched.fullmatch(text)]
    assert len(texts) > 2000
    for text in texts:
        assert clean_html(text).split() == text.split()
