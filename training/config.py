"""A run's settings: one `RunConfig`, read from a TOML file, any field of which can be set on the command line.

    python train.py experiments/quickstart.toml --lora.rank 8 --train.epochs 2

Types, names (an unknown one is an error) and values are checked when a config is made; what hangs on the data or the
checkpoint is checked where they are read.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pydantic
import tomli_w

from data.augmentation import AugmentationConfig
from data.cleaning import CleaningConfig
from data.sources import DataConfig
from lora.config import LoRAConfig
from training.command_line import parse_options
from training.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """The pretrained checkpoint, and what is changed of it."""

    checkpoint: str = "roberta-base"
    """roberta-base, roberta-large, minilm, a hub id, or a folder."""
    new_head: bool = False
    """Draw a new head even if the checkpoint holds one."""
    hidden_dropout: float | None = None
    """Dropout after embeddings, attention and feed-forward; the checkpoint's own unless set."""
    attention_dropout: float | None = None
    """Dropout on attention probabilities; the checkpoint's own unless set."""
    classifier_dropout: float | None = None
    """Dropout in the head; the checkpoint's own unless set."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    epochs: int = 20
    """Passes over the training split, at most."""
    patience: int = 3
    """Stop after so many epochs without a better validation accuracy; 0 never stops early."""
    batch_size: int = 32
    """Texts in one forward pass."""
    accumulation_steps: int = 1
    """Forward passes added up before each optimizer step."""
    eval_batch_size: int = 64
    """Texts in one forward pass when scoring."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    warmup_fraction: float = 0.06
    """Share of all steps in which the learning rate rises from 0 to its peak; it then falls to 0 linearly."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    decay_bias_and_norm: bool = False
    """Whether biases and LayerNorm weights decay too."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    max_trainable: int | None = None
    """Refuse to train more parameters than this."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type of the matmuls: auto is bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train: auto takes a GPU if there is one."""
    compile: Literal["off", "on", "cuda-graphs"] = "off"
    """Compile the model by torch.compile, for long runs on a GPU: it takes a minute before the first step."""
    seed: int = 0
    """Seeds Python, numpy, torch, the validation split, EDA and the order of batches."""
    deterministic: bool = False
    """On a GPU: only kernels that give the same bits each time, at some cost in speed (on a CPU all of them do)."""
    log_every: int = 10
    """Optimizer steps between two lines of metrics.jsonl."""
    checkpoint_minutes: float = 10.0
    """Minutes between two checkpoints; there is one at the end of each epoch too, and when the run is stopped."""
    checkpoint_steps: int = 0
    """Optimizer steps between two checkpoints as well; 0 leaves it to the minutes."""
    checkpoint_keep: int = 2
    """How many of the newest checkpoints are kept."""
    tensorboard: bool = False
    """Write the same for TensorBoard as well, into tensorboard/ of the run folder (the extra "tensorboard")."""

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "accumulation_steps", "eval_batch_size", "learning_rate", "log_every")
        positive += ("checkpoint_minutes", "checkpoint_keep")
        for name in positive:
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"train.{name} is {getattr(self, name)!r}; it must be above 0")
        for name in ("patience", "weight_decay", "max_grad_norm", "seed", "checkpoint_steps"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"train.{name} is {getattr(self, name)!r}; it must be 0 or more")
        if not 0 <= self.warmup_fraction <= 1:
            raise ConfigError(f"train.warmup_fraction is {self.warmup_fraction!r}; it is a share of the steps, 0 to 1")
        if self.max_trainable is not None and self.max_trainable < 1:
            raise ConfigError(f"train.max_trainable is {self.max_trainable!r}; it must be above 0")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    output: str = "runs/default"
    """Run folder to write."""
    overwrite: bool = False
    """Replace the run folder if it exists."""
    resume: bool = False
    """Go on with the run in the run folder from its last checkpoint; start it if there is none."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.overwrite and self.resume:
            raise ConfigError("overwrite and resume exclude each other; choose one")
        for name in ("hidden_dropout", "attention_dropout", "classifier_dropout"):
            value = getattr(self.model, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"model.{name} is {value!r}; it is a probability in [0, 1)")


for _section in (RunConfig, ModelConfig, LoRAConfig, DataConfig, CleaningConfig, AugmentationConfig, TrainConfig):
    _section.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # an unknown field is an error, not a comment
_VALIDATOR = pydantic.TypeAdapter(RunConfig)


def read_config(path: str | Path) -> RunConfig:
    """Read a TOML file. Raises ConfigError that names the file and the field."""
    return parse_config(read_toml(path), path)


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file as it stands. Raises ConfigError that names the file."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give a TOML file, for example experiments/quickstart.toml") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, nested too deeply
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def parse_config(raw: dict[str, Any], path: str | Path) -> RunConfig:
    """Settings as parsed from TOML to a RunConfig; `path` is for the error message. Raises as `read_config` does."""
    try:
        # Strictly, so that "8" is no number; by way of JSON, where an array may be a tuple and 14 may be a float.
        return _VALIDATOR.validate_json(json.dumps(raw, default=str), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "unexpected_keyword_argument":
            *sections, unknown = map(str, first["loc"])
            raise ConfigError(f"{path}: unknown field {where}; {_known_fields(sections)}") from None
        if first["type"] == "value_error":  # raised by the settings' own check, and names the field itself
            raise ConfigError(f"{path}: {first['ctx']['error']}") from None
        raise ConfigError(f"{path}: {where}: {first['msg']}, not {first['input']!r}") from None


def _known_fields(sections: list[str]) -> str:
    """What could have been meant, for an error message."""
    kind: Any = RunConfig
    for section in sections:
        kind = typing.get_type_hints(kind)[section]
    return f"{sections[-1] if sections else 'a run'} has {', '.join(kind.__dataclass_fields__)}"


def parse_command_line(arguments: list[str]) -> RunConfig:
    """`CONFIG [--field value ...]`, or options alone on top of the defaults. Raises ConfigError; --help exits."""
    config, options = RunConfig(), arguments
    if arguments and not arguments[0].startswith("-"):
        config, options = read_config(arguments[0]), arguments[1:]
    return parse_options(RunConfig, options, default=config, prog="train.py [CONFIG]")


def write_config(config: RunConfig, path: str | Path) -> None:
    """Write `config` as TOML; fields that are None are left out, TOML having no such value."""
    Path(path).write_text(tomli_w.dumps(_without_none(dataclasses.asdict(config))), encoding="utf-8")


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return list(value) if isinstance(value, tuple) else value
