"""What to adapt and how: the settings of a LoRA run. Plain data, checked when it is made; `lora.inject` applies it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


class LoRAError(ValueError):
    """A LoRA setting or adapter file that can't be used: one line that names the field or file, and the mend."""


@dataclass(frozen=True)
class LoRAConfig:
    """Settings of LoRA, with the meanings that peft's `LoraConfig` gives them (its name in brackets where it differs).

    Raises LoRAError for a value of another type, a rank below 1, an alpha of 0 or less, a dropout outside [0, 1), an
    unknown bias, no target or no layer at all, what is no regular expression, or layers chosen by number together with
    a regular expression (which can name its layers itself).
    """

    rank: int = 8
    """Rank r of every update [r]."""
    alpha: float = 16.0
    """Numerator of the scale alpha / r [lora_alpha]."""
    dropout: float = 0.0
    """Probability of zeroing an input of the update, during training [lora_dropout]."""
    target_modules: tuple[str, ...] | str = ("query", "key", "value")
    """Linear layers to adapt: names or ends of names, or one regular expression for the whole name."""
    layers_to_transform: tuple[int, ...] | None = None
    """Numbers of the encoder layers to adapt; None adapts all."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks of single modules, by a regular expression for the end of the name."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Alphas of single modules, likewise."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Biases to train: none, those of the adapted layers, or all."""
    modules_to_save: tuple[str, ...] = ("classifier",)
    """Modules trained in full and saved with the adapter; the head, unless told otherwise."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""

    def __post_init__(self) -> None:
        self._check_types()
        for where, rank in [("rank", self.rank), *((f"rank_pattern {k!r}", v) for k, v in self.rank_pattern.items())]:
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise LoRAError(f"lora: {where} is {rank!r}; a rank is a whole number, 1 or more")
        for where, alpha in [
            ("alpha", self.alpha),
            *((f"alpha_pattern {k!r}", v) for k, v in self.alpha_pattern.items()),
        ]:
            if not 0 < alpha < float("inf"):
                raise LoRAError(f"lora: {where} is {alpha!r}; it must be above 0, as the update is scaled by alpha / r")
        if not 0 <= self.dropout < 1:
            raise LoRAError(f"lora: dropout is {self.dropout!r}; it is a probability in [0, 1)")
        if self.bias not in ("none", "lora_only", "all"):
            raise LoRAError(f"lora: bias is {self.bias!r}; choose none, lora_only or all")
        if not self.target_modules:
            raise LoRAError("lora: target_modules is empty; name at least one linear layer, for example query")
        if self.layers_to_transform is not None and not self.layers_to_transform:
            raise LoRAError("lora: layers_to_transform is empty; name at least one layer, or leave it out to adapt all")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise LoRAError(
                "lora: layers_to_transform does not go with a regular expression in target_modules; "
                "put the layer numbers into the expression"
            )

    def _check_types(self) -> None:
        """Raise LoRAError for a value of another type than its field's: settings also come from files of strangers."""

        def names(value: object) -> bool:
            return isinstance(value, tuple) and all(isinstance(item, str) for item in value)

        def number(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool)

        layers = self.layers_to_transform
        wanted = {
            "alpha": (number(self.alpha), "a number"),
            "dropout": (number(self.dropout), "a number"),
            "target_modules": (isinstance(self.target_modules, str) or names(self.target_modules), "names of layers"),
            "layers_to_transform": (
                layers is None
                or (isinstance(layers, tuple) and all(isinstance(layer, int) and layer >= 0 for layer in layers)),
                "numbers of layers",
            ),
            "modules_to_save": (names(self.modules_to_save), "names of modules"),
            "bias": (isinstance(self.bias, str), "none, lora_only or all"),
            "use_rslora": (isinstance(self.use_rslora, bool), "true or false"),
        }
        for field_name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, field_name)
            fits = isinstance(pattern, Mapping) and all(isinstance(key, str) for key in pattern)
            wanted[field_name] = fits and all(map(number, pattern.values())), "numbers by name"
        for field_name, (fits, what) in wanted.items():
            if not fits:
                raise LoRAError(f"lora: {field_name} is {getattr(self, field_name)!r}; it must be {what}")
        expressions = [*self.rank_pattern, *self.alpha_pattern]
        if isinstance(self.target_modules, str):
            expressions.append(self.target_modules)
        for expression in expressions:
            try:
                re.compile(expression)
            except (re.error, RecursionError, OverflowError) as error:
                raise LoRAError(f"lora: {expression!r} is not a regular expression ({error}); mend it") from None
