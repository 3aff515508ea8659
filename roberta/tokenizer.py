"""Text to token ids, on the `tokenizers` library: the ids that `transformers` gives for the same files.

Two kinds of files: `vocab.json` + `merges.txt` (RoBERTa's byte-level BPE), or one `tokenizer.json` that describes any
tokenizer whole (WordPiece for BERT). Padding is the batch's business: see `data.batching`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from roberta.config import RobertaConfig
from roberta.files import LARGEST_TOKENIZER, CheckpointError, check_file

# As transformers 5 reads these files; 4 also let <mask> swallow the space before it, as tokenizer.json files may say.
_ROBERTA_SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
# The roles of special tokens, as transformers names them: what fills each in RoBERTa's vocabulary and in BERT's.
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
    """A tokenizer with its special tokens, truncating to `max_length` tokens (special ones included).

    As in `transformers`, a special token spelled out in the text ("<s>") is read as that token. Raises CheckpointError
    if the vocabulary has no padding token.
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

        Raises CheckpointError if neither is there or a file is broken.
        """
        directory = Path(directory)
        whole, vocab, merges = (directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
        if whole.is_file():
            source, files, build = whole, [whole], lambda: Tokenizer.from_file(str(whole))
        elif vocab.is_file() and merges.is_file():
            source, files, build = vocab, [vocab, merges], lambda: _byte_level_bpe(vocab, merges)
        else:
            raise CheckpointError(
                f"{directory}: holds no tokenizer; it needs tokenizer.json, or vocab.json + merges.txt"
            )
        for file in files:
            check_file(file, LARGEST_TOKENIZER)
        try:
            return cls(build(), max_length)
        except CheckpointError as error:
            raise CheckpointError(f"{source}: {error}") from None
        except Exception as error:  # the library raises bare Exception for every kind of broken file
            raise CheckpointError(f"{source}: not a tokenizer ({error}); fetch the checkpoint again") from None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included: every id is below it."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def fingerprint(self) -> str:
        """Changes whenever the ids of some text could: a hash of vocabulary, rules and truncation."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def check_fits(self, config: RobertaConfig, where: str | Path) -> None:
        """Raise CheckpointError, naming `where` it came from, unless the model can read what the tokenizer gives.

        Every id must have a row of the embedding table, those put around a text included, which a tokenizer.json may
        name without having them in its vocabulary; and a text must begin with a token put there, as the vector of the
        first one is what is classified.
        """
        if self.vocab_size > config.vocab_size:
            raise CheckpointError(
                f"{where}: the tokenizer has ids up to {self.vocab_size - 1}, the model rows for {config.vocab_size}; "
                "they are of different checkpoints"
            )
        around, with_text = self.encode_batch(["", "a text"])
        if max(len(around), len(with_text)) > self.max_length:
            raise CheckpointError(
                f"{where}: the tokenizer puts {len(around)} tokens around a text, and {self.max_length} is the longest"
            )
        if not around:
            raise CheckpointError(
                f"{where}: the tokenizer puts no token before a text, such as <s>; its tokenizer.json lacks the "
                "post_processor"
            )
        if (largest := max(around + with_text)) >= config.vocab_size:
            raise CheckpointError(
                f"{where}: the tokenizer puts id {largest} around a text, the model has rows for {config.vocab_size}; "
                "they are of different checkpoints"
            )
        if self.pad_token_id != config.pad_token_id:
            raise CheckpointError(
                f"{where}: padding is id {self.pad_token_id} to the tokenizer and {config.pad_token_id} to the model; "
                "they are of different checkpoints"
            )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text with its special tokens, at most `max_length`; no padding."""
        return self.encode_batch_with_cuts(texts)[0]

    def encode_batch_with_cuts(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """The ids as `encode_batch` gives them, and for each text whether it was longer than `max_length`.

        Raises CheckpointError if the tokenizer's own rules fail on a text, such as an expression that never ends.
        """
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts))
        except BaseException as error:  # the library's: Exception itself, or the panic of its own language
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise CheckpointError(f"the tokenizer fails on a text ({error}); fetch the checkpoint again") from None
        return [encoding.ids for encoding in encodings], [bool(encoding.overflowing) for encoding in encodings]

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json`, without truncation, and the small file by which `transformers` recognises it."""
        directory = Path(directory)
        plain = Tokenizer.from_str(self._tokenizer.to_str())
        plain.no_truncation()
        (directory / "tokenizer.json").write_text(plain.to_str(pretty=True), encoding="utf-8")
        vocabulary = plain.get_vocab(with_added_tokens=True)
        roles = {
            role: next(token for token in names if token in vocabulary)
            for role, names in _SPECIAL_TOKENS.items()
            if any(token in vocabulary for token in names)
        }
        # Without this file transformers takes the tokenizer class of config.json's model_type, whatever the vocabulary.
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
