"""The parameter budget of a run, checked on shapes alone, before weights are read or a device is used."""

from __future__ import annotations

from collections.abc import Sequence

from lora.budget import count_on_meta, largest_rank, smallest_reduction
from lora.config import BottleneckConfig, LoRAConfig, MethodConfig
from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification
from training.errors import ConfigError


def trainable_parameters(model_config: RobertaConfig, methods: Sequence[MethodConfig]) -> int:
    """Trainable parameters of this model with these methods, counted on the meta device."""
    return count_on_meta(lambda: RobertaForSequenceClassification(model_config), *methods).trainable


def check_budget(model_config: RobertaConfig, methods: Sequence[MethodConfig], max_trainable: int | None) -> None:
    """Raise ConfigError if more than `max_trainable` parameters would be trained, naming the size that fits.

    Raises what `inject_lora` raises for these settings, also without a budget.
    """
    trainable = trainable_parameters(model_config, methods)
    if max_trainable is None or trainable <= max_trainable:
        return
    build = lambda: RobertaForSequenceClassification(model_config)  # noqa: E731
    fix = "choose fewer target_modules or virtual tokens, or train less of the head by modules_to_save"
    for method in methods:
        others = [other for other in methods if other is not method]
        if isinstance(method, LoRAConfig):
            size, fits = "largest rank", largest_rank(build, method, max_trainable, *others)
        elif isinstance(method, BottleneckConfig):
            size, fits = "smallest reduction_factor", smallest_reduction(build, method, max_trainable, *others)
        else:
            continue
        fix = f"the {size} that fits is {fits}" if fits else f"no {size.split()[1]} fits; {fix}"
    raise ConfigError(
        f"{trainable:,} parameters would be trained, {trainable - max_trainable:,} over "
        f"train.max_trainable = {max_trainable:,}; {fix}"
    )
