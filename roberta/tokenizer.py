"""Text to token ids with the `tokenizers` library: the same ids as `transformers` gives for the same files.

Two kinds of files: `vocab.json` + `merges.txt` (RoBERTa's byte-level BPE), or one `tokenizer.json` that describes any
tokenizer (WordPiece for BERT). Padding happens in `data.batching`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from roberta.config import RobertaConfig
from roberta.files import MAX_TOKENIZER, CheckpointError, check_file

# As in transformers 5; in 4, <mask> also removed the space before it, as a tokenizer.json may still do.
_ROBERTA_SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
# The roles of special tokens, as transformers names them, with RoBERTa's token and BERT's.
_SPECIAL_TOKENS = {
    "bos_token": ("<s>", "[CLS]"),
    "eos_token": ("</s>", "[SEP]"),
    "cls_token": ("<s>", "[CLS]"),
    "sep_token": ("</s>", "[SEP]"),
    "unk_token": ("<unk>", "[UNK]"),
    "pad_token": ("<pad>", "[PAD]"),
    "mask_token": ("<mask>", "[MASK]"),
}


class TextTokenizer:
    """A tokenizer that truncates to `max_length` tokens, special tokens included.

    As in `transformers`, a special token spelled out in the text ("<s>") becomes that token. Raises CheckpointError if
    the vocabulary has no padding token.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length)
        self.max_length = max_length
        padding_ids = [i for i in map(tokenizer.token_to_id, _SPECIAL_TOKENS["pad_token"]) if i is not None]
        if not padding_ids:
            raise CheckpointError("the vocabulary has no padding token, <pad> or [PAD]")
        self.pad_token_id: int = padding_ids[0]

    @classmethod
    def from_directory(cls, directory: str | Path, max_length: int) -> TextTokenizer:
        """Read `tokenizer.json`, or else `vocab.json` + `merges.txt`.

        Raises CheckpointError if both are missing or a file is damaged.
        """
        directory = Path(directory)
        single, vocab, merges = (directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
        if single.is_file():
            source, files, build = single, [single], lambda: Tokenizer.from_file(str(single))
        elif vocab.is_file() and merges.is_file():
            source, files, build = vocab, [vocab, merges], lambda: _byte_level_bpe(vocab, merges)
        else:
            raise CheckpointError(
                f"{directory}: holds no tokenizer; it needs tokenizer.json, or vocab.json + merges.txt"
            )
        for file in files:
            check_file(file, MAX_TOKENIZER)
        try:
            return cls(build(), max_length)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from None
        except Exception as error:  # the library raises bare Exception for every kind of broken file
            raise CheckpointError(f"{source}: not a tokenizer ({error}); fetch the checkpoint again") from None

    @property
    def vocab_size(self) -> int:
        """Largest id + 1, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """A hash of vocabulary, rules and truncation, everything that decides the ids of a text."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def check_fits(self, config: RobertaConfig, where: str | Path) -> None:
        """Raise CheckpointError, naming the folder `where`, unless the model can read the ids of this tokenizer.

        Every id must have a row in the embedding table, also those added around a text, which a tokenizer.json may name
        without having them in its vocabulary. A text must begin with an added token, whose vector is classified.
        """
        around, with_text = self.encode_batch(["", "a text"])
        largest, rows = max(around + with_text, default=0), config.vocab_size
        other = "they are from different checkpoints"
        for wrong, problem in (
            (self.vocab_size > rows, f"has ids up to {self.vocab_size - 1}, the model rows for {rows}; {other}"),
            (
                max(len(around), len(with_text)) > self.max_length,
                f"adds {len(around)} tokens to a text, and the maximum is {self.max_length}",
            ),
            (not around, "adds no token before a text, such as <s>; its tokenizer.json lacks the post_processor"),
            (largest >= rows, f"adds id {largest} to a text, the model has rows for {rows}; {other}"),
            (
                self.pad_token_id != config.pad_token_id,
                f"has padding id {self.pad_token_id}, the model {config.pad_token_id}; {other}",
            ),
        ):
            if wrong:
                raise CheckpointError(f"{where}: the tokenizer {problem}")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text with its special tokens, at most `max_length`; no padding."""
        return self.encode_batch_with_cuts(texts)[0]

    def encode_batch_with_cuts(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """The ids as from `encode_batch`, and for each text whether it was truncated.

        Raises CheckpointError if the tokenizer fails on a text, as with a regular expression that never finishes.
        """
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts))
        except BaseException as error:  # the library raises Exception itself, or Rust's panic
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise CheckpointError(f"the tokenizer fails on a text ({error}); fetch the checkpoint again") from None
        return [encoding.ids for encoding in encodings], [bool(encoding.overflowing) for encoding in encodings]

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json`, without truncation, and the settings that `transformers` needs to open it."""
        directory = Path(directory)
        plain = Tokenizer.from_str(self._tokenizer.to_str())
        plain.no_truncation()
        (directory / "tokenizer.json").write_text(plain.to_str(pretty=True), encoding="utf-8")
        vocabulary = plain.get_vocab(with_added_tokens=True)
        present = {role: [name for name in names if name in vocabulary] for role, names in _SPECIAL_TOKENS.items()}
        roles = {role: tokens[0] for role, tokens in present.items() if tokens}
        # Without this file transformers takes the tokenizer class of config.json's model_type.
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": self.max_length} | roles
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _byte_level_bpe(vocab: Path, merges: Path) -> Tokenizer:
    """RoBERTa's tokenizer: byte-level BPE (Radford et al. 2019, section 2.2) in `<s> ... </s>`."""
    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_ROBERTA_SPECIAL_TOKENS)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", ids["</s>"]), ("<s>", ids["<s>"]), add_prefix_space=False
    )
    return tokenizer
