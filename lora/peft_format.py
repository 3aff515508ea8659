"""Adapters on disk, in peft's own format: `adapter_config.json` + `adapter_model.safetensors`.

What is written here, `peft.PeftModel.from_pretrained` loads, and the other way round. A key of the file is
"base_model.model." + the name of the parameter in the plain model, with the adapter's own parameters appended:

    base_model.model.roberta.encoder.layer.0.attention.self.query.lora_A.weight      A, (r, in)
    base_model.model.roberta.encoder.layer.0.attention.self.query.lora_B.weight      B, (out, r)
    base_model.model.roberta.encoder.layer.0.attention.self.query.base_layer.bias    a trained bias of an adapted layer
    base_model.model.classifier.out_proj.weight                                      a module trained fully

Source: the files of peft 0.4 to 0.21; tests/parity/test_adapters.py holds both directions.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from lora.adapter import Adapter
from lora.config import LoRAConfig, LoRAError
from lora.files import atomic_write
from lora.inject import adapters, fully_trained_modules, targeted_linears, wrap_targets
from lora.targets import HEAD_NAMES, expressions, matches
from lora.untrusted import check_expressions, check_settings, non_float_tensors, open_weights, read_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Fields of peft's file that say nothing about the function computed: where it came from, or how to initialise it.
_WITHOUT_EFFECT = set(
    "auto_mapping base_model_name_or_path corda_config eva_config inference_mode init_lora_weights loftq_config "
    "lora_ga_config megatron_core peft_type peft_version revision runtime_config task_type qalora_group_size".split()
)
# Values of init_lora_weights after which peft's base weights have the same bits as before. Others (PiSSA, OLoRA, CorDA,
# LoftQ, LoRA-GA) change them, so the update alone is not the model.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Parts that torch.compile, DistributedDataParallel, FSDP and peft itself (with its usual name of an adapter) put into
# the names of parameters.
_WRAPPER_PARTS = {"_orig_mod", "module", "_fsdp_wrapped_module", "modules_to_save", "default"}


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    also: tuple[str, ...] = (),
) -> None:
    """Write the adapters, trained biases and fully trained modules of `model`, and its settings, as peft does.

    `base_model` is the name or path under which the base checkpoint is found again, `task_type` peft's name of the
    task ("SEQ_CLS" for classification). `also` names modules to save completely even where they are only partly
    trained: a new head is in no checkpoint, and without its frozen part the adapter could not be loaded again. The
    folder is made; each file appears whole or not at all. Raises LoRAError if the model has no adapters, OSError if a
    file can't be written.
    """
    config = getattr(model, "adapter_config", None)
    if config is None:
        raise LoRAError("this model carries no adapters; inject them before saving")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    partly = tuple(name for name in config.modules_to_save if not matches(also, name.split(".")[0]))
    config = dataclasses.replace(config, modules_to_save=(*partly, *also))
    tensors = {
        key: parameter.detach().cpu().contiguous()
        for key, parameter in _saved_parameters(model, config, adapters(model)).items()
    }
    fields: dict[str, Any] = {
        "peft_type": config.peft_type,
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
    }
    for ours, theirs in _fields().items():
        value = getattr(config, ours)
        fields[theirs] = dict(value) if isinstance(value, Mapping) else value
    with atomic_write(directory / WEIGHTS_NAME) as part:
        part.write_bytes(save(tensors, metadata={"format": "pt"}))
    # Sorted by name, but not within the patterns: the first that matches counts, so their order is part of the meaning.
    with atomic_write(directory / CONFIG_NAME) as part:
        part.write_text(json.dumps(dict(sorted(fields.items())), indent=2) + "\n", encoding="utf-8")


def load_adapter(model: nn.Module, directory: str | Path) -> LoRAConfig:
    """Give `model` the adapters of a folder that `save_adapter` or peft wrote; returns their settings.

    A model without adapters gets them by the file's settings, of which all that select layers must agree with the
    layers in the file; one that has adapters must have the same ones. Warns of a `rank_pattern` or `alpha_pattern` that
    matches none.

    Raises LoRAError, before the model is changed, if a file is missing or broken, if the settings ask for what is not
    done here, if the adapters don't fit the model, or if a tensor is missing (the head included), unexpected, of
    another shape, or not finite; and after it if an update is not finite. Raises RuntimeError if the model's own
    adapters are merged: its weights would keep their update.
    """
    carried = adapters(model)
    if any(adapter.is_merged for adapter in carried.values()):
        raise RuntimeError("this model's adapters are merged; unmerge them before loading others")
    directory = Path(directory)
    config = read_adapter_config(directory, model)
    path = directory / WEIGHTS_NAME
    # What the settings ask for, without memory: they may claim any rank.
    planned = _planned_adapters(model, config, carried, directory)
    wanted = _saved_parameters(model, config, planned)
    optional = {_key(name, planned): parameter for name, parameter in model.named_parameters()}
    with open_weights(path) as file:
        held = _plain_keys(file.keys(), wanted.keys() | optional.keys())
        biases = {key for key in wanted if key.endswith(".base_layer.bias")}
        if config.bias == "lora_only" and biases and not biases & held.keys():
            # Early peft versions (0.10 among them) train these biases and then forget to save them.
            warnings.warn(
                f"{path}: holds none of the biases that were trained; the base model's are used", stacklevel=2
            )
            wanted = {key: parameter for key, parameter in wanted.items() if key not in biases}
        missing = wanted.keys() - held.keys()
        # Frozen parameters that the base checkpoint lacks (see `save_adapter`).
        wanted |= {key: optional[key] for key in held if key in optional}
        _refuse_mismatch(path, missing, held.keys() - wanted.keys())
        stored = {held[key]: key for key in wanted}
        kinds = [f"{key} ({kind})" for key, kind in non_float_tensors(file).items() if key in stored]
        _refuse(path, "holds no floating-point numbers in", kinds, "train the adapter without quantization")
        shapes = {
            key: (file.get_slice(held[key]).get_shape(), list(parameter.shape)) for key, parameter in wanted.items()
        }
        wrong = [f"{key} ({found}, not {expected})" for key, (found, expected) in shapes.items() if found != expected]
        _refuse(
            path, "has the wrong shape in", wrong, "it belongs to another base model, number of labels or configuration"
        )
        loaded = {key: file.get_tensor(held[key]) for key in wanted}
    broken = [key for key, tensor in loaded.items() if not bool(torch.isfinite(tensor.float()).all())]
    _refuse(path, "has values that are not finite in", broken, "its training failed; use another")
    for pattern in config.unmatched_patterns(planned):
        warnings.warn(f"{directory / CONFIG_NAME}: {pattern} matches no adapted layer", stacklevel=2)
    if not carried:
        wrap_targets(model, config)
    _copy(loaded, model, directory)
    return config


@torch.no_grad()
def _copy(loaded: dict[str, torch.Tensor], model: nn.Module, directory: Path) -> None:
    """Copy tensors of the file into the model's parameters; LoRAError if an update overflows."""
    wrapped = adapters(model)
    for name, parameter in model.named_parameters():
        if (key := _key(name, wrapped)) in loaded:
            parameter.copy_(loaded[key])
    for name, adapter in wrapped.items():
        if not bool(torch.isfinite(adapter.merged()[0]).all()):
            raise LoRAError(f"{directory}: the update of {name} is not finite; use another adapter")


def _planned_adapters(
    model: nn.Module, config: LoRAConfig, carried: dict[str, Adapter], directory: Path
) -> dict[str, Adapter]:
    """The adapters that `config` asks for, on the meta device. Raises LoRAError if the model carries other ones."""
    planned = {
        name: config.wrap(nn.Linear(base.in_features, base.out_features, device="meta"), name)
        for name, base in targeted_linears(model, config).items()
    }
    if not planned:
        raise LoRAError(f"{directory / CONFIG_NAME}: target_modules matches no linear layer; it is of another model")
    for name in carried.keys() | planned.keys() if carried else ():
        ours, asked = carried.get(name), planned.get(name)
        if not (ours and asked and type(ours) is type(asked) and ours.settings() == asked.settings()):
            raise LoRAError(f"{directory}: other settings than those of the model's adapter on {name}; load it afresh")
    return planned


def _plain_keys(keys: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Key as it is known here -> key in the file, without the parts that wrappers add.

    With bias="all" peft writes the biases of fully trained modules twice more, under its wrapper's names: the key that
    is as it should be counts. The biases of adapted layers lie where peft 0.4 to 0.6 wrote them, or newer versions.
    """
    plain: dict[str, str] = {}
    for key in sorted(keys, key=lambda key: (key in known, _WRAPPER_PARTS.isdisjoint(key.split(".")))):
        parts = [part for part in key.split(".") if part not in _WRAPPER_PARTS]
        if key in known:
            plain[key] = key
        elif "original_module" not in parts:
            early = ".".join([*parts[:-1], "base_layer", "bias"])
            plain[early if parts[-1] == "bias" and early in known else ".".join(parts)] = key
    return plain


def _key(name: str, wrapped: Mapping[str, Adapter]) -> str:
    """Key in the file of the parameter `name` of a model whose layers `wrapped` are adapted, or are to be.

    "query.lora_A" -> "...query.lora_A.weight"; "query.base.bias", before wrapping "query.bias" ->
    "...query.base_layer.bias"; "classifier.dense.bias" -> "...classifier.dense.bias".
    """
    module, _, own = name.rpartition(".")
    if module in wrapped and own in wrapped[module].peft_keys:
        return f"{_PREFIX}{module}.{wrapped[module].peft_keys[own]}"
    layer = module.removesuffix(".base")
    return f"{_PREFIX}{layer}.base_layer.{own}" if layer in wrapped else f"{_PREFIX}{name}"


def _saved_parameters(model: nn.Module, config: LoRAConfig, wrapped: Mapping[str, Adapter]) -> dict[str, nn.Parameter]:
    """Key in the file -> parameter, for all that belongs to the adapter; those of the adapters are of `wrapped`."""
    saved = {
        f"{_PREFIX}{name}.{key}": adapter.get_parameter(own)
        for name, adapter in wrapped.items()
        for own, key in adapter.peft_keys.items()
    }
    fully_trained = tuple(f"{name}." for name in fully_trained_modules(model, config))
    for name, parameter in model.named_parameters():
        module, _, own = name.rpartition(".")
        adapted = module.removesuffix(".base") in wrapped
        trained_bias = own == "bias" and (config.bias == "all" or (config.bias == "lora_only" and adapted))
        if name.startswith(fully_trained) or trained_bias:
            saved.setdefault(_key(name, wrapped), parameter)
    return saved


def _fields() -> dict[str, str]:
    """Our settings -> peft's names of them."""
    return {field.name: LoRAConfig.peft_names.get(field.name, field.name) for field in dataclasses.fields(LoRAConfig)}


def read_base_model(directory: str | Path) -> str | None:
    """Name or path of the base checkpoint that the adapter was trained on, if its settings tell.

    Raises LoRAError if they can't be read, or give what is not a name.
    """
    path = Path(directory) / CONFIG_NAME
    name = read_json(path).get("base_model_name_or_path") or None
    if name is not None and not isinstance(name, str):
        raise LoRAError(f"{path}: base_model_name_or_path is {name!r}; it must be a name")
    return name


def read_adapter_config(directory: str | Path, model: nn.Module | None = None) -> LoRAConfig:
    """The settings in a folder's `adapter_config.json`.

    Fields unknown here are accepted at a value that switches them off (null, false, 0, empty), and refused by name
    otherwise: each of them would change what the adapter computes. With a `model`, names of heads that peft adds
    to `modules_to_save` for every classifier are dropped where the model has no such part. Raises LoRAError that names
    the file and the field.
    """
    path = Path(directory) / CONFIG_NAME
    raw = read_json(path)
    if raw.get("peft_type") != LoRAConfig.peft_type:
        raise LoRAError(f"{path}: peft_type is {raw.get('peft_type')!r}; only LORA adapters can be loaded")
    known = set(_fields().values()) | _WITHOUT_EFFECT
    for name, value in raw.items():
        if name not in known and value:
            raise LoRAError(f"{path}: {name} = {json.dumps(value)} is not supported; train the adapter without it")
    if raw.get("init_lora_weights") not in _INITS:
        raise LoRAError(
            f"{path}: init_lora_weights = {raw['init_lora_weights']!r} changes the base model; not supported"
        )
    check_settings(path, raw)
    if raw.get("target_modules") is None:
        raise LoRAError(f"{path}: target_modules is missing; name the layers that the adapter belongs to")
    values = {ours: raw[theirs] for ours, theirs in _fields().items() if raw.get(theirs) is not None}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    layers = values.pop("layers_to_transform", ())
    if layers != ():
        values["layers_to_transform"] = (layers,) if isinstance(layers, int) else layers
    saved = values.get("modules_to_save", ())
    if raw.get("task_type") == "SEQ_CLS":  # peft trains and saves the head of every classifier; 0.10 does not say so
        saved = (*saved, *HEAD_NAMES)
    names = [] if model is None else [name for name, _ in model.named_modules()]
    parts = set(HEAD_NAMES) if model is None else {name.rpartition(".")[2] for name in names}
    values["modules_to_save"] = tuple(name for name in dict.fromkeys(saved) if name not in HEAD_NAMES or name in parts)
    check_expressions(path, expressions(values), names)
    try:
        return LoRAConfig(**values)
    except LoRAError as error:
        raise LoRAError(f"{path}: {str(error).removeprefix('lora: ')}") from None


def adapter_shapes(directory: str | Path) -> dict[str, list[int]]:
    """Shapes of the tensors in a folder's `adapter_model.safetensors`, by their names without peft's prefix.

    Reads the header alone. Raises LoRAError if the file is missing or broken.
    """
    with open_weights(Path(directory) / WEIGHTS_NAME) as file:
        keys = _plain_keys(file.keys(), ())
        return {plain.removeprefix(_PREFIX): file.get_slice(key).get_shape() for plain, key in keys.items()}


def _refuse_mismatch(path: Path, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raise LoRAError if there are such keys, with one of each and the likely cause."""
    tails = {key.removeprefix(_PREFIX).partition(".")[2]: key for key in sorted(missing)}
    for key in sorted(unexpected):
        first, _, tail = (found := key.removeprefix(_PREFIX)).partition(".")
        expected = tails.get(found) or tails.get(tail)
        if expected:
            part = expected.removeprefix(_PREFIX).partition(".")[0]
            cause = "a model without a head" if found in tails else f"another class of model, with {first} for {part}"
            raise LoRAError(
                f"{path}: expected {expected}, found {key}; it was trained on {cause}, train it on this one"
            )
    if missing and unexpected:
        _refuse(
            path,
            f"expected {min(missing)}, found",
            [min(unexpected)],
            "another adapter's settings, or its name in the keys",
        )
    _refuse(path, "lacks", missing, "the adapter is not whole; save it again with its head and biases")
    _refuse(path, "holds unexpected", unexpected, "adapter_config.json describes another adapter")


def _refuse(path: Path, problem: str, keys: Iterable[str], fix: str) -> None:
    """Raise LoRAError if there are such keys, naming the first of them."""
    if names := sorted(keys):
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        raise LoRAError(f"{path}: {problem} {', '.join(names[:6])}{more}; {fix}")
