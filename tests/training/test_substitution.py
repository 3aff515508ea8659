"""Substitution by the masked language model: its distribution against transformers', which words, determinism."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from data.augmentation import AugmentationConfig
from data.batching import encode_split
from data.sources import Split
from roberta.masked_lm import load_masked_lm
from roberta.tokenizer import TextTokenizer
from tests.parity.oracle import reference_model
from training import setup
from training.errors import ConfigError
from training.precision import Compute
from training.substitution import _is_word, check_words, substitute, whole_words

CPU = Compute(torch.device("cpu"), "fp32")
ENTRIES = "<s> <pad> </s> <unk> <mask> Ġoil Ġprice Ġbank Ġgoal Ġmatch ing , Ġ7".split()
WORDS = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer(models.Unigram([(entry, -1.0) for entry in ENTRIES], unk_id=3))
    made.pre_tokenizer = pre_tokenizers.Metaspace("Ġ")
    made.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 0))
    made.add_special_tokens(ENTRIES[:5])
    return TextTokenizer(made, 16)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Ours and that of transformers."""
    folder = tmp_path_factory.mktemp("masked-lm")
    reference = reference_model(head="MaskedLM", vocab_size=len(ENTRIES))
    reference.save_pretrained(folder)
    return load_masked_lm(folder), reference


def texts_of(split):
    return [split.input_ids[a:b].tolist() for a, b in zip(split.offsets[:-1], split.offsets[1:], strict=True)]


def test_samples_have_the_distribution_of_the_masked_words(tokenizer, pair):
    """Each share within four standard deviations of 10,000 draws; `matching` is two tokens and stays, as do , and 7."""
    ours, theirs = pair
    sizes: list[int] = []
    hook = ours.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    split = encode_split(Split(["goal matching oil, 7 bank"], [1]), tokenizer)
    (ids,) = texts_of(split)
    assert ids == [0, 8, 9, 10, 5, 11, 12, 7, 2]
    new = substitute(split, ours, tokenizer, AugmentationConfig("mlm", n_aug=10_000, alpha=0.7), 0, 1, CPU)
    hook.remove()
    assert max(sizes) == 64, "the memory of a pass grows with n_aug"
    first, *rest = texts_of(new)
    assert first == ids and len(rest) == 10_000 and set(new.labels) == {1}
    # n = floor(0.7 * 3) = 2 of the three words, at 1, 4 and 7, each pair as often.
    expected = np.zeros((len(ids), len(ENTRIES)))
    for pair_of_places in ([1, 4], [1, 7], [4, 7]):
        masked = torch.tensor([ids])
        masked[0, pair_of_places] = 4
        with torch.no_grad():
            logits = theirs.double()(masked, attention_mask=torch.ones_like(masked)).logits[0]
        for place in {1, 4, 7} - set(pair_of_places):
            expected[place, ids[place]] += 1 / 3
        for place in pair_of_places:
            expected[place, WORDS] += logits[place, WORDS].softmax(dim=0).numpy() / 3
    for place, share in enumerate(expected):
        seen = Counter(text[place] for text in rest)
        if place not in (1, 4, 7):
            assert seen == {ids[place]: 10_000}
            continue
        found = np.array([seen[entry] for entry in range(len(ENTRIES))]) / 10_000
        assert (abs(found - share) <= 4 * np.sqrt(share * (1 - share) / 10_000)).all(), (place, found, share)


def test_words_of_byte_level_bpe_and_of_sentencepiece():
    entries = ["Ġoil", "▁oil", "▁Öl", "ĠÃ", "oil", "Ġ", "Ġ7", "Ġ,", "<mask>", ""]
    assert [entry for entry in entries if _is_word(entry)] == ["Ġoil", "▁oil", "▁Öl"]


def test_texts_without_words_are_counted_and_refused_if_most_are(tokenizer, capsys):
    """Cyrillic has none in byte-level BPE, where a word is several tokens, none of which is a space and letters."""
    split = encode_split(Split(["goal matching", "7,", "oil 7", "matching"], [0] * 4), tokenizer)
    assert whole_words(split.input_ids, ENTRIES).nonzero()[0].tolist() == [1, 10]  # goal, oil
    check_words(encode_split(Split(["goal"], [0]), tokenizer), ENTRIES, "news.csv")
    assert not capsys.readouterr().out
    check_words(split, ENTRIES, "news.csv")
    assert "2 of 4 training texts have no word that is a single token: they are copied" in capsys.readouterr().out
    with pytest.raises(
        ConfigError, match=r"news.csv: 2 of 3 training texts have no word .* data.augmentation.n_aug = 0"
    ):
        check_words(encode_split(Split(["goal", "7,", "matching"], [0] * 3), tokenizer), ENTRIES, "news.csv")


def test_new_texts_depend_on_seed_epoch_and_row_and_keep_their_labels(tokenizer, pair):
    texts = [" ".join(np.random.default_rng(i).choice(["oil", "price", "goal", "7"], 3 + i % 9)) for i in range(150)]
    split = encode_split(Split([*texts, "7"], [i % 3 for i in range(151)]), tokenizer)

    def made(seed, epoch, split=split, **options):
        new = substitute(split, pair[0], tokenizer, AugmentationConfig("mlm", n_aug=2, **options), seed, epoch, CPU)
        assert new.labels.tolist() == [label for label in split.labels.tolist() for _ in range(3)]
        return texts_of(new)

    first = made(1, 2)
    assert first[::3] == texts_of(split) and [*map(len, first[1::3])] == [*map(len, first[::3])]
    assert first == made(1, 2) != made(1, 3) != made(2, 3)
    assert made(1, 2, fresh=False) == made(1, 3, fresh=False)
    assert first[-1] == first[-2] == first[-3], "a text without words was changed"
    assert made(1, 2, encode_split(Split(texts[:70], [0] * 70), tokenizer))[: 3 * 64] == first[: 3 * 64]


def test_a_run_uses_it_and_a_checkpoint_without_the_head_is_refused(tokenizer, tmp_path, capsys, monkeypatch):
    from train import train
    from training.command_line import EXIT_BAD_INPUT, run_command
    from training.config import parse_command_line

    reference_model(head="MaskedLM", vocab_size=len(ENTRIES)).save_pretrained(tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    rows = [f"{['oil', 'goal'][i % 2]} price bank,{i % 2}\n" for i in range(60)]
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(rows))
    options = ["--output", "run", "--model.checkpoint", "base", "--data.source", "train.csv", "--data.max-length", "16"]
    options += ["--data.augmentation.kind", "mlm", "--data.augmentation.n-aug", "1", "--train.epochs", "1"]
    options = [str(tmp_path / one) if one in ("run", "base", "train.csv") else one for one in options]
    trained_on = []
    monkeypatch.setattr(setup, "substitute", lambda *values: trained_on.append(substitute(*values)) or trained_on[-1])
    assert run_command(lambda: train(parse_command_line(options))) == 0, capsys.readouterr().err
    assert "MLM: 1 new texts of each training text, alpha 0.1" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "report.json").read_text())["steps"] > 0
    (split,) = trained_on
    assert texts_of(split)[::2] != texts_of(split)[1::2]

    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"7 matching,{i % 2}\n" for i in range(60)))
    assert run_command(lambda: train(parse_command_line([*options, "--overwrite"]))) == EXIT_BAD_INPUT
    assert "training texts have no word that is a single token" in capsys.readouterr().err

    reference_model(vocab_size=len(ENTRIES)).base_model.save_pretrained(tmp_path / "base")
    assert run_command(lambda: train(parse_command_line([*options, "--overwrite"]))) == EXIT_BAD_INPUT
    assert "has no lm_head or no <mask>" in capsys.readouterr().err
