"""The base class of all methods: a frozen module and the trainable parameters that a method adds to it.

A method of parameter-efficient fine-tuning is one subclass of `Adapter` in one file: its trainable parameters, its
`forward` and, where there is one, its `merged`. Merging, counting, budgets, files and reports ask the adapters of a
model for what they need and know no method by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora.errors import LoRAError
from lora.quantized import dequantize


class Adapter(nn.Module):
    """A frozen module, `base` (mostly an `nn.Linear`), with a method's trainable parameters beside it.

    A subclass sets `method` and `peft_keys`, makes its parameters by `parameter_like`, and defines `forward`, and
    `merged` if `base` is an `nn.Linear` that can compute the same by itself; `forward` must return `self.base(x)` while
    `is_merged`, as the update is in `base` then.
    """

    method: ClassVar[str]
    """Name of the method, for tables; a file is loaded into adapters of the same name only."""
    peft_keys: ClassVar[dict[str, str]]
    """Maps the name of each of the adapter's parameters to the suffix of its key in peft's file."""
    config: Any = None
    """The settings that it was made by; set by `lora.inject`."""
    shares_base = False
    """Whether adapters of other models use the parameters of `base` too; set by `lora.several`."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base: Any = base.requires_grad_(False)
        self._unmerged: tuple[Tensor, Tensor | None] | None = None  # the frozen (W, b), kept while merged

    def forward(self, x: Tensor) -> Tensor:
        """The method's complete formula, in the shapes of `base`: (..., in) -> (..., out) for a linear layer."""
        raise NotImplementedError

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """The W' (out, in) and b' (out,) of a plain linear layer that computes the same: x W'^T + b'.

        Raises LoRAError for a method without such a layer.
        """
        raise LoRAError(f"{self.method} can't be merged into the weights; use the model as it is")

    def settings(self) -> dict[str, float]:
        """Numbers that affect the output and are not parameters, such as rank and scaling; compared on loading."""
        return {}

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The method's parameters by name: all but those of `base`."""
        return {name: value for name, value in self.named_parameters() if not name.startswith("base.")}

    def in_file(self) -> dict[str, Tensor]:
        """What peft's file holds of it, by the names in `peft_keys`."""
        return {**self.own_parameters()}

    def load(self, tensors: Mapping[str, Tensor], planned: Adapter) -> None:
        """Copy what a file holds of `planned`, an adapter with the file's settings and without values."""
        for name, parameter in self.own_parameters().items():
            parameter.copy_(tensors[name])

    def drop_encoder(self) -> None:
        """Replace a network that computes the adapter's parameters in training, if it has one, by what it computes."""

    def extra_repr(self) -> str:
        """What `print(model)` shows of the layer."""
        return ", ".join(f"{name}={value:.4g}" for name, value in self.settings().items())

    def parameter_like(self, *shape: int) -> nn.Parameter:
        """An uninitialised parameter where `base` is, in float32 at least.

        Also over a half-precision base: an update of 1e-4 would be lost in bfloat16's eight bits.
        """
        weight = next(self.base.parameters())
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return nn.Parameter(torch.empty(shape, device=weight.device, dtype=dtype))

    @property
    def can_merge(self) -> bool:
        """Whether the method has a plain linear layer that computes the same."""
        return type(self).merged is not Adapter.merged

    @property
    def is_merged(self) -> bool:
        """Whether the update is inside `base` now."""
        return self._unmerged is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the update into the frozen layer: (W, b) <- merged(). The layer then costs exactly one matmul.

        Exact in real arithmetic; in floating point the outputs differ by rounding. W and b are kept, as subtracting the
        update again would not restore their bits. Raises RuntimeError if the layer is merged already, or in use by
        other models. A base in fewer bits is dequantized, and stays so.
        Source: Hu et al. 2021, section 4.1, "No Additional Inference Latency".
        """
        if self.is_merged:
            raise RuntimeError("this layer is merged already; a second merge would add the update twice")
        if self.shares_base:
            raise RuntimeError("other models use this layer too; load the adapter alone to merge it")
        weight, bias = self.merged()
        dequantize(self)  # fewer bits would round the update away
        self._unmerged = self.base.weight.clone(), None if self.base.bias is None else self.base.bias.clone()
        self.base.weight.copy_(weight)
        if bias is not None:
            self.base.bias.copy_(bias)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the bits of W and b before `merge`. Raises RuntimeError if the layer is not merged."""
        if self._unmerged is None:
            raise RuntimeError("this layer is not merged; there is nothing to take out")
        weight, bias = self._unmerged
        self.base.weight.copy_(weight)
        if bias is not None:
            self.base.bias.copy_(bias)
        self._unmerged = None


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Every adapter of the model, by the name that the wrapped module has in the plain model."""
    found: dict[str, Adapter] = {}
    for name, module in model.named_modules():  # a module before those inside it
        if isinstance(module, Adapter):
            found[plain_name(name, found)] = module
    return found


def plain_name(name: str, wrapped: Iterable[str]) -> str:
    """The name in the plain model of a module or parameter of a model with adapters on the modules `wrapped`.

    "attention.output.base.dense.base.bias" -> "attention.output.dense.bias".
    """
    for adapted in wrapped:
        if f"{name}.".startswith(f"{adapted}.base."):
            name = adapted + name.removeprefix(f"{adapted}.base")
    return name
