"""Adapters on disk, in peft's own format: `adapter_config.json` + `adapter_model.safetensors`.

What is written here, `peft.PeftModel.from_pretrained` loads, and the other way round. A key of the file is
"base_model.model." + the name of the parameter in the plain model, with the adapter's own parameters appended:

    base_model.model.roberta.encoder.layer.0.attention.self.query.lora_A.weight      A, (r, in)
    base_model.model.roberta.encoder.layer.0.attention.self.query.lora_B.weight      B, (out, r)
    base_model.model.roberta.encoder.layer.0.attention.self.query.base_layer.bias    a trained bias of an adapted layer
    base_model.model.classifier.out_proj.weight                                      a module trained fully

Methods that put virtual tokens before a text have one tensor, `prompt_embeddings`, and "base_model." before the others.
Source: the files of peft 0.4 to 0.21; tests/parity/test_adapters.py holds both directions.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from lora import adapterhub_format
from lora.adapter import Adapter, adapters
from lora.config import METHODS, LinearMethodConfig, MethodConfig
from lora.errors import LoRAError
from lora.files import atomic_write
from lora.inject import own_parameters, trained_parameters, wrap_targets
from lora.targets import HEAD_NAMES, expressions, matches
from lora.untrusted import check_expressions, check_settings, non_float_tensors, open_weights, read_json

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# Of methods that wrap modules in peft, and of those that put virtual tokens before a text.
_PREFIXES = ("base_model.model.", "base_model.")

# Fields of peft's file that say nothing about the function computed: where it came from, how to initialise it, or sizes
# that the tensors and the model have too (r is in AdaLoRA's file, and not used).
_WITHOUT_EFFECT = set(
    "auto_mapping base_model_name_or_path corda_config eva_config inference_mode init_lora_weights loftq_config "
    "lora_ga_config megatron_core num_attention_heads num_layers peft_type peft_version prompt_tuning_init "
    "prompt_tuning_init_text qalora_group_size r revision runtime_config task_type token_dim tokenizer_kwargs "
    "tokenizer_name_or_path".split()
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
    """Write the adapters of `model`, what else was trained, and the settings, as peft does.

    Of several methods each gets a folder of its own in `directory`, called by its name in a TOML file.

    `base_model` is the name or path under which the base checkpoint is found again, `task_type` peft's name of the
    task ("SEQ_CLS" for classification). `also` names modules to save completely even where they are only partly
    trained: a new head is in no checkpoint, and without its frozen part the adapter could not be loaded again. The
    folder is made; each file appears whole or not at all. Raises LoRAError if the model has no adapters, OSError if a
    file can't be written.
    """
    configs: tuple[MethodConfig, ...] = getattr(model, "adapter_configs", ())
    if not configs:
        raise LoRAError("this model carries no adapters; inject them before saving")
    about = {"task_type": task_type, "base_model_name_or_path": base_model, "inference_mode": True}
    for config in configs:
        folder = Path(directory) / config.table if len(configs) > 1 else Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        partly = tuple(name for name in config.modules_to_save if not matches(also, name.split(".")[0]))
        own = _adapters_of(config, adapters(model))
        config = dataclasses.replace(config.in_file(own), modules_to_save=(*partly, *also))
        tensors = {key: value.detach().cpu().contiguous() for key, value in _saved(model, config, own).items()}
        fields: dict[str, Any] = about | {"peft_type": config.peft_type} | config.peft_constants
        for ours, theirs in _fields(type(config)).items():
            value = getattr(config, ours)
            if ours not in config.peft_lacks and (value or ours not in config.peft_refuses):
                fields[theirs] = dict(value) if isinstance(value, Mapping) else value
        if any(getattr(config, name) is not None for name in config.peft_lacks):
            fields["target_modules"] = [*config.targets(model)]
        if config.adapterhub:
            contents = adapterhub_format.file_contents(model, fields, tensors)
        else:  # sorted by name, but not within the patterns: the first that matches counts, so their order matters
            text = json.dumps(dict(sorted(fields.items())), indent=2) + "\n"
            contents = {WEIGHTS_NAME: save(tensors, metadata={"format": "pt"}), CONFIG_NAME: text.encode()}
        for name, content in contents.items():
            with atomic_write(folder / name) as part:
                part.write_bytes(content)


def adapter_folders(directory: str | Path) -> list[Path]:
    """The folders with one method each: `directory` itself, or those in it that are called like methods.

    Others, such as the checkpoints of one training, are not parts of one adapter.
    """
    directory = Path(directory)
    several = [directory / name for name in sorted(METHODS) if (directory / name / CONFIG_NAME).is_file()]
    return [directory] if (directory / CONFIG_NAME).is_file() or not several else several


def load_adapter(model: nn.Module, directory: str | Path) -> tuple[MethodConfig, ...]:
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
    configs = {folder: read_adapter_config(folder, model) for folder in adapter_folders(directory)}
    planned: dict[str, Adapter] = {}
    loaded = []
    for folder, config in configs.items():
        # What the settings ask for, without memory: they may claim any rank.
        targets = config.targets(model)
        wrapped = config.wrap_all({name: _on_meta(module) for name, module in targets.items()})
        if isinstance(config, LinearMethodConfig) and not targets:
            kind = config.kind_name
            raise LoRAError(f"{folder / CONFIG_NAME}: target_modules matches no {kind}; it is of another model")
        planned |= wrapped
        loaded.append(_read_weights(folder, model, config, wrapped))
        for pattern in config.unmatched_patterns(wrapped):
            warnings.warn(f"{folder / CONFIG_NAME}: {pattern} matches no adapted layer", stacklevel=2)
    if hasattr(model, "adapter_configs"):
        _check_same(model, configs.values(), planned, Path(directory))
    else:
        wrap_targets(model, *configs.values())
    for config, tensors in zip(configs.values(), loaded, strict=True):
        _copy(tensors, model, config, planned)
    for name, adapter in adapters(model).items():
        if adapter.can_merge and not bool(adapter.merged()[0].isfinite().all()):
            raise LoRAError(f"{directory}: the update of {name} is not finite; use another adapter")
    return tuple(configs.values())


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy of `module` on the meta device, without memory."""
    memo: dict[int, Any] = {
        id(value): nn.Parameter(value.to("meta"), value.requires_grad) for value in module.parameters()
    }
    return copy.deepcopy(module, memo)


def _check_same(model: Any, configs: Collection[MethodConfig], planned: Mapping[str, Adapter], directory: Path) -> None:
    """Raise LoRAError if the model carries other methods than a file's settings ask for, or trains what it lacks."""
    carried = adapters(model)
    for name in carried.keys() | planned.keys():
        ours, asked = carried.get(name), planned.get(name)
        if not (ours and asked and ours.method == asked.method and _equal(ours.settings(), asked.settings())):
            raise LoRAError(f"{directory}: other settings than those of the model's adapter on {name}; load it afresh")
    trained, held = (
        {name for config in those for name in trained_parameters(model, config)}
        for those in (model.adapter_configs, configs)
    )
    if trained - held or {*map(type, model.adapter_configs)} != {*map(type, configs)}:
        raise LoRAError(f"{directory}: other parameters than those that the model trains; load it afresh")


def _equal(settings: Mapping[str, float], others: Mapping[str, float]) -> bool:
    """Whether two settings are the same numbers, up to the rounding of a scaling that a file holds as alpha."""
    return settings.keys() == others.keys() and all(
        math.isclose(value, others[name], rel_tol=1e-12) for name, value in settings.items()
    )


def _read_weights(
    folder: Path, model: nn.Module, config: MethodConfig, planned: Mapping[str, Adapter]
) -> dict[str, torch.Tensor]:
    """The tensors that `config` asks for, by their keys, checked before one is read. Raises LoRAError."""
    wanted: dict[str, torch.Tensor] = _saved(model, config, planned)
    optional = _by_key(own_parameters(model, adapters(model)), model, config)
    path = folder / (adapterhub_format.WEIGHTS_NAME if config.adapterhub else WEIGHTS_NAME)
    with _open_weights(folder) as file:
        held = _plain_keys(file.keys(), wanted.keys() | optional.keys())
        biases = {key for key in wanted if key.endswith(".base_layer.bias")}
        if biases and not biases & held.keys():
            # Early peft versions (0.10 among them) train these biases and then forget to save them.
            warnings.warn(
                f"{path}: holds none of the biases that were trained; the base model's are used", stacklevel=3
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
    return loaded


@torch.no_grad()
def _copy(
    loaded: dict[str, torch.Tensor], model: nn.Module, config: MethodConfig, planned: Mapping[str, Adapter]
) -> None:
    """Copy tensors of a file into the model's parameters."""
    wrapped = adapters(model)
    own = _adapters_of(config, wrapped)
    of_adapters: dict[str, dict[str, torch.Tensor]] = {name: {} for name in own}
    for key, places in _places(config, {name: planned[name] for name in own}).items():
        parts = loaded.pop(key).split([like.shape[-1] for *_, like in places], dim=-1)
        for (name, parameter, _), part in zip(places, parts, strict=True):
            of_adapters[name][parameter] = part
    for name, adapter in own.items():
        adapter.load(of_adapters[name], planned[name])
    tensors = _by_key(own_parameters(model, wrapped), model, config) | config.shared(own)
    for key, tensor in loaded.items():
        tensors[key].copy_(tensor)


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


def _by_key(parameters: Mapping[str, torch.Tensor], model: nn.Module, config: MethodConfig) -> dict[str, torch.Tensor]:
    """The model's own `parameters` by their keys in the file: "query.bias" -> "...query.base_layer.bias" if the query
    is a target, "classifier.dense.bias" -> "...classifier.dense.bias" if that is none."""
    targets, keyed = config.targets(model), {}
    for name, value in parameters.items():
        module, _, own = name.rpartition(".")
        place = f"{module}.{config.peft_layer}.{own}" if module in targets else name
        keyed[config.key_prefix + place] = value
    return keyed


def _saved(model: nn.Module, config: MethodConfig, wrapped: Mapping[str, Adapter]) -> dict[str, torch.Tensor]:
    """Key in the file -> tensor, for all that belongs to a method, `wrapped` being its adapters."""
    added = {
        key: torch.cat([value for *_, value in places], dim=-1) if len(places) > 1 else places[0][-1]
        for key, places in _places(config, wrapped).items()
    }
    return _by_key(trained_parameters(model, config), model, config) | config.shared(wrapped) | added


def _places(config: MethodConfig, wrapped: Mapping[str, Adapter]) -> dict[str, list[tuple[str, str, torch.Tensor]]]:
    """Key in the file -> (module, parameter, tensor) of the adapters that have it; several lie side by side in it."""
    places: dict[str, list[tuple[str, str, torch.Tensor]]] = {}
    for name, adapter in wrapped.items():
        for own, value in adapter.in_file().items():
            places.setdefault(config.parameter_key(name, adapter.peft_keys[own]), []).append((name, own, value))
    return places


def _adapters_of(config: MethodConfig, wrapped: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Those of the adapters that belong to the method of `config`."""
    return {name: adapter for name, adapter in wrapped.items() if type(adapter.config) is type(config)}


def _fields(config: type[MethodConfig]) -> dict[str, str]:
    """Our settings -> peft's names of them, without those that are one value in its file."""
    names = {field.name: config.peft_names.get(field.name, field.name) for field in dataclasses.fields(config)}
    return {ours: theirs for ours, theirs in names.items() if theirs not in config.peft_constants}


def _read_fields(folder: Path) -> tuple[dict[str, Any], bool]:
    """The fields of a folder's settings, as peft names them, and whether the files are AdapterHub's."""
    raw = read_json(folder / CONFIG_NAME)
    adapterhub = adapterhub_format.is_adapterhub(raw)
    return adapterhub_format.read_fields(folder, raw) if adapterhub else raw, adapterhub


def _open_weights(folder: Path) -> AbstractContextManager[Any]:
    """A folder's tensors, by keys as in peft's file."""
    raw = read_json(folder / CONFIG_NAME)
    if adapterhub_format.is_adapterhub(raw):
        return adapterhub_format.open_files(folder, raw)
    return open_weights(folder / WEIGHTS_NAME)


def read_base_model(directory: str | Path) -> str | None:
    """Name or path of the base checkpoint that the adapter was trained on, if its settings tell.

    Raises LoRAError if they can't be read, or give what is not a name.
    """
    folder = adapter_folders(directory)[0]
    path, (raw, _) = folder / CONFIG_NAME, _read_fields(folder)
    name, revision = raw.get("base_model_name_or_path") or None, raw.get("revision") or "main"
    if name is not None and not isinstance(name, str):
        raise LoRAError(f"{path}: the base model's name is {name!r}; it must be a name")
    # Path.is_dir raises an error if the name is too long for a path
    if revision != "main" and name is not None and not os.path.isdir(name):  # noqa: PTH112
        raise LoRAError(f"{path}: was trained on revision {revision!r} of {name}; fetch that, and name it with --base")
    return name


def read_adapter_config(directory: str | Path, model: nn.Module | None = None) -> MethodConfig:
    """The settings in a folder's `adapter_config.json`.

    Fields unknown here are accepted at a value that switches them off (null, false, 0, empty), and refused by name
    otherwise: each of them would change what the adapter computes. With a `model`, names of heads that peft adds
    to `modules_to_save` for every classifier are dropped where the model has no such part. Raises LoRAError that names
    the file and the field.
    """
    path = Path(directory) / CONFIG_NAME
    raw, adapterhub = _read_fields(Path(directory))
    kinds = {config.peft_type: config for config in METHODS.values() if config.adapterhub == adapterhub}
    kind = kinds.get(str(raw.get("peft_type")))
    if kind is None:
        raise LoRAError(f"{path}: peft_type is {raw.get('peft_type')!r}; only {', '.join(kinds)} can be loaded")
    fields = _fields(kind)
    known = {*fields.values(), *_WITHOUT_EFFECT}
    for name, value in raw.items():
        if name not in known and value and kind.peft_constants.get(name) != value:
            raise LoRAError(f"{path}: {name} = {json.dumps(value)} is not supported; train the adapter without it")
    if raw.get("init_lora_weights") not in _INITS:
        raise LoRAError(
            f"{path}: init_lora_weights = {raw['init_lora_weights']!r} changes the base model; not supported; save it "
            "by peft with path_initial_model_for_weight_conversion"
        )
    check_settings(path, raw, kind)
    if "target_modules" in fields and raw.get("target_modules") is None:
        raise LoRAError(f"{path}: target_modules is missing; name the layers that the adapter belongs to")
    values = {ours: raw[theirs] for ours, theirs in fields.items() if raw.get(theirs) is not None}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if "inference_mode" in fields:  # as peft loads it, whatever the file says
        values["inference_mode"] = True
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
        return kind(**values)
    except LoRAError as error:
        raise LoRAError(f"{path}: {str(error).removeprefix(f'{kind.table}: ')}") from None


def adapter_shapes(directory: str | Path) -> dict[str, list[int]]:
    """Shapes of the tensors in a folder's `adapter_model.safetensors`, by their names without peft's prefix.

    Reads the header alone. Raises LoRAError if the file is missing or broken.
    """
    shapes: dict[str, list[int]] = {}
    for folder in adapter_folders(directory):
        with _open_weights(folder) as file:
            keys = _plain_keys(file.keys(), ())
            shapes |= {_plain(plain): file.get_slice(key).get_shape() for plain, key in keys.items()}
    return shapes


def _plain(key: str) -> str:
    """A key without peft's prefix."""
    return next((key.removeprefix(prefix) for prefix in _PREFIXES if key.startswith(prefix)), key)


def _refuse_mismatch(path: Path, missing: Collection[str], unexpected: Collection[str]) -> None:
    """Raise LoRAError if there are such keys, with one of each and the likely cause."""
    tails = {_plain(key).partition(".")[2]: key for key in sorted(missing)}
    for key in sorted(unexpected):
        first, _, tail = (found := _plain(key)).partition(".")
        expected = tails.get(found) or tails.get(tail)
        if expected:
            part = _plain(expected).partition(".")[0]
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
