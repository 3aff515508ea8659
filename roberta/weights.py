"""Checkpoints: safetensors in, safetensors out.

Our module tree has the names of the published checkpoints, so a key is a parameter's name, up to a prefix. Files are
read memory-mapped, tensor by tensor, into the model's own memory, without a second full copy.

**BERT checkpoints load into the same encoder, exactly.** BERT and RoBERTa compute the same function of different
tables; the two differences are a renumbering of rows:

- *Positions.* BERT gives token t = 0, 1, ... row t. RoBERTa gives it row t + p + 1, p being the padding index. With
  p + 1 rows put above BERT's table, RoBERTa's row t + p + 1 is BERT's row t. The new rows are read only at padding
  tokens, which attention masks out.
- *Token types.* BERT adds row 0 of a two-row table to every token of a single text, RoBERTa row 0 of a one-row table.
  A classified text is a single one, so BERT's row 0 is all that is needed.

The hidden states of all real tokens are equal (tests/parity/test_bert.py, against `BertModel`).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from roberta.config import CONFIG_NAME, RobertaConfig
from roberta.files import WEIGHTS_NAME, CheckpointError, non_float_tensors, open_weights, read_json, weights_path
from roberta.model import RobertaForSequenceClassification
from roberta.tokenizer import TextTokenizer

# Heads of pretraining and of other tasks, which are dropped; any other unknown key is an error.
_OTHER_HEADS = ("lm_head.", "pooler.", "cls.", "qa_outputs.", "classifier.weight", "classifier.bias")
_IGNORED_SUFFIXES = ("embeddings.position_ids",)
# What torch.compile, DistributedDataParallel and peft (merged) put before the keys of the model that they wrap.
_WRAPPERS = re.compile(r"^((_orig_mod|module|base_model\.model)\.)+")
_UNMERGED = re.compile(r"\.(base_layer|lora_\w+|modules_to_save|original_module)\.")
_POSITIONS = "roberta.embeddings.position_embeddings.weight"
_TOKEN_TYPES = "roberta.embeddings.token_type_embeddings.weight"


def load_checkpoint(
    directory: str | Path,
    config: RobertaConfig | None = None,
    *,
    new_head: bool = False,
    on_meta: Callable[[RobertaForSequenceClassification], None] = lambda model: None,
) -> RobertaForSequenceClassification:
    """Build the model of a checkpoint folder (`config.json`, `model.safetensors` or its parts), in float32 on the CPU.

    `config` is the folder's own unless given; pass a changed copy to set labels or dropout. The head is read if the
    folder holds one of ours (see `head_of`), unless `new_head`; otherwise its weights are drawn from
    N(0, initializer_range^2) by torch's global generator, with zero biases. `on_meta` may change modules while they
    have shapes and no values; one without the parameter `weight` gets the checkpoint's by its method `store(weight)`.

    Raises CheckpointError if a file is missing or damaged, if a key is missing, unexpected, of another shape or type,
    or not finite (the message lists the keys), if the head that is read is one for regression, or if the model is
    larger than the machine's memory.
    """
    directory = Path(directory)
    path = weights_path(directory)
    config = config or RobertaConfig.from_file(directory / CONFIG_NAME)
    with torch.device("meta"):  # shapes without memory: nothing is initialised only to be overwritten
        model = RobertaForSequenceClassification(config)
    with open_weights(directory) as weights:
        keys = _matching_keys(path, weights, model, config, new_head)
        on_meta(model)
        _refuse_larger_than_memory(path, sum(parameter.nbytes for parameter in model.parameters()))
        model.to_empty(device="cpu")
        parameters = dict(model.named_parameters())
        if not any(name.startswith("classifier.") for name in keys):
            _initialise_head(model.classifier, config)
        broken = []
        for name, key in keys.items():
            source = weights[key].get_tensor(key).float()
            # All values are finite if the smallest and the largest are; unlike `isfinite`, this allocates no memory.
            if not all(edge.isfinite() for edge in torch.aminmax(source)):
                broken.append(key)
            elif name in parameters:
                _copy(source, parameters[name], name, config)
            else:
                model.get_submodule(name.removesuffix(".weight")).store(source)  # type: ignore[operator]
        _refuse(path, "has values that are not finite in", broken, "fetch the checkpoint again, or use another")
    return model


def _matching_keys(
    path: Path, weights: dict[str, Any], model: nn.Module, config: RobertaConfig, new_head: bool
) -> dict[str, str]:
    """Parameter -> key of all that is read: without the head, if that is drawn.

    Decided by the headers of the files, before memory is allocated: config.json may state any size.
    """
    shapes, bert = {name: value.shape for name, value in model.named_parameters()}, config.model_type == "bert"
    if unmerged := next(filter(_UNMERGED.search, weights), None):
        fix = "call merge_and_unload() and save it again"
        raise CheckpointError(f"{path}: holds {unmerged}, of a peft model that is not merged; {fix}")
    names = {key: name for key in weights if (name := _parameter_name(key)) is not None}
    keys = {name: key for key, name in names.items()}
    _refuse(path, "has another key for the parameter of", names.keys() - keys.values(), "it mixes two models")
    draw_head = new_head or not any(name.startswith("classifier.") for name in keys)
    if draw_head:
        keys = {name: key for name, key in keys.items() if not name.startswith("classifier.")}
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("classifier.")}
    _refuse(path, "lacks", set(shapes) - set(keys), "it is not a complete RoBERTa or BERT model")
    unexpected = {keys[name] for name in set(keys) - set(shapes)}
    _refuse(path, "holds unexpected", unexpected, "it is from another architecture")
    kinds = [f"{key} ({kind})" for key, kind in non_float_tensors(weights).items() if key in keys.values()]
    _refuse(path, "holds no floating-point numbers in", kinds, "use a checkpoint in 16 or 32 bits")
    if not draw_head:
        key = keys["classifier.out_proj.weight"]
        refuse_regression(path.with_name(CONFIG_NAME), weights[key].get_slice(key).get_shape())
    wrong = []
    for name, key in keys.items():
        found, wanted = weights[key].get_slice(key).get_shape(), list(shapes[name])
        if bert and name == _POSITIONS:
            wanted[0] -= config.pad_token_id + 1
        elif bert and name == _TOKEN_TYPES and found:
            wanted[0] = max(1, found[0])
        if found != wanted:
            wrong.append(f"{key} ({found}, not {wanted})")
    _refuse(path, "has the wrong shape in", wrong, "config.json describes another model")
    return keys


def head_of(directory: str | Path) -> str:
    """The head in a checkpoint folder: "ours" (`ClassificationHead`), "none", or others by name, such as "lm_head".

    Others are for another task or compute something else, so `load_checkpoint` draws a new head. "classifier" is then
    a single matrix, as token classification, multiple choice, and BERT's own classification of texts have it.
    Raises CheckpointError as `load_checkpoint`.
    """
    with open_weights(directory) as weights:
        names = [_without_prefix(key) for key in weights]
    others = [name.split(".")[0] for name in names if name.startswith(_OTHER_HEADS)]
    ours = any(name.startswith("classifier.") and not name.startswith(_OTHER_HEADS) for name in names)
    return "ours" if ours else ", ".join(sorted(set(others))) or "none"


def save_checkpoint(
    model: RobertaForSequenceClassification, directory: str | Path, tokenizer: TextTokenizer | None = None
) -> None:
    """Write a folder that `transformers.RobertaForSequenceClassification.from_pretrained` opens.

    With a tokenizer, `AutoTokenizer` opens it too. The weights are written atomically. Raises ValueError if the model
    still has adapters (merge and unload them first), OSError if a file can't be written.
    """
    with torch.device("meta"):
        plain = {name for name, _ in RobertaForSequenceClassification(model.config).named_parameters()}
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    if set(tensors) != plain:
        raise ValueError(
            "this model carries adapters or weights in fewer bits; merge, unload and dequantize it before saving"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model.config.save(directory)
    part = directory / f"{WEIGHTS_NAME}.part"
    try:
        save_file(tensors, str(part), metadata={"format": "pt"})
        shutil.copymode(directory / CONFIG_NAME, part)  # the library makes it readable by the owner only
        part.replace(directory / WEIGHTS_NAME)
    except SafetensorError as error:  # the library's own error, also for a full disk
        raise OSError(errno.EIO, str(error), str(directory / WEIGHTS_NAME)) from None
    finally:
        part.unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.save(directory)


def _without_prefix(key: str) -> str:
    key = _WRAPPERS.sub("", key)
    return key.removeprefix("roberta.").removeprefix("bert.")


def _parameter_name(key: str) -> str | None:
    """The parameter that a checkpoint's key names; None for what is dropped."""
    name = _without_prefix(key)
    if name.startswith(_OTHER_HEADS) or name.endswith(_IGNORED_SUFFIXES):
        return None
    # The first BERT files call LayerNorm's weight gamma and its bias beta.
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return name if name.startswith("classifier.") else f"roberta.{name}"


@torch.no_grad()
def _copy(source: Tensor, target: Tensor, name: str, config: RobertaConfig) -> None:
    """Copy a checkpoint's tensor into the parameter `name`; the two tables of a BERT differ in shape."""
    bert = config.model_type == "bert"
    if bert and name == _POSITIONS:
        shift = config.pad_token_id + 1
        target[:shift].zero_()
        target = target[shift:]
    elif bert and name == _TOKEN_TYPES:
        source = source[:1]
    target.copy_(source)


def _initialise_head(head: nn.Module, config: RobertaConfig) -> None:
    """Weights from N(0, initializer_range^2), biases zero. Source: Devlin et al. 2018."""
    for name, parameter in head.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=config.initializer_range)


def refuse_regression(path: Path, shape: list[int]) -> None:
    """Raise CheckpointError if a head with a last weight of this shape, of the model that the config.json `path`
    describes, gives a number instead of classes."""
    problem = read_json(path).get("problem_type")
    one_output = shape[:1] == [1]
    if problem == "regression" or (one_output and problem != "multi_label_classification"):
        what = "problem_type is 'regression'" if problem == "regression" else "the head has a single output"
        raise CheckpointError(f"{path}: {what}: it predicts a number, not a class; draw a new head (model.new_head)")


def _refuse_larger_than_memory(path: Path, size: int) -> None:
    """Raise CheckpointError if parameters of that many bytes exceed the memory of this machine."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise CheckpointError(
            f"{path}: its parameters take {size / 2**30:,.0f} GiB of memory, and this machine has "
            f"{memory / 2**30:,.0f}; use a smaller checkpoint"
        )


def _refuse(path: Path, problem: str, keys: set[str] | list[str], fix: str) -> None:
    """Raise CheckpointError if `keys` is not empty, naming the first six."""
    if keys:
        if all(key.startswith("classifier.") for key in keys):
            fix = "the rest can be used with a new head (model.new_head)"
        shown = sorted(keys)[:6]
        more = f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else ""
        raise CheckpointError(f"{path}: {problem} {', '.join(shown)}{more}; {fix}")
