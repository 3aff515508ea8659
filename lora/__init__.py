"""LoRA for any `nn.Module` that holds `nn.Linear`: wrap, freeze, count, save, load, merge.

Imported lazily, name by name, so that `python -m lora.budget` answers without waiting for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora.adapter import load_adapter as load_adapter
    from lora.adapter import save_adapter as save_adapter
    from lora.config import LoRAConfig as LoRAConfig
    from lora.config import LoRAError as LoRAError
    from lora.inject import ParameterCount as ParameterCount
    from lora.inject import count_parameters as count_parameters
    from lora.inject import inject_lora as inject_lora
    from lora.inject import merge_lora as merge_lora
    from lora.inject import unload_lora as unload_lora
    from lora.inject import unmerge_lora as unmerge_lora
    from lora.linear import LoRALinear as LoRALinear
    from lora.packed import PackedLoRALinear as PackedLoRALinear

_HOME = {
    "LoRAConfig": "config",
    "LoRAError": "config",
    "LoRALinear": "linear",
    "PackedLoRALinear": "packed",
    "ParameterCount": "inject",
    "count_parameters": "inject",
    "inject_lora": "inject",
    "merge_lora": "inject",
    "unload_lora": "inject",
    "unmerge_lora": "inject",
    "load_adapter": "adapter",
    "save_adapter": "adapter",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
