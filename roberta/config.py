"""Hyper-parameters of the encoder, read from a checkpoint's `config.json`.

roberta-base, roberta-large, MiniLM and a two-layer toy are four values of one class.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from roberta.files import CheckpointError, read_json

CONFIG_NAME = "config.json"

# Far above any encoder; a broken or hostile file must not create a million modules.
_MAX_LABELS = 50_000
_MAX = {"num_hidden_layers": 200, "num_attention_heads": 1000, "type_vocab_size": 1000, "num_labels": _MAX_LABELS}
_MAX_OTHER = 10_000_000
_MODEL_TYPES = ("roberta", "xlm-roberta", "camembert", "bert")


def _check_size(name: str, value: Any) -> None:
    """Raise CheckpointError unless a size is an integer in a plausible range."""
    minimum, maximum = (0 if name == "pad_token_id" else 1), _MAX.get(name, _MAX_OTHER)
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise CheckpointError(f"{name} is {value!r}, it must be an integer from {minimum} to {maximum:,}")


def _names_by_number(label2id: Any) -> tuple[str, ...]:
    """The names in the order of their numbers; () unless these are 0, 1, 2, ... without gaps."""
    numbers = list(label2id.values()) if isinstance(label2id, dict) else []
    if not 0 < len(numbers) <= _MAX_LABELS or {*map(repr, numbers)} != {*map(str, range(len(numbers)))}:
        return ()
    return tuple(sorted(label2id, key=label2id.__getitem__))


@dataclass(frozen=True)
class RobertaConfig:
    """Sizes and constants of a RoBERTa encoder with a classification head.

    Names and meanings are those of the published `config.json` files. Raises CheckpointError for an implausible size, a
    probability outside [0, 1), or sizes that don't fit each other.
    Sources: Liu et al. 2019 (RoBERTa), section 2 and table 9; Devlin et al. 2018 (BERT), section 3.
    """

    model_type: str = "roberta"
    """Architecture of the checkpoint: roberta; xlm-roberta or camembert, the same; or bert, which is converted."""
    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 514
    """Rows of the position table. Real tokens never use the first `pad_token_id + 1`: see `max_length`."""
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    pad_token_id: int = 1
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    """Dropout inside the head; None means `hidden_dropout_prob`, as in the published models."""
    initializer_range: float = 0.02
    """Standard deviation of the normal distribution that a new head is drawn from."""
    label_names: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    problem_type: str = "single_label_classification"
    """Each text has one class (softmax); or "multi_label_classification", any number of classes (a sigmoid each)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                _check_size(field.name, value)
            elif field.type.startswith("float") and value is not None:  # dropouts, epsilon, standard deviation
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 10:
                    raise CheckpointError(f"{field.name} is {value!r}, it must be a small number, 0 or more")
                if field.name.endswith(("dropout", "dropout_prob")) and value >= 1:
                    raise CheckpointError(f"{field.name} is {value!r}, it is a probability in [0, 1)")
        if self.problem_type not in ("single_label_classification", "multi_label_classification"):
            raise CheckpointError(
                f"problem_type is {self.problem_type!r}; only single_label_classification and "
                "multi_label_classification are supported"
            )
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"hidden_size {self.hidden_size} can't be divided into {self.num_attention_heads} equal attention heads"
            )
        if self.pad_token_id >= self.vocab_size:
            raise CheckpointError(
                f"pad_token_id {self.pad_token_id} is not in the vocabulary of {self.vocab_size} tokens"
            )
        if self.max_length < 1:
            raise CheckpointError(
                f"max_position_embeddings {self.max_position_embeddings} leaves no room above pad_token_id "
                f"{self.pad_token_id}"
            )

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.label_names)

    @property
    def multi_label(self) -> bool:
        """Whether a text may have any number of the classes."""
        return self.problem_type == "multi_label_classification"

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens: real positions start at `pad_token_id + 1`."""
        return self.max_position_embeddings - (self.pad_token_id + 1)

    @classmethod
    def from_file(cls, path: str | Path) -> RobertaConfig:
        """Read a checkpoint's `config.json`; a BERT one is converted exactly (see `roberta.weights`).

        Raises CheckpointError if the file is not JSON or describes another architecture (another activation, relative
        positions, a decoder).
        """
        raw = read_json(Path(path))
        try:
            return cls.from_dict(raw)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> RobertaConfig:
        """Read the fields of a `config.json` already parsed; raises CheckpointError as `from_file` does."""
        model_type = raw.get("model_type")
        if model_type not in _MODEL_TYPES:
            raise CheckpointError(f"model_type is {model_type!r}; this encoder computes {', '.join(_MODEL_TYPES)} only")
        for name, supported in (
            ("hidden_act", "gelu"),
            ("position_embedding_type", "absolute"),
            ("is_decoder", False),
            ("add_cross_attention", False),
        ):
            if raw.get(name, supported) != supported:
                raise CheckpointError(f"{name} is {raw[name]!r}; this encoder computes {supported!r} only")
        # Some files omit fields that are at the default of transformers' class, which is not always ours.
        defaults = {"max_position_embeddings": 512, "type_vocab_size": 2, "layer_norm_eps": 1e-12}
        bert = model_type == "bert"
        defaults |= {"vocab_size": 50265 if model_type == "roberta" else 30522, "pad_token_id": 0 if bert else 1}
        names = {field.name for field in fields(cls)} - {"label_names"}
        values = defaults | {name: raw[name] for name in names if raw.get(name) is not None}
        if values.get("problem_type") == "regression":
            del values["problem_type"]  # of the head alone: `load_checkpoint` refuses that, not the encoder
        labels = raw.get("id2label")
        if labels is None and (number := raw.get("num_labels")) is not None:  # older files, and those of two labels
            _check_size("num_labels", number)
            labels = {str(index): f"LABEL_{index}" for index in range(number)}
        if labels is not None:
            if not labels or not isinstance(labels, dict) or set(labels) != set(map(str, range(len(labels)))):
                raise CheckpointError("id2label must number the labels 0, 1, 2, ... without gaps")
            if len(labels) > _MAX_LABELS:
                raise CheckpointError(f"id2label has {len(labels):,} labels, more than the limit of {_MAX_LABELS:,}")
            values["label_names"] = tuple(str(labels[str(index)]) for index in range(len(labels)))
        found, named = values.get("label_names"), _names_by_number(raw.get("label2id"))
        if named and found in (None, tuple(f"LABEL_{index}" for index in range(len(named)))):
            values["label_names"] = named  # some files name the labels there alone
        elif named != found and sorted(named) == sorted(found or ("",)):
            raise CheckpointError("id2label and label2id number the same labels differently; correct one")
        if bert:
            for name in ("max_position_embeddings", "pad_token_id"):
                _check_size(name, values[name])
            # The position table gets pad_token_id + 1 rows at the top, and a single segment needs one type row.
            values["max_position_embeddings"] += values["pad_token_id"] + 1
            values["type_vocab_size"] = 1
        return cls(**values)

    def save(self, directory: Path) -> None:
        """Write `config.json` into a folder."""
        (directory / CONFIG_NAME).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` that `transformers.RobertaForSequenceClassification` reads."""
        raw = asdict(self)
        labels = raw.pop("label_names")
        return raw | {
            "architectures": ["RobertaForSequenceClassification"],
            "model_type": "roberta",  # what is computed, whatever `model_type` was read
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
            "id2label": {str(index): name for index, name in enumerate(labels)},
            "label2id": {name: index for index, name in enumerate(labels)},
        }


PUBLISHED = {
    "roberta-base": RobertaConfig(),
    "roberta-large": RobertaConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "minilm": RobertaConfig(  # a BERT: 512 positions and the padding row
        model_type="bert",
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        intermediate_size=1536,
        max_position_embeddings=513,
        pad_token_id=0,
    ),
}
"""Sizes of the checkpoints known by name. Sources: Liu et al. 2019, table 9; Wang et al. 2020, section 4."""
