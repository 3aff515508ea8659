"""What to adapt and how: one frozen dataclass per method, checked when it is made; `lora.inject` applies it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lora.adalora import AdaLoRALinear
from lora.adapter import Adapter
from lora.bottleneck import BottleneckAdapter, sublayer_ends
from lora.dora import DoRALinear
from lora.errors import LoRAError
from lora.eva import EvaConfig
from lora.ia3 import IA3Linear
from lora.initial import INITS, ResidualLoRALinear, initialize, takes_from_base
from lora.linear import LoRALinear
from lora.p_tuning import PTuning
from lora.prefix_tuning import LaterPositions, PrefixTuning, Projection
from lora.prompt_tuning import PromptTuning
from lora.targets import (
    ALL_LINEAR,
    HEAD_NAMES,
    check_names,
    expressions,
    fully_trained_modules,
    inside,
    layer_index,
    matches,
    pattern_value,
    plain_modules,
    targeted_layers,
)
from lora.vera import Projections, VeRALinear


@dataclass(frozen=True)
class MethodConfig:
    """Settings of a method. A subclass says which modules it wraps, by what, and what else it trains.

    Fields have the meanings of peft's configuration; a name that differs from peft's is listed in `peft_names`.
    """

    table: ClassVar[str]
    """Name of the method in a TOML file, and of its folder where several methods are saved."""
    peft_type: ClassVar[str]
    in_peft: ClassVar[bool] = True
    """Whether peft has the method, and so reads the file and computes the same."""
    merges: ClassVar[bool] = True
    """Whether a plain model can compute the same."""
    peft_names: ClassVar[dict[str, str]] = {}
    peft_constants: ClassVar[dict[str, Any]] = {}
    """Fields of peft's file that have one value here."""
    peft_lacks: ClassVar[tuple[str, ...]] = ()
    """Settings that peft does not have for this method; where they are used, its file lists the layers by name."""
    peft_refuses: ClassVar[tuple[str, ...]] = ()
    """Settings that peft does not have and a file can't do without; peft loads no file in which one is on."""
    key_prefix: ClassVar[str] = "base_model.model."
    """What peft puts before the name of each parameter."""
    peft_layer: ClassVar[str] = "base_layer"
    """What peft puts between the name of a target and those of its own parameters."""
    adapterhub: ClassVar[bool] = False
    """Whether the files are those of AdapterHub's library, as peft lacks the method."""

    num_virtual_tokens: ClassVar[int] = 0
    """By how many positions each text becomes longer."""

    modules_to_save: tuple[str, ...] = ("classifier",)
    """Modules trained fully and saved with the adapter; the head, unless told otherwise."""

    def targets(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """The modules to adapt, by their names in the plain model; of a model with adapters, what these wrap."""
        return {}

    def wrap(self, base: Any, name: str) -> Adapter:
        """The adapter of the module `base`."""
        raise NotImplementedError

    def wrap_all(self, modules: Mapping[str, nn.Module]) -> dict[str, Adapter]:
        """The adapters of all `modules`; a method whose adapters share something makes them here."""
        return {name: self.wrap(module, name) for name, module in modules.items()}

    def trains(self, name: str, adapted: bool) -> bool:
        """Whether the model's own parameter `name` is trained, `adapted` telling if its module is a target."""
        return False

    def check(self, model: nn.Module) -> None:
        """Raise LoRAError for a setting that does not fit `model`."""
        fully_trained_modules(model, self)

    def unmatched_patterns(self, names: Collection[str]) -> list[str]:
        """The `rank_pattern` and `alpha_pattern` that match none of `names`, as texts for a message."""
        return [
            f"{field} {pattern!r}"
            for field in ("rank_pattern", "alpha_pattern")
            for pattern in getattr(self, field, ())
            if not any(pattern_value({pattern: True}, name, False) for name in names)
        ]

    def shared(self, wrapped: Mapping[str, Adapter]) -> dict[str, Tensor]:
        """Key in peft's file -> tensor, for what the adapters share and do not train."""
        return {}

    def for_run(self, total_steps: int) -> MethodConfig:
        """These settings for a run of `total_steps` optimizer steps. Raises LoRAError for what does not fit it."""
        return self

    def in_file(self, wrapped: Mapping[str, Adapter]) -> MethodConfig:
        """These settings for a file, with what training has changed in the adapters `wrapped`."""
        return self

    def parameter_key(self, name: str, key: str) -> str:
        """Key in peft's file of an adapter's parameter: `name` is that of the wrapped module, `key` of `peft_keys`."""
        return f"{self.key_prefix}{name}.{key}"

    def require(self, name: str, fits: bool, rule: str, value: object = None) -> None:
        """Raise LoRAError, which states the `rule`, unless the setting `name`, or a `value` in it, fits."""
        if not fits:
            raise LoRAError(f"{self.table}: {name} is {getattr(self, name, value)!r}; {rule}")


def _is_integer(value: object, least: int = 1, limit: float = 2**31) -> bool:
    """Whether `value` is an integer from `least` up to below `limit`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < limit


_INTEGER = f"integer, 1 or more, below {2**31}"
_PROBABILITY = "it is a probability in [0, 1)"


@dataclass(frozen=True)
class LinearMethodConfig(MethodConfig):
    """Settings of a method that adapts linear layers, or other layers of one `kind`."""

    kind: ClassVar[type[nn.Module]] = nn.Linear
    kind_name: ClassVar[str] = "linear layer"

    target_modules: tuple[str, ...] | str = ("query", "key", "value")
    """Linear layers to adapt: names or ends of names, one regular expression for the whole name, or "all-linear": all
    outside `modules_to_save` and a head called classifier or score."""
    exclude_modules: tuple[str, ...] | str | None = None
    """Layers that are not adapted although `target_modules` selects them, named likewise."""
    layers_to_transform: tuple[int, ...] | None = None
    """Numbers of the encoder layers to adapt; None adapts all."""
    layers_pattern: tuple[str, ...] | str | None = None
    """Names of the lists, such as "layer", whose layers `layers_to_transform` counts; None counts in any."""

    def targets(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """The layers that the settings select."""
        return targeted_layers(model, self)

    def check(self, model: nn.Module) -> None:
        """Raise LoRAError for a setting that names a module that `model` does not have, or not as a layer of `kind`."""
        check_names(model, self)

    def selects(self, name: str) -> bool:
        """Whether the linear layer `name` is to be adapted, unless it is in one of `modules_to_save`."""
        if self.exclude_modules and matches(self.exclude_modules, name):
            return False
        if self.target_modules == ALL_LINEAR:
            return name.partition(".")[0] not in HEAD_NAMES
        return matches(self.target_modules, name, self.layers_to_transform, self.layers_pattern)

    def __post_init__(self) -> None:
        if self.target_modules == (ALL_LINEAR,):  # as the command line gives it
            object.__setattr__(self, "target_modules", ALL_LINEAR)
        if not self.target_modules:
            raise LoRAError(f"{self.table}: target_modules is empty; name at least one linear layer, for example query")
        if self.layers_to_transform is not None and not self.layers_to_transform:
            raise LoRAError(
                f"{self.table}: layers_to_transform is empty; name at least one layer, or omit it to adapt all"
            )
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise LoRAError(
                f"{self.table}: layers_to_transform can't be combined with all-linear or another expression in "
                "target_modules; put the layer numbers into the expression"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise LoRAError(f"{self.table}: layers_pattern has no effect without layers_to_transform; give both")
        for expression in expressions(vars(self)):
            try:
                re.compile(expression)
            except (re.error, RecursionError, OverflowError) as error:
                raise LoRAError(
                    f"{self.table}: {expression!r} is not a regular expression ({error}); correct it"
                ) from None


@dataclass(frozen=True)
class LoRAConfig(LinearMethodConfig):
    """Settings of LoRA, with the meanings that peft's `LoraConfig` gives them (its name in brackets where it differs).

    Raises LoRAError for a rank below 1, an alpha of 0 or less, a dropout outside [0, 1), an unknown bias, no target or
    no layer at all, what is not a regular expression, or layers chosen by number together with a regular expression
    (which can name its layers itself) or with "all-linear".
    """

    table: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    peft_names: ClassVar[dict[str, str]] = {
        "rank": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "init": "init_lora_weights",
    }
    peft_constants: ClassVar[dict[str, Any]] = {
        "init_lora_weights": True,
        "eva_config": None,
        "fan_in_fan_out": False,
    }

    rank: int = 8
    """Rank r of every update [r]."""
    alpha: float = 16.0
    """Numerator of the scale alpha / r [lora_alpha]."""
    dropout: float = 0.0
    """Probability of zeroing an input of the update, during training [lora_dropout]."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks of single modules, by a regular expression for the end of the name."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Alphas of single modules, likewise."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Biases to train: none, those of the adapted layers, or all."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""
    use_dora: bool = False
    """Train the length of each row of a weight apart from its direction (DoRA)."""
    init: str = "default"
    """Where A and B start: default, gaussian, orthogonal, pissa, pissa_niter_N, olora (`lora/initial.py`) or eva.
    Not in the file, as a trained adapter does not depend on it [init_lora_weights]."""
    eva_config: EvaConfig = field(default_factory=EvaConfig)
    """Settings of the initialisation eva, whose A `lora.eva` sets after the adapters are made; not in the file."""

    def wrap(self, base: nn.Linear, name: str) -> Adapter:
        """The adapter of the layer `base`, whose name decides its rank and alpha where patterns are given.

        Raises LoRAError for an initial update of a rank that the weight does not have.
        """
        residual = takes_from_base(self.init)
        method = DoRALinear if self.use_dora else ResidualLoRALinear if residual else LoRALinear
        layer = method(
            base,
            rank=pattern_value(self.rank_pattern, name, self.rank),
            alpha=pattern_value(self.alpha_pattern, name, self.alpha),
            dropout=self.dropout,
            use_rslora=self.use_rslora,
        )
        largest = base.in_features if self.init == "eva" else min(base.in_features, base.out_features)
        if (residual or self.init == "eva") and layer.rank > largest:
            raise LoRAError(
                f"lora: init is {self.init!r}, but {name} has rank {layer.rank}; it can be {largest} at most"
            )
        if self.init != "default":
            initialize(layer, self.init)
        return layer

    def in_file(self, wrapped: Mapping[str, Adapter]) -> MethodConfig:
        """Twice the rank at the same scale, if the file also holds the initial update with a minus sign."""
        if not takes_from_base(self.init):
            return self
        factor = math.sqrt(2) if self.use_rslora else 2
        return dataclasses.replace(
            self,
            init="default",
            rank=2 * self.rank,
            alpha=factor * self.alpha,
            rank_pattern={pattern: 2 * rank for pattern, rank in self.rank_pattern.items()},
            alpha_pattern={pattern: factor * alpha for pattern, alpha in self.alpha_pattern.items()},
        )

    def trains(self, name: str, adapted: bool) -> bool:
        """Biases as `bias` says."""
        return name.rpartition(".")[2] == "bias" and (self.bias == "all" or (self.bias == "lora_only" and adapted))

    def __post_init__(self) -> None:
        super().__post_init__()
        for where, rank in [("rank", self.rank), *((f"rank_pattern {k!r}", v) for k, v in self.rank_pattern.items())]:
            self.require(where, _is_integer(rank), f"a rank is an {_INTEGER}", rank)
        alphas = [("alpha", self.alpha), *((f"alpha_pattern {k!r}", v) for k, v in self.alpha_pattern.items())]
        for where, alpha in alphas:
            fits = 0 < alpha < math.inf
            self.require(where, fits, "it must be above 0, as the update is scaled by alpha / r", alpha)
        inits = "default, gaussian, orthogonal, pissa, pissa_niter_N, olora or eva"
        self.require("init", bool(INITS.fullmatch(self.init)), f"choose {inits}")
        if self.init != "eva" and self.eva_config != EvaConfig():
            raise LoRAError(f"lora: eva_config has no effect, as init is {self.init!r}; remove it, or choose eva")
        if self.init == "orthogonal" and (odd := [r for r in (self.rank, *self.rank_pattern.values()) if r % 2]):
            raise LoRAError(
                f"lora: init is 'orthogonal', which halves the rank, and {odd[0]} is odd; choose an even one"
            )
        if self.use_dora and takes_from_base(self.init):
            raise LoRAError(f"lora: init is {self.init!r}, which use_dora can't be combined with; choose another")
        self.require("dropout", 0 <= self.dropout < 1, _PROBABILITY)
        self.require("bias", self.bias in ("none", "lora_only", "all"), "choose none, lora_only or all")


@dataclass(frozen=True)
class AdaLoRAConfig(LinearMethodConfig):
    """Settings of AdaLoRA, as peft's `AdaLoraConfig`. Raises LoRAError for a number outside its range."""

    table: ClassVar[str] = "adalora"
    peft_type: ClassVar[str] = "ADALORA"
    peft_names: ClassVar[dict[str, str]] = {"alpha": "lora_alpha", "dropout": "lora_dropout", "kept": "rank_pattern"}
    peft_constants: ClassVar[dict[str, Any]] = {"init_lora_weights": True, "fan_in_fan_out": False, "bias": "none"}

    init_r: int = 12
    """Rank of every update at first."""
    target_r: int = 8
    """Average rank of the updates in the end."""
    alpha: float = 16.0
    """Numerator of the scale alpha / init_r [lora_alpha]."""
    dropout: float = 0.0
    """Probability of zeroing an input of the update, during training [lora_dropout]."""
    tinit: int = 0
    """Optimizer steps before the first pruning."""
    tfinal: int = 0
    """Last optimizer steps, in which the ranks are fixed."""
    deltaT: int = 1
    """Optimizer steps from one pruning to the next."""
    beta1: float = 0.85
    """Share of the old value in the running mean of the sensitivity."""
    beta2: float = 0.85
    """Share of the old value in the running mean of the uncertainty."""
    orth_reg_weight: float = 0.5
    """Weight of the orthogonality penalty in the loss."""
    total_step: int | None = None
    """Optimizer steps by which tfinal is counted; those of the run unless set."""
    kept: Mapping[str, tuple[bool, ...]] | None = None
    """In files of trained adapters: the triplets of each layer that are not pruned [rank_pattern]."""

    def wrap(self, base: nn.Linear, name: str) -> Adapter:
        """The adapter of the layer `base`. Raises LoRAError for a rank that a matrix of its shape can't have."""
        kept = (self.kept or {}).get(f"{name}.lora_E", ())
        if len(kept) not in (0, self.init_r):
            raise LoRAError(f"adalora: rank_pattern of {name} has {len(kept)} entries, but init_r is {self.init_r}")
        if self.init_r > (most := min(base.in_features, base.out_features)):
            raise LoRAError(f"adalora: init_r is {self.init_r}, but {name} has {most} singular values; lower it")
        return AdaLoRALinear(base, self.init_r, self.alpha, self.dropout, kept)

    def unmatched_patterns(self, names: Collection[str]) -> list[str]:
        """The layers in `kept` that are none of `names`, as texts for a message."""
        return [f"rank_pattern {key!r}" for key in self.kept or () if key.removesuffix(".lora_E") not in names]

    def for_run(self, total_steps: int) -> MethodConfig:
        """With the number of steps, unless it is set."""
        if self.kept is not None:
            raise LoRAError("adalora: kept is given, but it is for files of trained adapters; remove it")
        if self.target_r > self.init_r:
            raise LoRAError(f"adalora: target_r is {self.target_r}, but init_r is {self.init_r}; lower target_r")
        return dataclasses.replace(self, total_step=self.total_step or total_steps)

    def in_file(self, wrapped: Mapping[str, Adapter]) -> MethodConfig:
        """With the triplets that are left, if any is pruned. Raises LoRAError without total_step: peft needs it."""
        self.final_step()
        kept = {f"{name}.lora_E": tuple(adapter.get_buffer("kept").tolist()) for name, adapter in wrapped.items()}
        return dataclasses.replace(self, kept=None if all(map(all, kept.values())) else kept)

    def final_step(self) -> int:
        """The optimizer step, counted from 0, after which the ranks are fixed. Raises LoRAError without total_step."""
        if self.total_step is None:
            raise LoRAError("adalora: total_step is missing; set it to the number of optimizer steps")
        return self.total_step - self.tfinal

    def __post_init__(self) -> None:
        super().__post_init__()
        smallest = {"init_r": 1, "target_r": 1, "tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 1}
        for name, least in smallest.items():
            value = getattr(self, name)
            fits = value is None or _is_integer(value, least, math.inf)
            self.require(name, fits, f"it is an integer, {least} or more")
        self.require("alpha", 0 < self.alpha < math.inf, "it must be above 0")
        self.require("orth_reg_weight", 0 <= self.orth_reg_weight < math.inf, "it must be 0 or more")
        for name in ("beta1", "beta2"):
            self.require(name, 0 < getattr(self, name) < 1, "it must be between 0 and 1")
        self.require("dropout", 0 <= self.dropout < 1, _PROBABILITY)
        if self.total_step is not None and self.tinit >= self.final_step():
            raise LoRAError(
                f"adalora: tinit is {self.tinit} and tfinal {self.tfinal}: of {self.total_step} steps they leave none "
                "in which to prune; lower them"
            )


@dataclass(frozen=True)
class IA3Config(LinearMethodConfig):
    """Settings of (IA)^3, as peft's `IA3Config`. Raises LoRAError for what is no target, as LoRAConfig does."""

    table: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"
    peft_constants: ClassVar[dict[str, Any]] = {"init_ia3_weights": True, "fan_in_fan_out": False}
    peft_lacks: ClassVar[tuple[str, ...]] = ("layers_to_transform", "layers_pattern")

    target_modules: tuple[str, ...] | str = ("key", "value", "output.dense")
    """Linear layers to adapt, named as for LoRA; as in peft, `output.dense` is attention's output too."""
    feedforward_modules: tuple[str, ...] | str = ("output.dense",)
    """Those of them that scale their input instead of their output."""

    def wrap(self, base: nn.Linear, name: str) -> Adapter:
        """The adapter of the layer `base`."""
        return IA3Linear(base, feedforward=matches(self.feedforward_modules, name))


@dataclass(frozen=True)
class BitFitConfig(MethodConfig):
    """BitFit: nothing is added, and every bias of the model is trained: b in x W^T + b and in LayerNorm.

    Source: Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
    Language-models", section 3.
    """

    table: ClassVar[str] = "bitfit"
    peft_type: ClassVar[str] = "BITFIT"
    in_peft: ClassVar[bool] = False

    def trains(self, name: str, adapted: bool) -> bool:
        """Biases."""
        return name.rpartition(".")[2] == "bias"


@dataclass(frozen=True)
class LayerNormConfig(LinearMethodConfig):
    """LayerNorm tuning, as peft's `LNTuningConfig`: nothing is added, and each LayerNorm's g and b are trained.

        y = g * (x - mean(x)) / sqrt(var(x) + eps) + b,     g, b (hidden,)

    Source: Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", section 3.
    """

    table: ClassVar[str] = "layer_norm"
    peft_type: ClassVar[str] = "LN_TUNING"
    peft_lacks: ClassVar[tuple[str, ...]] = ("layers_to_transform", "layers_pattern")
    peft_layer: ClassVar[str] = "ln_tuning_layers"
    kind: ClassVar[type[nn.Module]] = nn.LayerNorm
    kind_name: ClassVar[str] = "LayerNorm"

    target_modules: tuple[str, ...] | str = ("LayerNorm",)
    """LayerNorms to train, named as for LoRA."""

    def wrap_all(self, modules: Mapping[str, nn.Module]) -> dict[str, Adapter]:
        """None: the layers' own parameters are trained."""
        return {}

    def trains(self, name: str, adapted: bool) -> bool:
        """The parameters of the targets."""
        return adapted

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_modules == ALL_LINEAR:
            raise LoRAError("layer_norm: target_modules is all-linear; name LayerNorms, for example LayerNorm")


@dataclass(frozen=True)
class FullConfig(MethodConfig):
    """Full fine-tuning: nothing is added, and every parameter is trained, or only those of some modules.

    The largest and the smallest choice that the methods are between: the complete model, or the head alone with
    `modules_to_save = ["classifier"]`.
    """

    table: ClassVar[str] = "full"
    peft_type: ClassVar[str] = "FULL"
    in_peft: ClassVar[bool] = False

    modules_to_save: tuple[str, ...] = ("roberta", "classifier")
    """The modules that are trained and saved, by names or ends of names; nothing else is."""

    def __post_init__(self) -> None:
        if not self.modules_to_save:
            raise LoRAError("full: modules_to_save is empty; name at least one module, for example classifier")


@dataclass(frozen=True)
class VeRAConfig(LinearMethodConfig):
    """Settings of VeRA, as peft's `VeraConfig`. Raises LoRAError as LoRAConfig does."""

    table: ClassVar[str] = "vera"
    peft_type: ClassVar[str] = "VERA"
    peft_names: ClassVar[dict[str, str]] = {"rank": "r", "dropout": "vera_dropout"}
    peft_constants: ClassVar[dict[str, Any]] = {"init_weights": True, "fan_in_fan_out": False}
    peft_lacks: ClassVar[tuple[str, ...]] = ("exclude_modules",)

    rank: int = 256
    """Rank r of the shared matrices; each layer trains r + out numbers [r]."""
    dropout: float = 0.0
    """Probability of zeroing an input of the update, during training [vera_dropout]."""
    d_initial: float = 0.1
    """Initial value of each number of lambda_d."""
    projection_prng_key: int = 0
    """Seed of the shared matrices."""
    save_projection: bool = True
    """Whether the file holds the shared matrices too, not their seed alone."""
    bias: Literal["none", "vera_only", "all"] = "none"
    """Biases to train: none, those of the adapted layers, or all."""

    def wrap_all(self, modules: Mapping[str, Any]) -> dict[str, Adapter]:
        """The adapters of the layers `modules`, around matrices as large as the largest of them needs."""
        if not modules:
            return {}
        inputs = max(layer.in_features for layer in modules.values())
        outputs = max(layer.out_features for layer in modules.values())
        like = next(iter(modules.values())).weight
        like = torch.empty(0, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
        shared = Projections(self.rank, inputs, outputs, self.projection_prng_key, like)
        return {name: VeRALinear(layer, shared, self.dropout, self.d_initial) for name, layer in modules.items()}

    def trains(self, name: str, adapted: bool) -> bool:
        """Biases as `bias` says."""
        return name.rpartition(".")[2] == "bias" and (self.bias == "all" or (self.bias == "vera_only" and adapted))

    def shared(self, wrapped: Mapping[str, Adapter]) -> dict[str, Tensor]:
        """A and B, with `save_projection`."""
        if not (self.save_projection and wrapped):
            return {}
        projections: Any = next(iter(wrapped.values())).projections
        return {"base_model.vera_A": projections.A, "base_model.vera_B": projections.B}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("rank", _is_integer(self.rank), f"a rank is an {_INTEGER}")
        self.require("dropout", 0 <= self.dropout < 1, _PROBABILITY)
        self.require("bias", self.bias in ("none", "vera_only", "all"), "choose none, vera_only or all")


@dataclass(frozen=True)
class BottleneckConfig(MethodConfig):
    """Settings of bottleneck adapters, with the meanings of AdapterHub's `SeqBnConfig` and `DoubleSeqBnConfig`.

    Raises LoRAError for an unknown form, or a reduction factor below 1.
    """

    table: ClassVar[str] = "bottleneck"
    peft_type: ClassVar[str] = "BOTTLENECK"
    in_peft: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    adapterhub: ClassVar[bool] = True

    form: Literal["pfeiffer", "houlsby"] = "pfeiffer"
    """pfeiffer: after the feed-forward network [SeqBnConfig]; houlsby: after attention too [DoubleSeqBnConfig]."""
    reduction_factor: float = 16
    """Width of the layer divided by that of the bottleneck, which is rounded down, but is 1 at least."""
    leave_out: tuple[int, ...] = ()
    """Numbers of the encoder layers without a bottleneck."""

    def targets(self, model: nn.Module) -> dict[str, Any]:
        """The modules that close the sublayers of the chosen form, outside fully trained modules."""
        fully_trained = fully_trained_modules(model, self)
        return {
            name: module
            for name, module in sublayer_ends(model, attention=self.form == "houlsby").items()
            if layer_index(name) not in self.leave_out and not inside(name, fully_trained)
        }

    def wrap(self, base: Any, name: str) -> Adapter:
        """The adapter of the module `base`."""
        (hidden,) = base.LayerNorm.normalized_shape
        return BottleneckAdapter(base, max(1, int(hidden // self.reduction_factor)), pfeiffer=self.form == "pfeiffer")

    def check(self, model: nn.Module) -> None:
        """Raise LoRAError for a layer that `model` does not have, or if none is left."""
        super().check(model)
        numbers = {layer_index(name) for name in sublayer_ends(model)}
        if absent := sorted(set(self.leave_out) - numbers):
            raise LoRAError(f"bottleneck: leave_out: the model has no layer {', '.join(map(str, absent))}")
        if not self.targets(model):
            raise LoRAError("bottleneck: no sublayer is adapted: each ends in a module of dense, dropout and LayerNorm")

    def __post_init__(self) -> None:
        self.require("form", self.form in ("pfeiffer", "houlsby"), "choose pfeiffer or houlsby")
        self.require("reduction_factor", 1 <= self.reduction_factor < math.inf, "it must be 1 or more")


@dataclass(frozen=True)
class VirtualTokensConfig(MethodConfig):
    """Settings of a method that puts virtual tokens before each text.

    Raises LoRAError for a number below 1, and for what has no effect where it is used.
    """

    merges: ClassVar[bool] = False
    peft_constants: ClassVar[dict[str, Any]] = {"num_transformer_submodules": 1}
    key_prefix: ClassVar[str] = "base_model."
    places: ClassVar[tuple[str, ...]] = ("word_embeddings",)
    """Ends of the names of the modules that are wrapped."""

    num_virtual_tokens: int = 20  # type: ignore[misc]  # the class variable of methods without
    """Number p of virtual tokens."""
    inference_mode: bool = False
    """In files of trained adapters: they hold the tokens themselves, whatever network computed them in training."""

    def targets(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """The modules called as in `places`, wherever they are."""
        return {
            name: module
            for name, module in plain_modules(model).items()
            if matches(self.places, name) and isinstance(module, nn.Linear | nn.Embedding)
        }

    def in_file(self, wrapped: Mapping[str, Adapter]) -> MethodConfig:
        """As in peft's files."""
        return dataclasses.replace(self, inference_mode=True)

    def check(self, model: nn.Module) -> None:
        """Raise LoRAError for a model without these modules, one of them trained fully, or a setting without effect."""
        fully_trained, targets = fully_trained_modules(model, self), self.targets(model)
        for place in self.places:
            if not any(matches((place,), name) for name in targets):
                raise LoRAError(f"{self.table}: the model has no module called {place}; it can't be tuned so")
        for name in targets:
            if inside(name, fully_trained):
                raise LoRAError(f"{self.table}: modules_to_save holds {name}, which must be frozen; leave it out")
        for name, why in self.without_effect().items():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise LoRAError(f"{self.table}: {name} is {getattr(self, name)!r}, {why}")

    def without_effect(self) -> dict[str, str]:
        """Settings that change nothing beside the others, and why."""
        return {"inference_mode": "which is for files of trained adapters; leave it out"}

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "encoder_hidden_size", "encoder_num_layers"):
            value = getattr(self, name, None)
            self.require(name, value is None or _is_integer(value), f"it is an {_INTEGER}")


@dataclass(frozen=True)
class PromptConfig(VirtualTokensConfig):
    """Settings of a method that puts virtual tokens among the word embeddings."""

    peft_refuses: ClassVar[tuple[str, ...]] = ("after_first",)

    after_first: bool = False
    """Put the virtual tokens directly after <s>, so that the head reads <s>; in peft it reads the first of them."""

    def parameter_key(self, name: str, key: str) -> str:
        """Key in peft's file; peft, which reads "prompt_embeddings" alone, misses it in a file with `after_first`."""
        return f"{key}_after_first" if self.after_first else key


@dataclass(frozen=True)
class PromptTuningConfig(PromptConfig):
    """Settings of prompt tuning, as peft's `PromptTuningConfig`. Raises LoRAError as VirtualTokensConfig does."""

    table: ClassVar[str] = "prompt_tuning"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    peft_constants: ClassVar[dict[str, Any]] = VirtualTokensConfig.peft_constants | {"prompt_tuning_init": "RANDOM"}

    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB"] = "RANDOM"
    """Initial values: standard normal numbers, or the vectors of random words."""

    def wrap(self, base: nn.Embedding, name: str) -> Adapter:
        """The adapter of the word embeddings."""
        return PromptTuning(base, self.num_virtual_tokens, self.after_first, self.prompt_tuning_init == "SAMPLE_VOCAB")

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.prompt_tuning_init in ("RANDOM", "SAMPLE_VOCAB")
        self.require("prompt_tuning_init", fits, "choose RANDOM or SAMPLE_VOCAB")


@dataclass(frozen=True)
class PTuningConfig(PromptConfig):
    """Settings of P-tuning, as peft's `PromptEncoderConfig`. Raises LoRAError as VirtualTokensConfig does."""

    table: ClassVar[str] = "p_tuning"
    peft_type: ClassVar[str] = "P_TUNING"

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    """The network that computes the virtual tokens."""
    encoder_hidden_size: int | None = None
    """Width of its hidden layers; the model's unless set."""
    encoder_num_layers: int = 2
    """Layers of the LSTM."""
    encoder_dropout: float = 0.0
    """Dropout between the layers of the LSTM."""

    def wrap(self, base: nn.Embedding, name: str) -> Adapter:
        """The adapter of the word embeddings."""
        return PTuning(
            base,
            self.num_virtual_tokens,
            self.after_first,
            encoder=None if self.inference_mode else self.encoder_reparameterization_type,
            width=self.encoder_hidden_size or base.embedding_dim,
            num_layers=self.encoder_num_layers,
            dropout=self.encoder_dropout,
        )

    def without_effect(self) -> dict[str, str]:
        """What the MLP lacks, and dropout between the layers of one."""
        found = super().without_effect()
        if self.encoder_reparameterization_type == "MLP":
            found |= dict.fromkeys(("encoder_num_layers", "encoder_dropout"), "which an MLP does not have; use LSTM")
        if self.encoder_num_layers == 1:
            found["encoder_dropout"] = "but there is one layer; set encoder_num_layers, or leave it out"
        return found

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.encoder_reparameterization_type in ("MLP", "LSTM")
        self.require("encoder_reparameterization_type", fits, "choose MLP or LSTM")
        self.require("encoder_dropout", 0 <= self.encoder_dropout < 1, _PROBABILITY)


@dataclass(frozen=True)
class PrefixTuningConfig(VirtualTokensConfig):
    """Settings of prefix tuning, as peft's `PrefixTuningConfig`. Raises LoRAError as VirtualTokensConfig does."""

    table: ClassVar[str] = "prefix_tuning"
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    in_peft: ClassVar[bool] = False  # it reads the file, but can't run it for RoBERTa with the present transformers
    places: ClassVar[tuple[str, ...]] = ("key", "value", "position_embeddings")

    prefix_projection: bool = False
    """Compute the prefixes of all layers from one matrix by a network of two layers, which files do not hold."""
    encoder_hidden_size: int | None = None
    """Width of this network; the model's unless set."""
    init_weights: Literal["zero"] | None = None
    """Initial values: standard normal numbers, or zero."""

    def wrap_all(self, modules: Mapping[str, Any]) -> dict[str, Adapter]:
        """The adapters of keys and values, with one projection if there is any, and of positions."""
        projection: Projection | None = None
        wrapped: dict[str, Adapter] = {}
        for name, module in modules.items():
            if isinstance(module, nn.Embedding):
                wrapped[name] = LaterPositions(module, self.num_virtual_tokens)
            else:
                if self.prefix_projection and not self.inference_mode and projection is None:
                    hidden, like = module.out_features, module.weight
                    projection = Projection(self.num_virtual_tokens, hidden, self.encoder_hidden_size or hidden)
                    projection.to(like.device, torch.promote_types(like.dtype, torch.float32))
                wrapped[name] = PrefixTuning(module, self.num_virtual_tokens, projection, self.init_weights == "zero")
        return wrapped

    def parameter_key(self, name: str, key: str) -> str:
        """Key in peft's file: one tensor holds the prefixes of all layers, side by side."""
        return key

    def without_effect(self) -> dict[str, str]:
        """The width of a network that there is not."""
        none = {} if self.prefix_projection else {"encoder_hidden_size": "but prefix_projection is off; turn it on"}
        return super().without_effect() | none

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("init_weights", self.init_weights in (None, "zero"), "choose zero, or leave it out")


METHODS: dict[str, type[MethodConfig]] = {
    config.table: config
    for config in (
        LoRAConfig,
        VeRAConfig,
        IA3Config,
        BitFitConfig,
        LayerNormConfig,
        FullConfig,
        BottleneckConfig,
        AdaLoRAConfig,
        PromptTuningConfig,
        PTuningConfig,
        PrefixTuningConfig,
    )
}
"""Every method by the name of its table."""
