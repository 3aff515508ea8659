"""What is adapted, trained and merged in a model, module by module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lora.adapter import Adapter, adapters, plain_name
from lora.inject import added_parameters


@dataclass(frozen=True)
class ModuleStatus:
    """A module that an adapter wraps, or some of whose own parameters are trained."""

    name: str
    """Its name in the plain model."""
    what: str
    """The method with its settings, such as "LoRA rank=8, scaling=2"; or the module's parameters that are trained."""
    merged: bool | None
    """Whether the adapter is merged; None without one."""
    trainable: int
    """Number of trained parameters."""


@dataclass(frozen=True)
class ModelStatus:
    """The status of each module that differs from the frozen base, in the order of the model."""

    modules: tuple[ModuleStatus, ...]

    def table(self) -> str:
        """One line per module, for a terminal."""
        words = {None: "-", True: "yes", False: "no"}
        name, what = (max([6, *(len(getattr(row, key)) for row in self.modules)]) for key in ("name", "what"))
        lines = [f"{'module':<{name}}  {'adapter or parameters':<{what}}  merged  {'trainable':>11}"]
        return "\n".join(
            lines
            + [f"{m.name:<{name}}  {m.what:<{what}}  {words[m.merged]:<6}  {m.trainable:>11,}" for m in self.modules]
        )


def model_status(model: nn.Module) -> ModelStatus:
    """Every adapter of `model`, and every module of which it trains own parameters."""
    wrapped = adapters(model)
    added = added_parameters(wrapped)
    found: dict[tuple[str, Adapter | None], dict[str, nn.Parameter]] = {}
    for path, parameter in model.named_parameters():
        name, _, own = plain_name(path, wrapped).rpartition(".")
        if id(parameter) in added:
            name = added[id(parameter)]
            found.setdefault((name, wrapped[name]), {})[own] = parameter
        elif parameter.requires_grad:
            found.setdefault((name, None), {})[own] = parameter
    return ModelStatus(
        tuple(
            ModuleStatus(
                name,
                ", ".join(parameters) if adapter is None else f"{adapter.method} {adapter.extra_repr()}".strip(),
                None if adapter is None else adapter.is_merged,
                sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad),
            )
            for (name, adapter), parameters in found.items()
        )
    )
