"""Adapters in a model: which modules are wrapped, what is frozen, how many parameters are trained.

Works on any `nn.Module`. Methods are in files of their own (`lora.linear`), the matching of names in `lora.targets`,
adapters on disk in `lora.peft_format`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lora.adapter import Adapter, adapters, plain_name
from lora.config import MethodConfig
from lora.errors import LoRAError
from lora.quantized import weight_counts
from lora.targets import fully_trained_modules, inside, within_layer


def inject_lora(model: nn.Module, *configs: MethodConfig) -> nn.Module:
    """Add the methods of `configs` to `model`, in place, and freeze everything else.

    Trainable afterwards: the adapters' own parameters, and those of the model's that a method trains: the modules in
    `config.modules_to_save`, and what `config.trains` names. Everything else has `requires_grad = False`. The settings
    are stored on the model, as `model.adapter_configs`. Returns the same model.

    Raises LoRAError, before anything is changed, if a setting that names modules matches none, if a target is of the
    wrong type, if two methods have the same target, or if the model carries adapters already.
    """
    if hasattr(model, "adapter_configs"):
        raise LoRAError("this model carries adapters already; unload them first, or start from a fresh model")
    for config in configs:
        config.check(model)
    return wrap_targets(model, *configs)


def wrap_targets(model: nn.Module, *configs: MethodConfig) -> nn.Module:
    """`inject_lora` without its checks: a setting that matches nothing has no effect."""
    targets = [config.targets(model) for config in configs]
    owner: dict[str, str] = {}
    for config, modules in zip(configs, targets, strict=True):
        for name in modules:
            if (other := owner.setdefault(name, config.table)) != config.table:
                raise LoRAError(f"{other} and {config.table} both adapt {name}; choose other targets for one of them")
    trained = [parameter for config in configs for parameter in trained_parameters(model, config).values()]
    made: dict[str, Adapter] = {}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for config, modules in zip(configs, targets, strict=True):
            for name, adapter in config.wrap_all(modules).items():
                adapter.config = config
                made[name] = adapter.train(modules[name].training)  # in the mode of the module
    except LoRAError:  # a rank that does not fit a layer; an adapter freezes its base when it is made
        for parameter, was_trained in before:
            parameter.requires_grad_(was_trained)
        raise

    model.requires_grad_(False)  # everything; the adapters' parameters are not in the model yet, and are trainable
    for name in sorted(made, key=lambda name: -name.count(".")):  # a module inside another target first
        model.set_submodule(name, made[name])
    for parameter in trained:
        parameter.requires_grad_(True)
    model.adapter_configs = configs  # type: ignore[assignment]  # nn.Module holds plain attributes too
    return model


def trained_parameters(model: nn.Module, config: MethodConfig) -> dict[str, nn.Parameter]:
    """The model's own parameters that `config` trains, by their names in the plain model."""
    fully_trained, targets = fully_trained_modules(model, config), config.targets(model)
    return {
        name: parameter
        for name, parameter in own_parameters(model, adapters(model)).items()
        if inside(name, fully_trained) or config.trains(name, name.rpartition(".")[0] in targets)
    }


def own_parameters(model: nn.Module, wrapped: dict[str, Adapter]) -> dict[str, nn.Parameter]:
    """The parameters that the plain model has, by their names there."""
    added = added_parameters(wrapped)
    return {plain_name(name, wrapped): value for name, value in model.named_parameters() if id(value) not in added}


def added_parameters(wrapped: dict[str, Adapter]) -> dict[int, str]:
    """The id of each parameter that an adapter adds -> the name of the adapter."""
    return {id(value): name for name, adapter in wrapped.items() for value in adapter.own_parameters().values()}


def drop_encoders(model: nn.Module) -> None:
    """Replace networks that compute adapters in training by what they compute, as files do; the outputs stay equal."""
    for adapter in adapters(model).values():
        adapter.drop_encoder()


def merge_lora(model: nn.Module) -> None:
    """Merge every adapter into its frozen layer, in place.

    Raises RuntimeError if one is merged already or shares its layer with other models (`lora.several`), LoRAError,
    before anything is changed, if one can't be merged.
    """
    wrapped = adapters(model).values()
    for adapter in wrapped:
        if not adapter.can_merge:
            adapter.merged()  # raises
    for adapter in wrapped:
        adapter.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`, bit for bit. Raises RuntimeError if a layer is not merged."""
    for adapter in adapters(model).values():
        adapter.unmerge()


def unload_lora(model: nn.Module) -> nn.Module:
    """Replace every adapter by the module that it wraps, in place: merged ones keep their update, others lose it.

    `merge_lora(model)` followed by `unload_lora(model)` is peft's `merge_and_unload()`. Frozen parameters stay frozen.
    Returns the same model.
    """
    found = [(name, module.base) for name, module in model.named_modules() if isinstance(module, Adapter)]
    for name, base in reversed(found):  # a module inside another target first
        model.set_submodule(name, base)
    if hasattr(model, "adapter_configs"):
        del model.adapter_configs
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
    added = added_parameters(wrapped)
    quantized = weight_counts(model)  # a weight counts as one, however many bits hold it
    parts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():  # names a shared tensor once
        path, owner = plain_name(name, wrapped).split("."), added.get(id(parameter))
        part = ".".join(path[:2] if len(path) > 2 else path[:1])
        if owner is not None:
            part = f"{wrapped[owner].method} on {within_layer(owner)}"
        trainable, total = parts.get(part, (0, 0))
        size = quantized.get(id(parameter), parameter.numel())
        parts[part] = (trainable + size * parameter.requires_grad, total + size)
    return ParameterCount(
        trainable=sum(trainable for trainable, _ in parts.values()),
        total=sum(total for _, total in parts.values()),
        parts=parts,
    )
