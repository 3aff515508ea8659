"""A run's settings: one `RunConfig`, read from a TOML file; the command line can set any of its fields.

    python train.py experiments/quickstart.toml --lora.rank 8 --train.epochs 2

Types, names and values are checked when a config is made; what depends on the data or the checkpoint, when they are
read.
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
from lora.config import (
    METHODS,
    AdaLoRAConfig,
    BitFitConfig,
    BottleneckConfig,
    FullConfig,
    IA3Config,
    LayerNormConfig,
    LoRAConfig,
    MethodConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    VeRAConfig,
)
from lora.eva import EvaConfig
from training.command_line import parse_options, section_of
from training.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """The pretrained checkpoint and changes to it."""

    checkpoint: str = "roberta-base"
    """roberta-base, roberta-large, minilm, a hub id, or a folder."""
    new_head: bool = False
    """Initialize a new head even if the checkpoint holds one."""
    base_bits: Literal[16, 8, 4] = 16
    """Bits per weight of the encoder's frozen matrices: 8 (integers), 4 (NF4), or 16: in train.precision's format."""
    hidden_dropout: float | None = None
    """Dropout after embeddings, attention and feed-forward; the checkpoint's value unless set."""
    attention_dropout: float | None = None
    """Dropout on attention probabilities; the checkpoint's value unless set."""
    classifier_dropout: float | None = None
    """Dropout in the head; the checkpoint's value unless set."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    epochs: int = 20
    """Maximum number of passes over the training split; with unlabelled texts, over the larger of both."""
    patience: int = 3
    """Stop after this many epochs without a better validation accuracy (multi-label: micro F1); 0 never stops early."""
    keep: Literal["best", "last"] = "best"
    """Whose adapter is kept: of the epoch with the best validation scores, or, if too few texts decide, of the last."""
    batch_size: int = 32
    """Texts in one forward pass; of unlabelled texts, unlabelled.ratio times as many."""
    accumulation_steps: int = 1
    """Forward passes whose gradients are accumulated before each optimizer step."""
    eval_batch_size: int = 64
    """Texts in one forward pass when scoring."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit stores AdamW's two moments in 8 bits each: 2 bytes per trained parameter instead of 8."""
    learning_rate: float = 5e-4
    """Peak learning rate."""
    lora_plus_ratio: float = 1.0
    """LoRA+: the learning rate of LoRA's B, and as in peft of every vector, divided by that of A and all others."""
    warmup_fraction: float = 0.06
    """Share of all steps in which the learning rate rises from 0 to its peak; it then falls to 0 linearly."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    decay_bias_and_norm: bool = False
    """Whether biases and LayerNorm weights decay too."""
    max_grad_norm: float = 1.0
    """Clip gradients to this norm; 0 does not clip."""
    class_weights: Literal["none", "balanced"] = "none"
    """Weight of each text in the training loss: balanced is n / (k n_c), for n texts, k classes, n_c of its class."""
    r_drop: float = 0.0
    """R-Drop: weight alpha of the divergence between two passes of each text with other dropout masks; 0: one pass."""
    tmix: float = 0.0
    """TMix: alpha of the Beta distribution of the share in which two texts' hidden states are mixed; 0: not mixed."""
    max_trainable: int | None = None
    """Refuse to train more parameters than this."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Data type of the matmuls: auto is bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train: auto uses a GPU if there is one."""
    compile: Literal["off", "on", "cuda-graphs"] = "off"
    """Compile the model with torch.compile, for long runs on a GPU: takes a minute before the first step."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, up to 1.6 times as long."""
    seed: int = 0
    """Seeds Python, numpy, torch, the validation split, augmentation and the order of batches."""
    deterministic: bool = False
    """On a GPU: use only deterministic kernels, which are slower; on a CPU all kernels are deterministic."""
    log_every: int = 10
    """Optimizer steps per line of metrics.jsonl."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints; each epoch and each stop of the run also writes one."""
    checkpoint_steps: int = 0
    """Optimizer steps between checkpoints, in addition to the minutes; 0 for the minutes alone."""
    checkpoint_keep: int = 2
    """Number of newest checkpoints to keep."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard as well, to tensorboard/ in the run folder (needs the extra "tensorboard")."""

    def __post_init__(self) -> None:
        above_zero = "epochs batch_size accumulation_steps eval_batch_size learning_rate log_every checkpoint_minutes"
        for name in [*above_zero.split(), "lora_plus_ratio", "checkpoint_keep", "max_trainable"]:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"train.{name} is {value!r}; it must be above 0")
        for name in ("patience", "weight_decay", "max_grad_norm", "r_drop", "tmix", "seed", "checkpoint_steps"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"train.{name} is {getattr(self, name)!r}; it must be 0 or more")
        if self.keep == "last" and self.patience:
            raise ConfigError('train.keep = "last" needs all epochs; set train.patience = 0')
        for name, off in (("r_drop", 0), ("compile", "off")):
            if self.tmix and getattr(self, name) != off:
                raise ConfigError(f"train.tmix and train.{name} exclude each other; choose one")
        for name in ("seed", "accumulation_steps"):  # numpy's limit; that of a count of batches is higher
            if getattr(self, name) >= 2**32:
                raise ConfigError(f"train.{name} is {getattr(self, name)}; it must be below {2**32}")
        if not 0 <= self.warmup_fraction <= 1:
            raise ConfigError(f"train.warmup_fraction is {self.warmup_fraction!r}; it is a share of the steps, 0 to 1")


@dataclass(frozen=True)
class UnlabelledConfig:
    """Texts without labels, and how the model learns from them (training/unlabelled.py)."""

    source: str = "rest"
    """rest: the training rows that data.train_rows leaves out; or a file, with data.text_columns and encoding."""
    method: Literal["pseudo_label", "fixmatch", "adamatch", "softmatch"] = "adamatch"
    """How a text gets its label and its weight."""
    ratio: int = 7
    """Unlabelled texts per labelled text of a batch."""
    weight: float = 1.0
    """Weight of their mean loss in the loss of a step."""
    ramp: float = 0.5
    """Share of all steps in which that weight rises from 0, along half a cosine; 0 for the full weight at once."""
    threshold: float | None = None
    """Probability from which a text counts: 0.95 unless given; adamatch: as a share of that of labelled texts, 0.9."""
    momentum: float = 0.9
    """Of the moving averages of adamatch and softmatch."""
    alpha: float = 0.1
    """EDA's alpha for the changed copies; pseudo_label makes none."""

    @property
    def cutoff(self) -> float:
        """The threshold, or its default."""
        return self.threshold if self.threshold is not None else 0.9 if self.method == "adamatch" else 0.95

    def __post_init__(self) -> None:
        for name, low, high in (("threshold", 0, 1), ("momentum", 0, 1), ("ramp", 0, 1), ("alpha", 0, 0.99)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"unlabelled.{name} is {value!r}; it must be in [{low}, {high}]")
        for name in ("ratio", "weight"):
            if not 0 < getattr(self, name) < 2**32:
                raise ConfigError(f"unlabelled.{name} is {getattr(self, name)!r}; it must be above 0")
        unused = {
            "threshold": self.method == "softmatch",
            "momentum": self.method in ("pseudo_label", "fixmatch"),
            "alpha": self.method == "pseudo_label",
        }
        for name in (name for name, has_no in unused.items() if has_no):
            if getattr(self, name) != getattr(UnlabelledConfig, name):
                raise ConfigError(f"unlabelled.{name} has no effect with {self.method}; remove it")


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run."""

    output: str = "runs/default"
    """Run folder to write to."""
    overwrite: bool = False
    """Replace the run folder if it exists."""
    resume: bool = False
    """Resume the run in the run folder from its last checkpoint, or start it if there is none."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig | None = field(default_factory=LoRAConfig)
    """Methods combine: each table of a TOML file turns one on. Without any, it is LoRA with its defaults."""
    adalora: AdaLoRAConfig | None = None
    vera: VeRAConfig | None = None
    ia3: IA3Config | None = None
    bitfit: BitFitConfig | None = None
    layer_norm: LayerNormConfig | None = None
    full: FullConfig | None = None
    bottleneck: BottleneckConfig | None = None
    prompt_tuning: PromptTuningConfig | None = None
    p_tuning: PTuningConfig | None = None
    prefix_tuning: PrefixTuningConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    unlabelled: UnlabelledConfig | None = None
    """Without this table, labelled texts alone."""
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def methods(self) -> tuple[MethodConfig, ...]:
        """The settings of each method that is used."""
        return tuple(method for table in METHODS if (method := getattr(self, table)) is not None)

    def __post_init__(self) -> None:
        if self.overwrite and self.resume:
            raise ConfigError("overwrite and resume exclude each other; choose one")
        if self.train.lora_plus_ratio != 1 and self.lora is None:
            raise ConfigError(
                f"train.lora_plus_ratio is {self.train.lora_plus_ratio:g}, but there is no [lora]; add it"
            )
        for name, on in (
            ("data.windows", self.data.windows > 1),  # a changed copy may have more or fewer windows than its text
            ("train.tmix", self.train.tmix > 0),
            ("train.compile", self.train.compile != "off"),  # three more kinds of passes than torch compiles
        ):
            if self.unlabelled is not None and on:
                raise ConfigError(f"{name} and [unlabelled] exclude each other; remove one")
        virtual = [method.table for method in self.methods if method.num_virtual_tokens]
        if virtual and self.lora is not None and self.lora.init == "eva":
            raise ConfigError(f"lora.init is 'eva', which [{virtual[0]}] can't be combined with; choose another")
        for name in ("hidden_dropout", "attention_dropout", "classifier_dropout"):
            value = getattr(self.model, name)
            if value is not None and not 0 <= value < 1:
                raise ConfigError(f"model.{name} is {value!r}; it is a probability in [0, 1)")


_SECTIONS = (RunConfig, ModelConfig, DataConfig, CleaningConfig, AugmentationConfig, TrainConfig, UnlabelledConfig)
for _section in (*_SECTIONS, *METHODS.values(), EvaConfig):
    _section.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # an unknown field is an error
_VALIDATOR = pydantic.TypeAdapter(RunConfig)


def read_config(path: str | Path) -> RunConfig:
    """Read a TOML file. Raises ConfigError that names the file and the field."""
    return parse_config(read_toml(path), path)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Parse a TOML file, without checking its fields. Raises ConfigError that names the file."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # some editors write a byte-order mark
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give a TOML file, for example experiments/quickstart.toml") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, nested too deeply
        raise ConfigError(f"{path}: not valid TOML: {error}") from None


def parse_config(raw: dict[str, Any], path: str | Path) -> RunConfig:
    """Convert parsed TOML to a RunConfig; `path` is for error messages. Raises as `read_config` does."""
    if set(raw) & (set(METHODS) - {"lora"}):
        raw = {"lora": None, **raw}  # only the methods that have a table
    try:
        # Strict, so that "8" is not a number; as JSON, so that an array may become a tuple and 14 a float.
        return _VALIDATOR.validate_json(json.dumps(raw, default=str), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "unexpected_keyword_argument":
            *sections, unknown = map(str, first["loc"])
            raise ConfigError(f"{path}: unknown field {where}; {_known_fields(sections)}") from None
        if first["type"] == "value_error":  # from a __post_init__; names the field itself
            raise ConfigError(f"{path}: {first['ctx']['error']}") from None
        raise ConfigError(f"{path}: {where}: {first['msg']}, not {first['input']!r}") from None


def _known_fields(sections: list[str]) -> str:
    """The fields of a section, for an error message."""
    kind: Any = RunConfig
    for section in sections:
        kind = section_of(typing.get_type_hints(kind)[section])
    return f"{sections[-1] if sections else 'a run'} has {', '.join(kind.__dataclass_fields__)}"


def parse_command_line(arguments: list[str]) -> RunConfig:
    """`CONFIG [--field value ...]`, or only options, over the defaults. Raises ConfigError; --help exits."""
    config, options = RunConfig(), arguments
    if arguments and not arguments[0].startswith("-"):
        config, options = read_config(arguments[0]), arguments[1:]
    return parse_options(RunConfig, options, default=config, prog="train.py [CONFIG]")


def write_config(config: RunConfig, path: str | Path) -> None:
    """Write `config` as TOML, without the fields that are None, for which TOML has no value."""
    given = dataclasses.asdict(
        config, dict_factory=lambda items: {key: item for key, item in items if item is not None}
    )
    Path(path).write_text(tomli_w.dumps(given), encoding="utf-8")
