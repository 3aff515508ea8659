"""LoRA in a whole model: which matmuls are wrapped, what is frozen, how many parameters are trained.

Works on any `nn.Module` that holds `nn.Linear`; the layer itself is `lora.linear`, the rules by which names are
matched are `lora.targets`, files are `lora.adapter`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lora.config import LoRAConfig, LoRAError
from lora.linear import LoRALinear
from lora.packed import PackedLoRALinear
from lora.targets import layer_index, matches, pattern_value


def inject_lora(model: nn.Module, config: LoRAConfig) -> nn.Module:
    """Wrap the targeted linear layers of `model`, in place, and freeze all that is not to be trained.

    Trained afterwards: A and B of every wrapped layer, the biases that `config.bias` names, and the modules in
    `config.modules_to_save`. Everything else has `requires_grad = False`. Returns the same model.

    Raises LoRAError, before anything is changed, if a target or a module to save matches nothing, if a target is not
    an `nn.Linear`, or if the model carries adapters already.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise LoRAError("this model carries LoRA adapters already; unload them first, or start from a fresh model")
    targets = _targeted_linears(model, config)
    saved = _modules_to_save(model, config)

    model.requires_grad_(False)  # all of it; A and B, made below, are new parameters, and train
    for name, linear in targets.items():
        lora = LoRALinear(
            linear,
            rank=pattern_value(config.rank_pattern, name, config.rank),
            alpha=pattern_value(config.alpha_pattern, name, config.alpha),
            dropout=config.dropout,
            use_rslora=config.use_rslora,
        )
        _replace(model, name, lora)
        if config.bias == "lora_only" and linear.bias is not None:
            linear.bias.requires_grad_(True)
    _pack(model)
    if config.bias == "all":
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "bias":
                parameter.requires_grad_(True)
    for module in saved.values():
        module.requires_grad_(True)
    return model


def _targeted_linears(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Linear]:
    """The layers that `config` means, by name, in the model's order.

    Those whose name is in `target_modules`, or ends in a dot and one of them, that lie in one of `layers_to_transform`
    and in no module that is trained whole. Raises LoRAError for a target that means no linear layer.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = config.layers_to_transform
    present = {layer_index(name) for name in linears} - {None}
    absent = sorted(set(layers or ()) - present)
    if absent:
        have = f"layers {min(present)} to {max(present)}" if present else "no numbered layers"
        raise LoRAError(f"lora: layers_to_transform: no layer {', '.join(map(str, absent))}; the model has {have}")

    # A module that is trained in full needs no update beside it, so its layers are never targets (peft's rule).
    kept_whole = tuple(_modules_to_save(model, config))
    candidates = {
        name: module
        for name, module in model.named_modules()
        if name and not any(name == whole or name.startswith(f"{whole}.") for whole in kept_whole)
    }
    # A regular expression is one target; names are looked up one by one, so that each can be found missing.
    one_regex = isinstance(config.target_modules, str)
    found: set[str] = set()
    for target in [config.target_modules] if one_regex else config.target_modules:
        hits = [name for name in candidates if matches(target if one_regex else [target], name, layers)]
        if not hits:
            raise LoRAError(f"lora: target_modules: {target!r} matches no linear layer; there are {_endings(linears)}")
        for name in hits:
            if name not in linears:
                raise LoRAError(
                    f"lora: target_modules: {target!r} matches {name}, a {type(candidates[name]).__name__}; "
                    f"LoRA here wraps nn.Linear: {_endings(linears)}"
                )
        found.update(hits)
    return {name: linear for name, linear in linears.items() if name in found}


def _modules_to_save(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules that `config.modules_to_save` means: those whose name ends in one of its entries, as in peft."""
    chosen: dict[str, nn.Module] = {}
    for wanted in config.modules_to_save:
        hits = {name: module for name, module in model.named_modules() if matches([wanted], name)}
        if not hits:
            children = ", ".join(name for name, _ in model.named_children())
            raise LoRAError(f"lora: modules_to_save: {wanted!r} matches no module; the model's parts are {children}")
        chosen |= hits
    return chosen


def _endings(names: Iterable[str]) -> str:
    """The distinct names without what leads up to the layer number, for error messages."""
    return ", ".join(dict.fromkeys(_within_layer(name) for name in names))


def _within_layer(name: str) -> str:
    """A module's name after the last number in its path: "encoder.layer.3.output.dense" -> "output.dense"."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else name


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `model` holds the submodule called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _pack(model: nn.Module) -> None:
    """Give every packed projection with an adapted block the forward pass that knows of the adapters.

    A packed projection reads its children's weights and never calls them, so wrapping a child alone would silently
    leave its update out.
    """
    for name, module in list(model.named_modules()):
        blocks = getattr(module, "packed_blocks", ())
        if any(isinstance(module.get_submodule(block), LoRALinear) for block in blocks):
            _replace(model, name, PackedLoRALinear(module))


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every `LoRALinear` of the model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge_lora(model: nn.Module) -> None:
    """Merge every adapter into its frozen weight, in place. Raises RuntimeError if one is merged already."""
    for layer in lora_layers(model).values():
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`, bit for bit. Raises RuntimeError if a layer is not merged."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def unload_lora(model: nn.Module) -> nn.Module:
    """Replace every adapter by its plain linear layer, in place: merged ones keep their update, others lose it.

    `merge_lora(model)` followed by `unload_lora(model)` is peft's `merge_and_unload()`. What was frozen stays frozen,
    and a `PackedLoRALinear` stays in its place: without adapters it computes what the packed projection did. Returns
    the same model.
    """
    for name, layer in lora_layers(model).items():
        _replace(model, name, layer.base)
    return model


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model, each tensor counted once.

    peft's `get_nb_trainable_parameters()` gives the same `trainable`; its total is larger by the size of the modules
    in `modules_to_save`, as it keeps a frozen original beside each trained copy. With `bias="all"` peft also counts the
    biases of those originals as trained, though nothing reads them; here they do not exist.
    """

    trainable: int
    total: int
    parts: dict[str, tuple[int, int]]
    """(trainable, total) of each part: modules by the first two names of their paths, such as roberta.encoder, without
    their adapters; and the adapters by target."""

    @property
    def percentage(self) -> float:
        """100 * trainable / total."""
        return 100 * self.trainable / self.total

    def table(self) -> str:
        """One line a part and one for the sum, numbers aligned, for a terminal."""
        rows = [*self.parts.items(), ("all", (self.trainable, self.total))]
        width = max(len(name) for name, _ in rows)
        lines = [f"{'part':<{width}}  {'trainable':>11}  {'total':>13}"]
        lines += [f"{name:<{width}}  {trainable:>11,}  {total:>13,}" for name, (trainable, total) in rows]
        return "\n".join(lines)


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count trainable and total parameters, and attribute them to parts of the model."""
    parts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():  # names a shared tensor once
        module_name, _, own_name = name.rpartition(".")
        if own_name in ("lora_A", "lora_B"):
            part = f"LoRA on {_within_layer(module_name)}"
        else:
            part = ".".join(name.split(".")[:2]) if name.count(".") > 1 else name.split(".")[0]
        trainable, total = parts.get(part, (0, 0))
        parts[part] = (trainable + parameter.numel() * parameter.requires_grad, total + parameter.numel())
    return ParameterCount(
        trainable=sum(trainable for trainable, _ in parts.values()),
        total=sum(total for _, total in parts.values()),
        parts=parts,
    )
