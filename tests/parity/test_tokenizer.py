"""Token ids equal those of transformers, for real news and for hostile strings."""

import base64
import csv
import json
import struct

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
    assert ours.encode_windows(["oil", "oil oil oil oil oil"])[1] == [False, True]
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


# --- folders as they are published ----------------------------------------------------------------------------------

WORDS = ["oil", "price", "##s", "rise", "un", "##rise", ",", "Oil", "été", "ete", "汉", "汉字", "<", ">", "new", "b"]
PIECES = [
    "▁",
    "▁oil",
    "▁price",
    "s",
    "o",
    "i",
    "l",
    "▁rise",
    "rise",
    "e",
    "n",
    "w",
    "new",
    "a",
    "▁a",
    "<",
    ">",
    "b",
    "t",
]
LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["o i", "oi l", "Ġ oil", "r i", "ri s", "ris e", "Ġ rise", "n e", "ne w"]
ROBERTA = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    *LETTERS,
    *("".join(m.split()) for m in MERGES),
    "<mask>",
    "<b>",
    "<e>",
    "<p>",
]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "<b>", "<e>", "<p>"]
XLM = ["<s>", "<pad>", "</s>", "<unk>", *PIECES, "<mask>", "<b>", "<e>", "<p>"]
CAMEMBERT = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<s>", "</s>", *PIECES, "<mask>", "<b>"]
NEW, FLAGS = {"content": "new"}, {"lstrip": True, "normalized": False, "rstrip": False, "single_word": False}
TEXTS = [
    "Oil prices rise",
    "  oil",
    "Été un 汉字 rise",
    "oil new oil<new>oil <b> a <e><p> b",
    "<s> [CLS] <mask> [MASK] oil  <mask>oil </s> [SEP]",
    "OIL unrise, OIL NEW\u00a0Oil",
    "oil rise a new b e w s",
    "",
]


def charsmap():
    """A character map of SentencePiece that turns "O" into "o": a trie of two nodes (Darts' double array)."""
    units = [0] * 512
    units[0], units[256 ^ ord("O")], units[256 ^ ord("O") ^ 1] = 256 << 10, ord("O") | 1 << 8 | 1 << 10, 0
    return base64.b64encode(struct.pack("<513I", 2048, *units) + b"o\0").decode()


def numbered(words):
    return {word: i for i, word in enumerate(words)}


def added(*tokens, **flags):
    """An entry of tokenizer.json or added_tokens_decoder."""
    return [{"id": i, "content": token, **FLAGS, "special": True} | flags for i, token in tokens]


def folder_of(folder, kind, files):
    """A folder with the vocabulary of `kind`; `files`: name -> fields that differ from those of the kind."""
    folder.mkdir()
    model = kind.removesuffix(" json")
    content = {"config.json": {"model_type": model}}
    if kind == "roberta":
        (folder / "vocab.json").write_text(json.dumps(numbered(ROBERTA)))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    elif kind == "bert":
        (folder / "vocab.txt").write_text("\n".join(BERT) + "\n")
    else:
        lower = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
        marks = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
        raw = {
            "roberta": {
                "model": {"type": "BPE", "vocab": numbered(ROBERTA), "merges": MERGES},
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
                "post_processor": {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0],
                                   "trim_offsets": True, "add_prefix_space": False},
                "added_tokens": added((0, "<s>"), (2, "</s>")),
            },
            "bert": {
                "model": {"type": "WordPiece", "vocab": numbered(BERT), "unk_token": "[UNK]",
                          "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
                "normalizer": {"type": "BertNormalizer", **lower},
                "pre_tokenizer": {"type": "BertPreTokenizer"},
                "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
                "added_tokens": added((2, "[CLS]"), (3, "[SEP]")),
            },
        }.get(model) or {
            "model": {"type": "Unigram", "unk_id": 3, "byte_fallback": False,
                      "vocab": [[word, -float(i)] for i, word in enumerate(XLM if model[0] == "x" else CAMEMBERT)]},
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Precompiled", "precompiled_charsmap": charsmap()}]},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, marks]},
            "post_processor": {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]},
            "added_tokens": [],
        }  # fmt: skip
        content["tokenizer.json"] = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None} | raw
    for name in {**content, **files}:
        (folder / name).write_text(json.dumps(content.get(name, {}) | files.get(name, {})))
    return folder


SETTINGS, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
OTHER_NAMES = {"bos_token": "<b>", "cls_token": "<b>", "eos_token": "<e>", "sep_token": "<e>", "pad_token": "<p>"}
LIST = {"additional_special_tokens": ["<new>", "new"]}
CASES = [  # (kind, files, whether they change the ids of TEXTS)
    *((kind, {}, False) for kind in ("roberta", "roberta json", "bert", "bert json", "xlm-roberta", "camembert")),
    # RoBERTa, and what holds for every class: which file names tokens
    ("roberta", {ADDED: {"<new>": 500, "unrise": 400}}, True),
    ("roberta", {SETTINGS: {"added_tokens_decoder": {"400": NEW | FLAGS, "300": {"content": "<new>"}}}}, True),
    ("roberta", {SETTINGS: {"added_tokens_decoder": {}}, MAP: LIST, ADDED: {"oil": 500}}, False),
    ("roberta", {MAP: LIST, ADDED: {"rise": 500, "new": 501}}, True),
    ("roberta", {SETTINGS: LIST}, True),
    ("roberta", {SETTINGS: LIST, MAP: {"additional_special_tokens": ["oil"]}}, True),
    ("roberta", {SETTINGS: {"extra_special_tokens": ["new"]}, MAP: {"extra_special_tokens": ["<new>"]}}, True),
    ("roberta", {SETTINGS: {"extra_special_tokens": {"image_token": "new"}, "audio_token": "<new>"}}, True),
    ("roberta", {SETTINGS: {"cls_token": "<e>"}, MAP: OTHER_NAMES | {"sep_token": {"content": "<e>"} | FLAGS}}, True),
    ("roberta", {SETTINGS: {"cls_token": "<one>", "sep_token": {"__type": "AddedToken", "content": "<two>"}}}, True),
    ("roberta", {SETTINGS: {"mask_token": None}}, True),
    ("roberta", {SETTINGS: {"add_prefix_space": True}}, True),
    ("roberta", {SETTINGS: {"truncation_side": "left"}}, True),
    ("roberta", {"config.json": {"tokenizer_class": "RobertaTokenizerFast", "model_type": "bert"}}, False),
    ("roberta json", {SETTINGS: {"add_prefix_space": True}}, True),
    ("roberta json", {SETTINGS: {"tokenizer_class": "RobertaTokenizer", "truncation_side": "left"}}, True),
    ("roberta json", {"tokenizer.json": {"added_tokens": added((500, "new"))}, ADDED: {"new": 10}}, True),
    ("roberta json", {"tokenizer.json": {"added_tokens": added((500, "new"))},
                      SETTINGS: {"added_tokens_decoder": {"400": {"content": "<new>"}}}}, True),
    # BERT
    ("bert", {SETTINGS: {"do_lower_case": False}}, True),
    ("bert", {SETTINGS: {"strip_accents": False}}, True),
    ("bert", {SETTINGS: {"do_lower_case": False, "strip_accents": True}}, True),
    ("bert", {SETTINGS: {"tokenize_chinese_chars": False}}, True),
    ("bert", {SETTINGS: OTHER_NAMES | {"unk_token": "b"}}, True),
    ("bert", {MAP: LIST | OTHER_NAMES, ADDED: {"rise,": 50}}, True),
    ("bert", {SETTINGS: {"mask_token": "NEW"}, ADDED: {"NEW": 50, "UNRISE": 51}}, True),
    ("bert json", {SETTINGS: {"do_lower_case": False, "strip_accents": None}}, True),
    ("bert json", {SETTINGS: {"tokenizer_class": "BertTokenizer", "tokenize_chinese_chars": False}}, True),
    ("bert json", {SETTINGS: {"truncation_side": "left"}}, True),
    ("bert json", {"tokenizer.json": {"truncation": {"direction": "Left", "max_length": 9, "stride": 0,
                                                     "strategy": "LongestFirst"}}}, True),
    ("bert json", {"tokenizer.json": {"normalizer": None, "pre_tokenizer": None, "post_processor": None}}, False),
    # XLM-R and CamemBERT
    ("xlm-roberta", {SETTINGS: {"add_prefix_space": False}}, True),
    ("xlm-roberta", {"tokenizer.json": {"normalizer": None}}, True),
    ("xlm-roberta", {MAP: OTHER_NAMES | {"cls_token": "b", "mask_token": {"content": "<mask>"} | FLAGS},
                     ADDED: {"new": 99}}, True),
    ("xlm-roberta", {SETTINGS: LIST | {"tokenizer_class": "XLMRobertaTokenizer", "truncation_side": "left"}}, True),
    ("camembert", {SETTINGS: {"add_prefix_space": False, "additional_special_tokens": ["new"]}}, True),
    ("camembert", {MAP: OTHER_NAMES | {"mask_token": "a"}, ADDED: {"<new>": 99}}, True),
    ("camembert", {"config.json": {"model_type": "xlm-roberta"}}, False),
    # tokenizer.json as it is
    ("bert json", {SETTINGS: {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False}}, True),
    ("bert json", {SETTINGS: {"tokenizer_class": "TokenizersBackend", "truncation_side": "left"} | OTHER_NAMES}, True),
    ("roberta json", {SETTINGS: LIST | {"tokenizer_class": "PreTrainedTokenizerFast"}, MAP: OTHER_NAMES,
                      ADDED: {"rise": 1, "<new>": 2}}, True),
    ("roberta json", {SETTINGS: {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": True},
                      "tokenizer.json": {"padding": {"strategy": "BatchLongest", "direction": "Right", "pad_id": 1,
                      "pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "<p>"}}}, True),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "files", "changes"), CASES)
def test_the_files_of_a_folder(tmp_path, kind, files, changes):
    """Each setting in each file, here and in transformers; and what is saved gives the same ids in both."""
    folder, saved = folder_of(tmp_path / "folder", kind, files), tmp_path / "saved"
    plain = folder_of(tmp_path / "plain", kind, {})
    assert (our_ids(folder) != our_ids(plain)) == changes
    saved.mkdir()
    TextTokenizer.from_directory(folder, 40).save(saved)
    for where in (folder, saved):
        theirs, ours = transformers.AutoTokenizer.from_pretrained(where), TextTokenizer.from_directory(where, 40)
        for length, found in zip((40, 6), our_ids(where), strict=True):
            for text, ids, expected in zip(TEXTS, found, their_ids(theirs, TEXTS, length), strict=True):
                assert_same(ids, expected, f"{where.name}, {length}, {text!r}")
        assert_same(ours.pad_token_id, theirs.pad_token_id if theirs.pad_token else ours.pad_token_id, "padding id")
        assert_same(ours.vocab_size, max(theirs.get_vocab().values()) + 1, "size")


def our_ids(folder):
    """The ids of TEXTS, complete and truncated."""
    return [TextTokenizer.from_directory(folder, length).encode_batch(TEXTS) for length in (40, 6)]
