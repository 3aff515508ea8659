"""LoRA for any `nn.Module` that holds `nn.Linear`: wrap, freeze, count, save, load, merge."""

from lora.adapter import Adapter, adapters
from lora.config import LoRAConfig
from lora.errors import LoRAError
from lora.inject import (
    ParameterCount,
    count_parameters,
    inject_lora,
    merge_lora,
    unload_lora,
    unmerge_lora,
)
from lora.linear import LoRALinear
from lora.peft_format import load_adapter, save_adapter
from lora.several import Several
from lora.status import model_status
from lora.weighted_sum import weighted_sum

__all__ = [
    "Adapter",
    "LoRAConfig",
    "LoRAError",
    "LoRALinear",
    "ParameterCount",
    "Several",
    "adapters",
    "count_parameters",
    "inject_lora",
    "load_adapter",
    "merge_lora",
    "model_status",
    "save_adapter",
    "unload_lora",
    "unmerge_lora",
    "weighted_sum",
]
