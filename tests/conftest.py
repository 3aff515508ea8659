"""Fixtures for all tests: a checkpoint and a data set small enough to train in a second."""

import contextlib
import io
import random
import shutil
from pathlib import Path

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification
from roberta.tokenizer import TextTokenizer
from roberta.weights import save_checkpoint

# Results must not depend on the load of the machine or on random examples, so that every failure can be reproduced.
# `make test ARGS="--hypothesis-profile=new"` draws new examples.
hypothesis.settings.register_profile("loraberta", deadline=None, derandomize=True)
hypothesis.settings.register_profile("new", deadline=None)
hypothesis.settings.load_profile("loraberta")

SPORTS = ["goal", "match", "cup", "coach", "league"]
BUSINESS = ["oil", "price", "bank", "profit", "shares"]
FILLER = ["the", "a", "of", "on", "in", "new", "says", "after", "today", "report"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real text and the real vocabulary in ../shared, where they exist; optional."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "ag_news_csv").is_dir():
        pytest.skip("no ../shared folder with AG News text and RoBERTa's vocabulary")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch, request):
    """A separate cache folder for each test; "real_cache" keeps the user's."""
    if "real_cache" not in request.keywords:
        monkeypatch.setenv("LORABERTA_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def same_numbers():
    """Random numbers in a test do not depend on which tests ran before it in the same worker."""
    random.seed(0)
    torch.manual_seed(0)


def tiny_tokenizer() -> Tokenizer:
    """A word-level tokenizer with <s> ... </s>."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *SPORTS, *BUSINESS, *FILLER]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 0))
    tokenizer.add_special_tokens(words[:4])
    return tokenizer


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint folder of a random two-layer encoder, without a head."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny-roberta"))


def write_tiny_checkpoint(folder: Path) -> Path:
    """Write the checkpoint of `tiny_checkpoint` into an empty folder."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=24,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=34,
        pad_token_id=1,
    )
    model = RobertaForSequenceClassification(config)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):  # strong enough that <s> attends to the other words
            torch.nn.init.normal_(layer.weight, std=0.3)
    # "Pretrained": the words of a class have similar embeddings, so that a few steps suffice.
    direction, words = 2 * torch.randn(config.hidden_size), model.roberta.embeddings.word_embeddings.weight.data
    words[4 : 4 + len(SPORTS)] += direction
    words[4 + len(SPORTS) : 4 + len(SPORTS) + len(BUSINESS)] -= direction
    save_checkpoint(model, folder, TextTokenizer(tiny_tokenizer(), 32))
    weights = load_file(folder / "model.safetensors")
    encoder = {name: tensor for name, tensor in weights.items() if not name.startswith("classifier.")}
    save_file(encoder, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tiny_rows(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(label, text): three to nine words, one of which determines the class."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        label, words = [("sports", SPORTS), ("business", BUSINESS)][i % 2]
        text = draw.choices(FILLER, k=draw.randint(2, 8))
        text.insert(draw.randrange(len(text) + 1), draw.choice(words))
        rows.append((label, " ".join(text)))
    return rows


@pytest.fixture
def tiny_data(tmp_path) -> Path:
    """A folder with train.csv (96 rows) and test.csv (40 rows): label,text."""
    return write_tiny_data(tmp_path)


def write_tiny_data(folder: Path) -> Path:
    """Write the files of `tiny_data` into a folder."""
    for name, count, seed in (("train", 96, 0), ("test", 40, 1)):
        lines = ["label,text", *(f"{label},{text}" for label, text in tiny_rows(count, seed))]
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def tiny_config(tiny_checkpoint, tiny_data) -> Path:
    """Settings of a run on the tiny checkpoint and data, which are learnt in three epochs."""
    return write_tiny_config(tiny_checkpoint, tiny_data)


def write_tiny_config(tiny_checkpoint: Path, tiny_data: Path, more: bool = False) -> Path:
    """Write the settings of `tiny_config` into the folder of the data; if `more`, with AdaLoRA and P-tuning too."""
    path = tiny_data / "tiny.toml"
    path.write_text(
        f"""
output = "{tiny_data / "run"}"
[model]
checkpoint = "{tiny_checkpoint}"
[lora]
rank = 4
alpha = 8
[data]
source = "{tiny_data / "train.csv"}"
test_file = "{tiny_data / "test.csv"}"
max_length = 16
[train]
epochs = 4
batch_size = 8
learning_rate = 2e-2
warmup_fraction = 0.1
log_every = 5
seed = 1
"""
        + more
        * """
[adalora]
init_r = 4
target_r = 2
tinit = 2
tfinal = 2
total_step = 14
target_modules = ["output.dense"]
[p_tuning]
num_virtual_tokens = 2
encoder_reparameterization_type = "LSTM"
encoder_hidden_size = 12
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory, tiny_checkpoint) -> tuple[Path, str]:
    """The folder and the stdout of a finished run of `tiny_config`, trained once per test process."""
    from train import train
    from training.config import read_config

    config = write_tiny_config(tiny_checkpoint, write_tiny_data(tmp_path_factory.mktemp("trained-once")))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert train(read_config(config)) == 0
    return config.parent / "run", out.getvalue()


@pytest.fixture
def finished_run(trained_once, tmp_path) -> Path:
    """A copy of that run's folder, for a test to change."""
    return Path(shutil.copytree(trained_once[0], tmp_path / "run"))
