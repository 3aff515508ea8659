"""Text to token ids with the `tokenizers` library: the same ids as `transformers` gives for the same files.

Which tokenizer the files describe is decided in `roberta.tokenizer_files`. Padding happens in `data.batching`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from roberta.config import RobertaConfig
from roberta.files import CheckpointError
from roberta.tokenizer_files import read_tokenizer

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
    """A tokenizer that truncates to `max_length` tokens, special tokens included, at the end or at the beginning.

    With `windows` above 1, a longer text of l tokens x becomes up to that many windows, each with its special tokens:

        window i = x[i s : min(i s + m, l)],   s = m - overlap,   i = 0, 1, ... until one ends at l

    where m = max_length - (special tokens) is the room for the text, and `overlap` by default a quarter of max_length.
    With `truncation_side` left, the first window is at the end of the text. Source: run_squad.py of BERT (Devlin et al.
    2018), which reads long paragraphs like this; its doc_stride is s.

    `special_tokens` names the token of each role ("pad_token", ...); others are found by RoBERTa's names and BERT's. As
    in `transformers`, a special token spelled out in the text ("<s>") becomes that token. Raises CheckpointError if the
    vocabulary has no padding token, or if windows don't move on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_length: int,
        special_tokens: Mapping[str, str] | None = None,
        truncation_side: str = "right",
        windows: int = 1,
        overlap: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        overlap = 0 if windows == 1 else max_length // 4 if overlap is None else overlap
        if windows > 1 and overlap >= (room := max_length - tokenizer.num_special_tokens_to_add(is_pair=False)):
            raise CheckpointError(f"windows of {room} tokens can't overlap by {overlap}; lower window_overlap")
        self._tokenizer.enable_truncation(max_length, stride=overlap, direction=truncation_side)
        self.max_length, self.truncation_side = max_length, truncation_side
        self.windows, self.overlap = windows, overlap
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        present = {role: [name for name in names if name in vocabulary] for role, names in _SPECIAL_TOKENS.items()}
        self._special_tokens = {role: names[0] for role, names in present.items() if names} | dict(special_tokens or {})
        padding_id = vocabulary.get(self._special_tokens.get("pad_token", ""))
        if padding_id is None:
            raise CheckpointError(
                "the vocabulary has no padding token, <pad> or [PAD]; name yours as pad_token in tokenizer_config.json"
            )
        self.pad_token_id: int = padding_id
        self.unk_token_id: int | None = vocabulary.get(self._special_tokens.get("unk_token", ""))
        self.mask_token_id: int | None = vocabulary.get(self._special_tokens.get("mask_token", ""))

    @classmethod
    def from_directory(
        cls, directory: str | Path, max_length: int, windows: int = 1, overlap: int | None = None
    ) -> TextTokenizer:
        """Read the files that `transformers.AutoTokenizer` reads: see `roberta.tokenizer_files`.

        Raises CheckpointError if files are missing or damaged, or if a setting is not supported.
        """
        files = read_tokenizer(Path(directory))
        try:
            return cls(files.tokenizer, max_length, files.special_tokens, files.truncation_side, windows, overlap)
        except CheckpointError as error:
            raise CheckpointError(f"{files.source}: {error}") from None

    @property
    def vocab_size(self) -> int:
        """Largest id + 1, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def entries(self) -> list[str]:
        """The entries of the vocabulary by id, as the files write them ("Ġprice"); "" for an id without one."""
        entries = [""] * self.vocab_size
        for entry, number in self._tokenizer.get_vocab(with_added_tokens=True).items():
            entries[number] = entry
        return entries

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
        """Ids of each text with its special tokens, at most `max_length`: its first window; no padding."""
        return [windows[0] for windows in self.encode_windows(texts)[0]]

    def encode_windows(self, texts: Sequence[str]) -> tuple[list[list[list[int]]], list[bool]]:
        """Ids of each window of each text, as from `encode_batch`, and for each text whether a part is in no window.

        Raises CheckpointError if the tokenizer fails on a text, as with a regular expression that never finishes.
        """
        try:
            encodings = self._tokenizer.encode_batch_fast(list(texts))
        except BaseException as error:  # the library raises Exception itself, or Rust's panic
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise CheckpointError(f"the tokenizer fails on a text ({error}); fetch the checkpoint again") from None
        rest = [encoding.overflowing for encoding in encodings]  # the further windows, each with its special tokens
        windows = [
            [encoding.ids, *(other.ids for other in others[: self.windows - 1])]
            for encoding, others in zip(encodings, rest, strict=True)
        ]
        return windows, [len(others) >= self.windows for others in rest]

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json`, without truncation, and the settings that `transformers` needs to open it."""
        directory = Path(directory)
        plain = Tokenizer.from_str(self._tokenizer.to_str())
        plain.no_truncation()
        (directory / "tokenizer.json").write_text(plain.to_str(pretty=True), encoding="utf-8")
        special = {token.content for token in plain.get_added_tokens_decoder().values()}
        # Without this file transformers takes the tokenizer class of config.json's model_type. It would turn a token
        # named here that is only a word of the vocabulary into a special one.
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": self.max_length,
            "truncation_side": self.truncation_side,
        } | {role: token for role, token in self._special_tokens.items() if token in special}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
