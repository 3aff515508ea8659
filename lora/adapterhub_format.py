"""Bottleneck adapters on disk, as AdapterHub's `adapters` writes them with `use_safetensors=True`.

    adapter_config.json        the fields of SeqBnConfig or DoubleSeqBnConfig under "config", and a name
    adapter.safetensors        roberta.encoder.layer.0.output.adapters.NAME.adapter_down.0.weight, ...
    head_config.json           the model's class, without which the library does not load the head, and the labels
    model_head.safetensors     classifier.dense.weight, ...: all modules that are trained fully

They are translated to the fields and keys of `lora.peft_format`, and back. A head that the library made itself
(`add_classification_head`) is read if it computes the same as RoBERTa's: two layers with tanh, without a pooler.
Source: the library's version 1.2; tests/parity/test_bottleneck.py.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from lora.errors import LoRAError
from lora.untrusted import open_weights, read_json

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter.safetensors"
_HEAD_CONFIG, _HEAD_WEIGHTS = "head_config.json", "model_head.safetensors"
_PICKLED = {WEIGHTS_NAME: "pytorch_adapter.bin", _HEAD_WEIGHTS: "pytorch_model_head.bin"}
_PREFIX = "base_model.model."
_NAME = "loraberta"

# Fields that a file may lack, and the one value of each that is supported.
_COMMON = {
    "adapter_residual_before_ln": False,
    "architecture": None,
    "cross_adapter": False,
    "dropout": 0.0,
    "inv_adapter": None,
    "is_parallel": False,
    "ln_after": False,
    "ln_before": False,
    "original_ln_after": True,
    "original_ln_before": False,
    "phm_layer": False,
    "residual_before_ln": True,
    "scaling": 1.0,
    "stochastic_depth": 0.0,
    "use_gating": False,
}
_FORMS: dict[str, dict[str, Any]] = {
    "pfeiffer": {"mh_adapter": False, "output_adapter": True, "original_ln_before": True, "non_linearity": "relu"},
    "houlsby": {"mh_adapter": True, "output_adapter": True, "original_ln_before": False, "non_linearity": "swish"},
}
# Our own settings, and fields without effect: initial values, and details of what `_COMMON` has switched off.
_OTHERS = set(
    "reduction_factor leave_out init_weights init_weights_seed inv_adapter_reduction_factor factorized_phm_W "
    "factorized_phm_rule hypercomplex_nonlinearity learn_phm phm_bias phm_c_init phm_dim phm_init_range phm_rank "
    "shared_W_phm shared_phm_rule".split()
)
# The library's own head, if it is RoBERTa's: what it may lack, and the places of its two layers.
_HEAD = {"layers": 2, "activation_function": "tanh", "use_pooler": False, "bias": True, "dropout_prob": None}
_HEAD_LAYERS = {"1": "classifier.dense", "4": "classifier.out_proj"}


def is_adapterhub(raw: Mapping[str, Any]) -> bool:
    """Whether the content `raw` of an adapter_config.json is AdapterHub's."""
    return isinstance(raw.get("config"), dict) and "peft_type" not in raw


def file_contents(model: nn.Module, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The content of each file by its name, for the fields and tensors of peft's files."""
    added, head = {}, {}
    for key, tensor in tensors.items():
        module, found, own = key.removeprefix(_PREFIX).partition(".adapter_")
        if found:
            added[f"{module}.adapters.{_NAME}{found}{own}"] = tensor
        else:
            head[module] = tensor
    about = {"model_class": type(model).__name__, "model_name": fields["base_model_name_or_path"]}
    about["version"] = "adapters.1.2.0"  # as whose these files are to be read
    config = _COMMON | _FORMS[fields["form"]] | {name: fields[name] for name in ("reduction_factor", "leave_out")}
    del config["architecture"]  # names the method where it is another
    contents = {WEIGHTS_NAME: save(added, metadata={"format": "pt"})}
    if head:
        number = len(head.get("classifier.out_proj.bias", ()))
        labels = {f"LABEL_{index}": index for index in range(number)}
        contents[_HEAD_WEIGHTS] = save(head, metadata={"format": "pt"})
        contents[_HEAD_CONFIG] = _json(about | {"config": None, "name": None, "num_labels": number, "label2id": labels})
    return contents | {CONFIG_NAME: _json(about | {"config": config, "name": _NAME})}


def read_fields(folder: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The settings `raw` in a folder as peft's fields. Raises LoRAError that names a field that is not supported."""
    path, config = folder / CONFIG_NAME, raw["config"]
    form = "houlsby" if config.get("mh_adapter") else "pfeiffer"
    _check_fields(path, config, _COMMON, _FORMS[form], _OTHERS)
    if config.get("reduction_factor") is None:
        raise LoRAError(f"{path}: reduction_factor is missing; give the hidden size divided by the bottleneck's width")
    if not isinstance(config.get("leave_out"), list | None):
        raise LoRAError(f"{path}: leave_out is {config['leave_out']!r}; it must be a list of layer numbers")
    with open_files(folder, raw) as file:
        modules = {key.removeprefix(_PREFIX).rpartition(".")[0] for key in file.keys() if ".adapter_" not in key}
    return {
        "peft_type": "BOTTLENECK",
        "form": form,
        "reduction_factor": config["reduction_factor"],
        "leave_out": config.get("leave_out"),
        "modules_to_save": sorted(modules),
        "base_model_name_or_path": raw.get("model_name"),
    }


def _check_fields(
    path: Path, found: Mapping[str, Any], optional: Mapping[str, Any], form: Mapping[str, Any], free: set[str]
) -> None:
    """Raise LoRAError unless each field has the value in `form` or, if it is missing there, in `optional`.

    Fields in none of the three are accepted at a value that switches them off.
    """
    expected = {**optional, **form}
    for name, value in {**dict.fromkeys(form), **optional, **found}.items():
        if name not in free and (value != expected[name] if name in expected else value):
            only = f", only {json.dumps(expected[name])}" if name in expected else ""
            raise LoRAError(
                f"{path}: {name} = {json.dumps(value)} is not supported{only}; train the adapter without it"
            )


class Files(dict[str, tuple[Any, str]]):
    """Open safetensors files as one: key as in peft's -> (file, key there)."""

    def get_slice(self, key: str) -> Any:
        """A tensor's type and shape."""
        file, own = self[key]
        return file.get_slice(own)

    def get_tensor(self, key: str) -> Tensor:
        """A tensor."""
        file, own = self[key]
        return file.get_tensor(own)


@contextlib.contextmanager
def open_files(folder: Path, raw: Mapping[str, Any]) -> Iterator[Files]:
    """The weights and the head in a folder with the settings `raw`.

    Raises LoRAError if a file is missing, broken or pickled.
    """
    for wanted, pickled in _PICKLED.items():
        if (folder / pickled).exists() and not (folder / wanted).exists():
            raise LoRAError(
                f"{folder / pickled}: a pickle can run code, so it is not read; load the adapter in AdapterHub's "
                "library and save it with use_safetensors=True"
            )
    part = f".adapters.{raw.get('name')}."
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_weights(folder / WEIGHTS_NAME))
        files = Files((_PREFIX + key.replace(part, "."), (file, key)) for key in file.keys())
        if (folder / _HEAD_WEIGHTS).exists():
            head = stack.enter_context(open_weights(folder / _HEAD_WEIGHTS))
            places = _head_layers(folder / _HEAD_CONFIG)
            for key in head.keys():
                layer, _, own = key.rpartition(".")
                files[f"{_PREFIX}{places.get(layer, layer)}.{own}"] = head, key
        yield files


def _head_layers(path: Path) -> dict[str, str]:
    """Names of the head's layers, where the library made it -> their names here. Raises LoRAError for other heads."""
    raw = read_json(path)
    config = raw.get("config")
    if config is None:  # the head of a model of transformers
        return {}
    if not isinstance(config, dict) or config.get("head_type") not in ("classification", "multilabel_classification"):
        raise LoRAError(f"{path}: not a head for classification; train one")
    _check_fields(path, config, _HEAD, {}, {"head_type", "label2id", "num_labels"})
    return {f"heads.{raw.get('name')}.{place}": layer for place, layer in _HEAD_LAYERS.items()}


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
