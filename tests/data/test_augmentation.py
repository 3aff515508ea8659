"""EDA and AEDA: the counts of the paper's formulas, determinism, and what no operation may do."""

import random
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.augmentation import (
    MARKS,
    OPERATIONS,
    STOP_WORDS,
    AugmentationConfig,
    augment,
    augment_texts,
    check_texts,
    edits,
    punctuation_insertion,
    random_deletion,
    random_insertion,
    random_swap,
    synonym_replacement,
    synonyms,
)
from data.errors import DataError

WORDS = "Oil prices rise as the central bank cuts its official rate again and buyers return".split()
ANY_WORDS = st.lists(st.one_of(st.sampled_from(WORDS), st.text(min_size=1, max_size=5)), min_size=1, max_size=30)


def seeded(seed=0):
    return random.Random(seed)


@pytest.mark.parametrize(
    ("length", "alpha", "n"), [(10, 0.1, 1), (29, 0.1, 2), (30, 0.1, 3), (40, 0.05, 2), (5, 0.1, 1)]
)
def test_edits_follow_the_paper(length, alpha, n):
    assert edits(["w"] * length, alpha) == n
    assert edits(["w"] * length, 0) == 0


def has_synonyms(word):
    return bool(synonyms(word.lower()))


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_synonym_replacement_changes_n_words(alpha, seed):
    new = synonym_replacement(WORDS, alpha, seeded(seed))
    changed = [(old, word) for old, word in zip(WORDS, new, strict=True) if old != word]
    assert len(changed) == min(edits(WORDS, alpha), sum(map(has_synonyms, WORDS)))
    for old, word in changed:
        assert word.lower() in synonyms(old.lower()) and old.lower() not in STOP_WORDS
        assert word[0].isupper() == old[0].isupper()


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_random_insertion_adds_n_synonyms_and_keeps_the_order(alpha, seed):
    new = random_insertion(WORDS, alpha, seeded(seed))
    added = Counter(new) - Counter(WORDS)
    assert added.total() == len(new) - len(WORDS) == edits(WORDS, alpha)
    possible = {synonym for word in WORDS for synonym in synonyms(word.lower())}
    assert set(added) <= possible
    rest = iter(new)
    assert all(word in rest for word in WORDS), "the old words are no longer in their order"


@pytest.mark.parametrize("seed", range(5))
def test_random_swap_moves_words_and_loses_none(seed):
    new = random_swap(WORDS, 0.1, seeded(seed))  # n = 1: exactly two places differ
    assert Counter(new) == Counter(WORDS) and sum(a != b for a, b in zip(new, WORDS, strict=True)) == 2
    often = random_swap(WORDS, 0.5, seeded(seed))
    assert Counter(often) == Counter(WORDS) and sum(a != b for a, b in zip(often, WORDS, strict=True)) > 2


def test_random_deletion_drops_a_share_of_alpha():
    words = [str(i) for i in range(10_000)]
    for alpha in (0.1, 0.4):
        kept = random_deletion(words, alpha, seeded())
        assert abs(len(kept) / len(words) - (1 - alpha)) < 0.02  # four standard deviations
        rest = iter(words)
        assert all(word in rest for word in kept)


@pytest.mark.parametrize("operation", OPERATIONS)
@given(words=ANY_WORDS, seed=st.integers(0, 1000))
def test_alpha_zero_changes_nothing(operation, words, seed):
    assert operation(words, 0.0, seeded(seed)) == words


@pytest.mark.parametrize("operation", OPERATIONS)
@given(words=ANY_WORDS, alpha=st.floats(0, 0.99), seed=st.integers(0, 1000))
def test_no_operation_empties_a_text_or_touches_its_input(operation, words, alpha, seed):
    before = list(words)
    assert operation(words, alpha, seeded(seed))
    assert words == before


@pytest.mark.parametrize("text", ["goal", "the", "the of and", "1,000", "...", "北京", " x "])
def test_short_texts_and_stop_words_survive(text):
    new = augment(text, AugmentationConfig(n_aug=40, alpha=0.9), seeded())
    assert len(new) == 40 and all(one.strip() for one in new)
    if text == "the of and":
        assert {word for one in new for word in one.split()} == set(text.split())


def test_marks_around_a_word_stay():
    new = synonym_replacement(['"Purchase,"'], 0.1, seeded())
    assert new[0].startswith('"') and new[0].endswith(',"') and new[0] != '"Purchase,"'
    assert synonym_replacement(["PURCHASE"], 0.1, seeded())[0].isupper()


def test_all_four_operations_are_drawn():
    lengths = Counter(
        len(one.split()) - len(WORDS) for one in augment(" ".join(WORDS), AugmentationConfig(n_aug=400), seeded())
    )
    assert lengths[1] > 60 and lengths[0] > 150 and sum(lengths[less] for less in range(-9, 0)) > 40  # fmt: skip


TEXTS = [" ".join(seeded(i).sample(WORDS, 9)) for i in range(30)]
LABELS = [i % 3 for i in range(30)]


@pytest.mark.parametrize(("length", "most"), [(1, 1), (5, 1), (6, 2), (14, 4)])
def test_aeda_draws_the_number_the_mark_and_the_place_uniformly(length, most):
    """The paper's distribution, each share within four standard deviations of 4,000 draws."""
    draw, drawn = seeded(), 4000
    counts, marks, places = Counter(), Counter(), Counter()
    for _ in range(drawn):
        new = punctuation_insertion(WORDS[:length], draw)
        found = [i for i, piece in enumerate(new) if piece in MARKS]
        assert [piece for piece in new if piece not in MARKS] == WORDS[:length]
        counts[len(found)] += 1
        marks.update(new[i] for i in found)
        places.update(i - before for before, i in enumerate(found))  # the word that follows the mark
    for seen, values in ((counts, range(1, most + 1)), (marks, MARKS), (places, range(length))):
        total, share = seen.total(), 1 / len(values)
        assert set(seen) == set(values)
        assert all(abs(n / total - share) < 4 * (share * (1 - share) / total) ** 0.5 + 1e-9 for n in seen.values())


BOTH = pytest.mark.parametrize("kind", ["eda", "aeda"])


@BOTH
def test_labels_go_with_their_texts_and_the_originals_stay(kind):
    config = AugmentationConfig(kind, n_aug=3)
    texts, labels = augment_texts(TEXTS, LABELS, config, seed=0, epoch=1)
    assert len(texts) == len(labels) == 4 * 30
    assert texts[::4] == TEXTS and [labels[i::4] for i in range(4)] == [LABELS] * 4


@BOTH
def test_new_texts_depend_on_seed_epoch_and_row_alone(kind):
    config = AugmentationConfig(kind, n_aug=2)
    first = augment_texts(TEXTS, LABELS, config, 1, 2)[0]
    assert first == augment_texts(TEXTS, LABELS, config, 1, 2)[0]
    assert first != augment_texts(TEXTS, LABELS, config, 1, 3)[0]
    assert first != augment_texts(TEXTS, LABELS, config, 2, 2)[0]
    changed = augment_texts(["another text", *TEXTS[1:]], LABELS, config, 1, 2)[0]
    assert changed[3:] == first[3:], "a row depends on the rows before it"


@BOTH
def test_fixed_texts_are_the_same_in_every_epoch(kind):
    config = AugmentationConfig(kind, n_aug=2, fresh=False)
    assert augment_texts(TEXTS, LABELS, config, 1, 2) == augment_texts(TEXTS, LABELS, config, 1, 3)


def _in_a_worker(epoch):
    return augment_texts(TEXTS, LABELS, AugmentationConfig(n_aug=2), 0, epoch)[0]


def test_worker_processes_make_the_same_texts():
    with ProcessPoolExecutor(2) as pool:
        assert list(pool.map(_in_a_worker, range(4))) == [_in_a_worker(epoch) for epoch in range(4)]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("price", "cost"), ("prices", "cost"), ("went", "travel"), ("children", "kid"), ("buying", "purchase"),
        ("cities", "metropolis"), ("happier", "glad"),
    ],
)  # fmt: skip
def test_synonyms_of_a_word_and_of_its_forms(word, expected):
    assert expected in synonyms(word) and word not in synonyms(word)


def test_stop_words_and_unknown_words_have_none():
    assert not any(synonyms(word) for word in STOP_WORDS)
    assert synonyms("qwxyz") == () and synonyms("") == ()
    assert {"the", "not", "and", "was", "they", "with", "don", "t"} <= STOP_WORDS


def test_the_table_is_small_and_has_its_licence():
    folder = Path(__file__).resolve().parents[2] / "data" / "wordnet"
    assert (folder / "synonyms.txt").stat().st_size < 2 * 2**20
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in (folder / "LICENSE").read_text()


def test_texts_that_can_not_be_augmented_are_refused_by_name():
    with pytest.raises(DataError, match=r"news\.csv: 2 of 3 texts .*'Нефть дорожает'.*n_aug = 0"):
        check_texts(["Oil", "Нефть дорожает", "石油"], "news.csv", "eda")
    check_texts(["Oil", "Öl wird teurer", "石油", "1,000 !"], "news.csv", "eda")
    with pytest.raises(DataError, match=r"news\.csv: 2 of 3 texts have no space .*'Oil'.*n_aug = 0"):
        check_texts(["Oil", "Нефть дорожает", "石油价格上涨"], "news.csv", "aeda")
    check_texts(["Нефть дорожает", "石油价格上涨"], "news.csv", "aeda")


def test_substitution_by_the_masked_language_model_is_not_silently_eda():
    with pytest.raises(ValueError, match="use training.substitution.substitute"):
        augment_texts(TEXTS, LABELS, AugmentationConfig("mlm", n_aug=1), 0, 1)


def test_an_alpha_for_aeda_is_refused_by_name():
    with pytest.raises(DataError, match=r"data.augmentation.alpha is 0.05, but AEDA has no alpha; remove it"):
        AugmentationConfig("aeda", n_aug=1, alpha=0.05)


@pytest.mark.parametrize(("field", "value"), [("kind", "aeda"), ("alpha", 0.2), ("fresh", False)])
def test_settings_without_new_texts_are_refused(field, value):
    with pytest.raises(DataError, match=f"{field} is {value!r}, but n_aug is 0; set that, or remove {field}"):
        AugmentationConfig(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("n_aug", -1), ("alpha", 1.0), ("alpha", -0.1), ("alpha", float("nan"))])
def test_settings_out_of_range(field, value):
    with pytest.raises(DataError, match=f"data.augmentation.{field} is"):
        AugmentationConfig(**{field: value})
