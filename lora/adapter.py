"""Adapters on disk, in peft's own format: `adapter_config.json` + `adapter_model.safetensors`.

What is written here, `peft.PeftModel.from_pretrained` loads, and the other way round. A key of the file is
"base_model.model." + the name of the parameter in the plain model, with the adapters' two matrices appended:

    base_model.model.roberta.encoder.layer.0.attention.self.query.lora_A.weight      A, (r, in)
    base_model.model.roberta.encoder.layer.0.attention.self.query.lora_B.weight      B, (out, r)
    base_model.model.roberta.encoder.layer.0.attention.self.query.base_layer.bias    a trained bias of an adapted layer
    base_model.model.classifier.out_proj.weight                                      a module trained in full

Source: the files of peft 0.10 to 0.21; tests/parity/test_adapters.py holds both directions.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import nn

from lora.config import LoRAConfig, LoRAError
from lora.inject import inject_lora, lora_layers
from lora.linear import LoRALinear
from lora.targets import could_hang, matches, pattern_value
from ops.files import not_floats, open_safetensors, read_settings, written_whole

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Our settings -> peft's names of them.
_FIELDS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "target_modules",
    "layers_to_transform": "layers_to_transform",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "bias": "bias",
    "modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
}
# Fields of peft's file that say nothing about the function computed: where it came from, or how to initialise it.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "init_lora_weights",
    "loftq_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
    "qalora_group_size",
}
_WRAPPER_PARTS = (".original_module.", ".modules_to_save.")
# peft adds both names to modules_to_save for every classifier; a model has the one or the other.
_HEAD_NAMES = ("classifier", "score")
# More than any encoder has layers to name; as many patterns as `re` keeps compiled.
_MOST_NAMES, _MOST_PATTERNS = 1000, 250


def save_adapter(
    model: nn.Module,
    config: LoRAConfig,
    directory: str | Path,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
    also: tuple[str, ...] = (),
) -> None:
    """Write the adapters, trained biases and modules_to_save of `model` as peft does.

    `base_model` is the name or path under which the base checkpoint is found again, `task_type` peft's name of the
    task ("SEQ_CLS" for classification). `also` names modules to save whole even where they are not trained whole: a
    new head of which only a part is trained is in no checkpoint, and without its frozen part the adapter could not be
    put together again. `config` is the one that `inject_lora` was given. The folder is made; each file appears whole or
    not at all. Raises OSError if it can't be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())
    within = tuple(name for name in config.modules_to_save if not matches(also, name.split(".")[0]))
    config = dataclasses.replace(config, modules_to_save=(*within, *also))
    tensors = {key: parameters[name].detach().cpu().contiguous() for key, name in _file_keys(model, config).items()}
    fields: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
    }
    for ours, theirs in _FIELDS.items():
        value = getattr(config, ours)
        fields[theirs] = list(value) if isinstance(value, tuple) else dict(value) if "pattern" in ours else value
    with written_whole(directory / WEIGHTS_NAME) as part:
        part.write_bytes(save(tensors, metadata={"format": "pt"}))
    # Sorted by name, but not within the patterns: the first that matches counts, so their order is part of the meaning.
    with written_whole(directory / CONFIG_NAME) as part:
        part.write_text(json.dumps(dict(sorted(fields.items())), indent=2) + "\n", encoding="utf-8")


def load_adapter(model: nn.Module, directory: str | Path) -> LoRAConfig:
    """Give `model` the adapters of a folder that `save_adapter` or peft wrote; returns their settings.

    A model without adapters gets them by the file's settings; one that has them must have the same ones.

    Raises LoRAError if a file is missing or broken, if the settings ask for what is not done here, if the adapters
    don't fit the model, or if a tensor is missing (the head included), unexpected, of another shape, or not finite.
    Raises RuntimeError if the model's own adapters are merged: its weights would keep their update.
    """
    if any(layer.merged for layer in lora_layers(model).values()):
        raise RuntimeError("this model's adapters are merged; unmerge them before loading others")
    directory = Path(directory)
    config = read_adapter_config(directory, model)
    path = directory / WEIGHTS_NAME
    _refuse_larger_ranks(model, config, directory)
    if lora_layers(model):
        _refuse_other_adapters(lora_layers(model), config, directory)
    else:
        inject_lora(model, config)
    parameters = dict(model.named_parameters())
    wanted = _file_keys(model, config)
    try:
        with open_safetensors(path) as file:
            # With bias="all" peft writes the biases of modules trained in full twice more, under its wrapper's names.
            held = {key for key in file.keys() if not any(part in key for part in _WRAPPER_PARTS)}
            lost = {key for key in set(wanted) - held if key.endswith(".base_layer.bias")}
            if config.bias == "lora_only" and lost == {key for key in wanted if key.endswith(".base_layer.bias")}:
                # Early peft versions (0.10 among them) train these biases and then forget to save them.
                warnings.warn(
                    f"{path}: holds none of the biases that were trained; the base model's are used", stacklevel=2
                )
                wanted = {key: name for key, name in wanted.items() if key not in lost}
            _refuse(
                path, "lacks", set(wanted) - held, "the adapter is not whole; save it again with its head and biases"
            )
            # Frozen parameters that the base checkpoint lacks (see save_adapter) lie there under their own names.
            wanted |= {key: name for key in held - set(wanted) if (name := key.removeprefix(_PREFIX)) in parameters}
            _refuse(path, "holds unexpected", held - set(wanted), "adapter_config.json describes another adapter")
            kinds = {text for text in not_floats(file) if text.rpartition(" ")[0] in wanted}
            _refuse(path, "holds no floating-point numbers in", kinds, "train the adapter without quantization")
            shapes = {key: (file.get_slice(key).get_shape(), list(parameters[wanted[key]].shape)) for key in wanted}
            wrong = {f"{key} ({found}, not {due})" for key, (found, due) in shapes.items() if found != due}
            _refuse(path, "has the wrong shape in", wrong, "it was trained on another base model or number of labels")
            loaded = {key: file.get_tensor(key) for key in wanted}
    except FileNotFoundError:
        raise LoRAError(f"{path}: no such file; an adapter folder needs its weights as safetensors") from None
    except (SafetensorError, OSError) as error:
        raise LoRAError(f"{path}: not a whole safetensors file ({error}); fetch the adapter again") from None
    broken = {key for key, tensor in loaded.items() if not bool(torch.isfinite(tensor.float()).all())}
    _refuse(path, "has values that are not finite in", broken, "its training failed; use another")
    with torch.no_grad():
        for key, tensor in loaded.items():
            parameters[wanted[key]].copy_(tensor)
        for name, layer in lora_layers(model).items():
            # No entry of s B A is larger than this; the three may each be finite, and their product not.
            largest = (
                abs(layer.scaling) * layer.rank * layer.lora_A.abs().max().item() * layer.lora_B.abs().max().item()
            )
            if not largest < torch.finfo(layer.lora_A.dtype).max:
                raise LoRAError(f"{directory}: the update of {name} is not finite (alpha {layer.alpha:g}); use another")
    return config


def read_base_model(directory: str | Path) -> str | None:
    """Name or path of the base checkpoint that the adapter was trained on, if its settings tell.

    Raises LoRAError if they can't be read, or give what is no name.
    """
    path = Path(directory) / CONFIG_NAME
    name = _read_json(path).get("base_model_name_or_path") or None
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
    raw = _read_json(path)
    if raw.get("peft_type") != "LORA":
        raise LoRAError(f"{path}: peft_type is {raw.get('peft_type')!r}; only LORA adapters can be loaded")
    known = set(_FIELDS.values()) | _WITHOUT_EFFECT
    for name, value in raw.items():
        if name not in known and value:
            raise LoRAError(f"{path}: {name} = {json.dumps(value)} is not supported; train the adapter without it")
    if raw.get("init_lora_weights") not in (True, False, None, "gaussian"):
        # PiSSA, OLoRA and the like change the base weights when they start, so the update alone is not the model.
        raise LoRAError(
            f"{path}: init_lora_weights = {raw['init_lora_weights']!r} changes the base model; not supported"
        )
    values: dict[str, Any] = {}
    for ours, theirs in _FIELDS.items():
        value = raw.get(theirs)
        if value is None:
            continue
        if ours == "layers_to_transform" and isinstance(value, int):
            value = [value]
        values[ours] = tuple(value) if isinstance(value, list) else value
    if "target_modules" not in values:
        raise LoRAError(f"{path}: target_modules is missing; name the layers that the adapter belongs to")
    saved = values.get("modules_to_save", ())
    if not isinstance(saved, tuple) or not all(isinstance(name, str) for name in saved):
        raise LoRAError(f"{path}: modules_to_save is {raw['modules_to_save']!r}; it must be a list of names")
    if raw.get("task_type") == "SEQ_CLS":  # peft trains and saves the head of every classifier; 0.10 does not say so
        saved = (*saved, *_HEAD_NAMES)
    values["modules_to_save"] = tuple(dict.fromkeys(saved))
    if model is not None:
        parts = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        values["modules_to_save"] = tuple(
            name for name in values["modules_to_save"] if name not in _HEAD_NAMES or name in parts
        )
    if values.get("layers_to_transform") == ():
        del values["layers_to_transform"]
    _refuse_endless_search(path, values)
    try:
        return LoRAConfig(**values)
    except (LoRAError, TypeError, AttributeError) as error:
        raise LoRAError(f"{path}: {error}") from None


def _refuse_endless_search(path: Path, values: dict[str, Any]) -> None:
    """Raise LoRAError if looking for the layers that a stranger's settings name could take longer than anyone waits."""
    for name, value in values.items():
        most = _MOST_PATTERNS if isinstance(value, dict) else _MOST_NAMES
        if isinstance(value, dict | tuple) and len(value) > most:
            raise LoRAError(f"{path}: {_FIELDS[name]} has {len(value):,} entries; {most:,} at most are read")
    held = [values.get(name) for name in ("rank_pattern", "alpha_pattern", "target_modules")]
    expressions = [key for value in held for key in (value if isinstance(value, dict) else [value])]
    for expression in expressions:
        if isinstance(expression, str) and could_hang(expression):
            raise LoRAError(
                f"{path}: the regular expression {expression!r} could take for ever to match; name the layers instead"
            )


def _refuse_larger_ranks(model: nn.Module, config: LoRAConfig, directory: Path) -> None:
    """Raise LoRAError if the settings give a layer a rank that no tensor has: it would be made before it is missed."""
    layers = config.layers_to_transform
    chosen = [name for name, _ in model.named_modules() if matches(config.target_modules, name, layers)]
    named = max((pattern_value(config.rank_pattern, name, config.rank) for name in chosen), default=0)
    ranks = [shape[0] for name, shape in adapter_shapes(directory).items() if ".lora_A" in name and shape]
    held = max(ranks, default=0)
    if named > held:
        raise LoRAError(
            f"{directory / CONFIG_NAME}: names rank {named}, but {WEIGHTS_NAME} has none above {held}; "
            "the two belong to different adapters"
        )


def _refuse_other_adapters(layers: dict[str, LoRALinear], config: LoRAConfig, directory: Path) -> None:
    """Raise LoRAError if a layer of the model is not what `config` would have made it."""
    for name, layer in layers.items():
        rank = pattern_value(config.rank_pattern, name, config.rank)
        alpha = pattern_value(config.alpha_pattern, name, config.alpha)
        chosen = matches(config.target_modules, name, config.layers_to_transform)
        wanted = LoRALinear.scaling_of(rank, alpha, config.use_rslora)
        if not (chosen and (layer.rank, layer.scaling) == (rank, wanted)):
            raise LoRAError(f"{directory}: other settings than those of the model's adapter on {name}; load it afresh")


def adapter_shapes(directory: str | Path) -> dict[str, list[int]]:
    """Shapes of the tensors in a folder's `adapter_model.safetensors`, by their names without peft's prefix.

    Reads the header alone. Raises LoRAError if the file is missing or broken.
    """
    path = Path(directory) / WEIGHTS_NAME
    try:
        with open_safetensors(path) as file:
            return {key.removeprefix(_PREFIX): file.get_slice(key).get_shape() for key in file.keys()}
    except FileNotFoundError:
        raise LoRAError(f"{path}: no such file; an adapter folder needs its weights as safetensors") from None
    except (SafetensorError, OSError) as error:
        raise LoRAError(f"{path}: not a whole safetensors file ({error}); fetch the adapter again") from None


def _file_keys(model: nn.Module, config: LoRAConfig) -> dict[str, str]:
    """Key in the file -> name of our parameter, for everything that belongs to the adapter."""
    layers = lora_layers(model)
    kept_whole = {
        name for wanted in config.modules_to_save for name, _ in model.named_modules() if matches([wanted], name)
    }
    keys: dict[str, str] = {}
    for name, _ in model.named_parameters():
        module, _, own = name.rpartition(".")
        if own in ("lora_A", "lora_B") and module in layers:
            keys[f"{_PREFIX}{name}.weight"] = name
        elif any(name.startswith(f"{whole}.") for whole in kept_whole):
            keys[f"{_PREFIX}{name}"] = name
        elif own == "bias":
            of_adapter = module.endswith(".base") and module.removesuffix(".base") in layers
            if config.bias == "all" or (config.bias == "lora_only" and of_adapter):
                shown = f"{module.removesuffix('.base')}.base_layer.bias" if of_adapter else name
                keys[f"{_PREFIX}{shown}"] = name
    return keys


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or LoRAError."""
    try:
        raw = read_settings(path)
    except FileNotFoundError:
        raise LoRAError(f"{path}: no such file; an adapter folder needs its settings") from None
    except OSError as error:
        raise LoRAError(f"{path}: can't be read ({error.strerror})") from None
    except ValueError as error:  # not UTF-8, not JSON, a number of thousands of digits
        raise LoRAError(f"{path}: not valid JSON ({error}); fetch the adapter again") from None
    if not isinstance(raw, dict):
        raise LoRAError(f"{path}: holds no JSON object; fetch the adapter again")
    return raw


def _refuse(path: Path, problem: str, keys: set[str], mend: str) -> None:
    """Raise LoRAError if there are such keys, naming the first of them."""
    if keys:
        shown = sorted(keys)[:6]
        more = f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else ""
        raise LoRAError(f"{path}: {problem} {', '.join(shown)}{more}; {mend}")
