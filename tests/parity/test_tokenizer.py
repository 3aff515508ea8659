"""Token ids equal those of transformers, for real news and for hostile strings."""

import csv

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from roberta.tokenizer import TextTokenizer
from tests.parity.oracle import assert_same

HOSTILE = [
    "",
    " ",
    "   leading and trailing   ",
    "\t\n\r\x0b\x0c",
    "emoji 👍🏽 👩‍👩‍👧‍👦 🇩🇪",
    "combining é ä̈ Z̷̡͓a̸l̶g̵o̸",
    "control \x00 \x01 \x1f \x7f \x80 \x9f",
    "zero\u200bwidth\u200d\ufeff\u2060",
    "rtl \u202e abc \u202c עברית العربية",
    "汉字 かな 한글 ไทย हिन्दी",
    "<s> written </s> in <pad> the <mask> text <unk>",
    "a<mask>b <mask> c   <mask>",
    "<s></s>",
    "[CLS] [SEP] [PAD] [MASK] [UNK]",
    "Ġ Ċ ĉ Ã©",
    "\U0010ffff\ue000\ufffd",
    "x" * 5000,
    "word " * 2000,
    "don't can't I'LL we've 'tis",
    "1234567890 3.14 1,000,000 $1.35 #39;s quot;",
]


@pytest.fixture(scope="module")
def real_vocabulary(shared):
    folder = shared / "roberta-base-tokenizer"
    theirs = transformers.RobertaTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    return folder, theirs


def their_ids(tokenizer, texts, max_length):
    return tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]


@pytest.mark.parametrize("max_length", [512, 128, 7])
def test_hostile_strings(real_vocabulary, max_length):
    folder, theirs = real_vocabulary
    ours = TextTokenizer.from_directory(folder, max_length)
    for text, ids, expected in zip(
        HOSTILE, ours.encode_batch(HOSTILE), their_ids(theirs, HOSTILE, max_length), strict=True
    ):
        assert_same(ids, expected, repr(text))


def test_real_news(real_vocabulary, shared):
    folder, theirs = real_vocabulary
    with (shared / "ag_news_csv" / "test.csv").open(newline="", encoding="utf-8") as file:
        texts = [f"{title} {description}" for _, title, description in csv.reader(file)]
    assert len(texts) == 1000
    ours = TextTokenizer.from_directory(folder, 128)
    for text, ids, expected in zip(texts, ours.encode_batch(texts), their_ids(theirs, texts, 128), strict=True):
        assert_same(ids, expected, repr(text))


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_string(real_vocabulary, text):
    folder, theirs = real_vocabulary
    assert_same(_tokenizer_once(folder).encode_batch([text]), their_ids(theirs, [text], 64), repr(text))


def _tokenizer_once(folder, kept={}):  # noqa: B006  reading the vocabulary for each example would take minutes
    if folder not in kept:
        kept[folder] = TextTokenizer.from_directory(folder, 64)
    return kept[folder]


def test_special_ids_and_size(real_vocabulary):
    folder, theirs = real_vocabulary
    ours = TextTokenizer.from_directory(folder, 16)
    assert ours.pad_token_id == theirs.pad_token_id == 1
    assert ours.vocab_size == len(theirs) == 50265


def test_saved_tokenizer_opens_in_transformers(real_vocabulary, tmp_path):
    folder, theirs = real_vocabulary
    TextTokenizer.from_directory(folder, 128).save(tmp_path)
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert_same(their_ids(opened, HOSTILE, 128), their_ids(theirs, HOSTILE, 128), "ids")
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).truncation is None  # whoever reads it chooses a length
    again = TextTokenizer.from_directory(tmp_path, 128)
    assert_same(again.encode_batch(HOSTILE), their_ids(theirs, HOSTILE, 128), "ids")


@pytest.fixture
def word_pieces(tmp_path):
    """A small BERT-like tokenizer.json."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "oil", "price", "##s", "rise", "un", "##rise", ",", "a"]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(words[:5])
    tokenizer.enable_padding(length=50)  # as some published files have it; batches are padded elsewhere
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_word_pieces(word_pieces, tmp_path):
    ours = TextTokenizer.from_directory(word_pieces, 6)
    assert ours.encode_batch(["Oil prices rise", "a", "zebra, unrise oil oil oil"]) == [
        [2, 5, 6, 7, 8, 3],
        [2, 12, 3],
        [2, 1, 11, 9, 10, 3],
    ]
    assert ours.pad_token_id == 0
    assert ours.encode_batch_with_cuts(["oil", "oil oil oil oil oil"])[1] == [False, True]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(word_pieces / "tokenizer.json"))
    texts = ["Oil prices rise", "[SEP] a [MASK]", "", "zebra, unrise"]
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert_same(ids, theirs(text, truncation=True, max_length=6, padding=False)["input_ids"], text)


def test_saved_word_pieces_beside_a_roberta_model_open_in_transformers(word_pieces, tmp_path):
    """A BERT checkpoint is exported as a RoBERTa model; its vocabulary must not be taken for RoBERTa's."""
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "roberta"}')
    ours = TextTokenizer.from_directory(word_pieces, 6)
    ours.save(folder)
    opened = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["Oil prices rise", "[SEP] a [MASK]", "", "zebra, unrise oil oil oil"]
    assert_same(ours.encode_batch(texts), their_ids(opened, texts, None), "ids")  # None: the length the folder names
    assert (opened.pad_token, opened.cls_token, opened.sep_token) == ("[PAD]", "[CLS]", "[SEP]")
