"""The parameter budget of a run, checked on shapes alone, before weights are read or a device is used."""

from __future__ import annotations

from lora.budget import count_on_meta, largest_rank
from lora.config import LoRAConfig
from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification
from training.errors import ConfigError


def trainable_parameters(model_config: RobertaConfig, lora: LoRAConfig) -> int:
    """Trainable parameters of this model with these adapters, counted on the meta device."""
    return count_on_meta(lambda: RobertaForSequenceClassification(model_config), lora).trainable


def check_budget(model_config: RobertaConfig, lora: LoRAConfig, max_trainable: int | None) -> None:
    """Raise ConfigError if more than `max_trainable` parameters would be trained, naming the largest rank that fits.

    Raises what `inject_lora` raises for these settings, also without a budget.
    """
    trainable = trainable_parameters(model_config, lora)
    if max_trainable is None or trainable <= max_trainable:
        return
    fits = largest_rank(lambda: RobertaForSequenceClassification(model_config), lora, max_trainable)
    fix = (
        f"the largest rank that fits is {fits}"
        if fits
        else "no rank fits; choose fewer target_modules, or train less of the head by lora.modules_to_save"
    )
    raise ConfigError(
        f"rank {lora.rank} would train {trainable:,} parameters, {trainable - max_trainable:,} over "
        f"train.max_trainable = {max_trainable:,}; {fix}"
    )
