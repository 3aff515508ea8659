"""Adapters in a model: which linear layers are wrapped, what is frozen, how many parameters are trained.

Works on any `nn.Module` that contains `nn.Linear`. The layer is in `lora.linear`, the matching of names in
`lora.targets`, files in `lora.peft_format`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lora.adapter import Adapter
from lora.config import LoRAConfig, LoRAError
from lora.targets import ALL_LINEAR, layer_index, matches


def inject_lora(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Wrap the targeted linear layers of `model`, in place, and freeze everything else.

    Trainable afterwards: the adapters' own parameters, the biases that `config.bias` names, and the modules in
    `config.modules_to_save`. Everything else has `requires_grad = False`. The settings are stored on the model, as
    `model.adapter_config`. Returns the same model.

    Raises LoRAError, before anything is changed, if a setting that names modules matches none, if a target is not an
    `nn.Linear`, or if the model carries adapters already.
    """
    if adapters(model):
        raise LoRAError("this model carries adapters already; unload them first, or start from a fresh model")
    check_names(model, config)
    return wrap_targets(model, config)


def wrap_targets(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """`inject_lora` without its checks: a setting that matches nothing has no effect."""
    targets = targeted_linears(model, config)
    fully_trained = fully_trained_modules(model, config)

    model.requires_grad_(False)  # everything; the adapters' parameters, created below, are trainable
    for name, linear in targets.items():
        _replace(model, name, config.wrap(linear, name).train(linear.training))  # in the mode of the layer
        if config.bias == "lora_only" and linear.bias is not None:
            linear.bias.requires_grad_(True)
    if config.bias == "all":
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "bias":
                parameter.requires_grad_(True)
    for module in fully_trained.values():
        module.requires_grad_(True)
    model.adapter_config = config  # type: ignore[assignment]  # nn.Module holds plain attributes too
    return model


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Every adapter of the model, by the name of the wrapped layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def targeted_linears(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Linear]:
    """The linear layers that `config` selects, by their names in the plain model, also if they are wrapped already.

    The layers of a fully trained module need no update, so they are never targets (peft's rule).
    """
    wrapped = adapters(model)
    fully_trained = tuple(f"{name}." for name in fully_trained_modules(model, config))
    targets = {}
    for name, module in model.named_modules():
        plain = name.removesuffix(".base") if name.removesuffix(".base") in wrapped else name
        if isinstance(module, nn.Linear) and config.selects(plain) and not f"{plain}.".startswith(fully_trained):
            targets[plain] = module
    return targets


def check_names(model: nn.Module, config: LoRAConfig) -> None:
    """Raise LoRAError for a setting that names a module or layer that `model` does not have, or not as nn.Linear."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = config.layers_to_transform
    present = {index for name in linears if (index := layer_index(name, config.layers_pattern)) is not None}
    absent = sorted(set(layers or ()) - present)
    if absent:
        have = f"layers {min(present)} to {max(present)}" if present else "no numbered layers"
        raise LoRAError(f"lora: layers_to_transform: no layer {', '.join(map(str, absent))}; the model has {have}")

    fully_trained = tuple(f"{name}." for name in fully_trained_modules(model, config))
    candidates = {
        name: module for name, module in model.named_modules() if name and not f"{name}.".startswith(fully_trained)
    }
    for shown, one in _each(config.exclude_modules or ()):
        if not (hits := [name for name in candidates if matches(one, name)]):
            raise LoRAError(f"lora: exclude_modules: {shown} matches no module; there are {_endings(linears)}")
        candidates = {name: module for name, module in candidates.items() if name not in hits}
    for shown, one in () if config.target_modules == ALL_LINEAR else _each(config.target_modules):
        if not (hits := [name for name in candidates if matches(one, name, layers, config.layers_pattern)]):
            raise LoRAError(f"lora: target_modules: {shown} matches no linear layer; there are {_endings(linears)}")
        for name in hits:
            if name not in linears:
                raise LoRAError(
                    f"lora: target_modules: {shown} matches {name}, a {type(candidates[name]).__name__}; "
                    f"adapters wrap nn.Linear: {_endings(linears)}"
                )
    adapted = targeted_linears(model, config)
    if not adapted:
        raise LoRAError(f"lora: target_modules: {config.target_modules!r} matches no linear layer that may be adapted")
    for pattern in config.unmatched_patterns(adapted):
        raise LoRAError(f"lora: {pattern} matches no adapted layer; there are {_endings(adapted)}")


def _each(names: str | Iterable[str]) -> list[tuple[str, str | tuple[str]]]:
    """A regular expression, or each of several names, as shown in a message and as `matches` takes it."""
    return [(repr(names), names)] if isinstance(names, str) else [(repr(name), (name,)) for name in names]


def fully_trained_modules(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules whose name ends in an entry of `config.modules_to_save`, as in peft."""
    chosen: dict[str, nn.Module] = {}
    for wanted in config.modules_to_save:
        hits = {name: module for name, module in model.named_modules() if matches([wanted], name)}
        if not hits:
            children = ", ".join(name for name, _ in model.named_children())
            raise LoRAError(f"lora: modules_to_save: {wanted!r} matches no module; the model's parts are {children}")
        chosen |= hits
    return chosen


def _endings(names: Iterable[str]) -> str:
    """The distinct names without the path up to the layer number, for error messages."""
    return ", ".join(dict.fromkeys(_within_layer(name) for name in names))


def _within_layer(name: str) -> str:
    """A module's name after the last number in its path: "encoder.layer.3.output.dense" -> "output.dense"."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else name


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule `name` of `model` by `module`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def merge_lora(model: nn.Module) -> None:
    """Merge every adapter into its frozen layer, in place. Raises RuntimeError if one is merged already."""
    for adapter in adapters(model).values():
        adapter.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`, bit for bit. Raises RuntimeError if a layer is not merged."""
    for adapter in adapters(model).values():
        adapter.unmerge()


def unload_lora(model: nn.Module) -> nn.Module:
    """Replace every adapter by its linear layer, in place: merged ones keep their update, others lose it.

    `merge_lora(model)` followed by `unload_lora(model)` is peft's `merge_and_unload()`. Frozen parameters stay frozen.
    Returns the same model.
    """
    for name, adapter in adapters(model).items():
        _replace(model, name, adapter.base)
    if hasattr(model, "adapter_config"):
        del model.adapter_config
    return model


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, each tensor counted once.

    peft's `get_nb_trainable_parameters()` gives the same `trainable`; its total is larger by the size of the modules
    in `modules_to_save`, of which it keeps a frozen original and a trained copy. With `bias="all"` peft also counts the
    unused biases of those originals as trained; here they do not exist.
    """

    trainable: int
    total: int
    parts: dict[str, tuple[int, int]]
    """(trainable, total) of each part: modules by the first two names of their paths, such as roberta.encoder, without
    adapters; and adapters by target."""

    @property
    def percentage(self) -> float:
        """100 * trainable / total."""
        return 100 * self.trainable / self.total

    def table(self) -> str:
        """One line per part and one for the sum, numbers aligned, for a terminal."""
        rows = [*self.parts.items(), ("all", (self.trainable, self.total))]
        width = max(len(name) for name, _ in rows)
        lines = [f"{'part':<{width}}  {'trainable':>11}  {'total':>13}"]
        lines += [f"{name:<{width}}  {trainable:>11,}  {total:>13,}" for name, (trainable, total) in rows]
        return "\n".join(lines)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count trainable and total parameters, also for each part of the model."""
    wrapped = adapters(model)
    parts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():  # names a shared tensor once
        module = name.rpartition(".")[0]
        if module in wrapped:  # an adapter's own; the frozen ones are in its `base`
            part = f"{wrapped[module].method} on {_within_layer(module)}"
        else:
            part = ".".join(name.split(".")[:2]) if name.count(".") > 1 else name.split(".")[0]
        trainable, total = parts.get(part, (0, 0))
        parts[part] = (trainable + parameter.numel() * parameter.requires_grad, total + parameter.numel())
    return ParameterCount(
        trainable=sum(trainable for trainable, _ in parts.values()),
        total=sum(total for _, total in parts.values()),
        parts=parts,
    )
