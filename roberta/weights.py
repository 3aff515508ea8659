"""Checkpoints: safetensors in, safetensors out.

Our module tree has the names of the published checkpoints, so a key is a parameter's name, up to a prefix. Files are
read memory-mapped, tensor by tensor, straight into the model's own memory: no pickle, no second full copy.

**BERT checkpoints load into the same encoder, exactly.** BERT and RoBERTa compute the same function of different
tables, and the two differences are a renumbering of rows:

- *Positions.* BERT gives token t = 0, 1, ... row t. RoBERTa gives it row t + p + 1, p being the padding index. With
  p + 1 rows put above BERT's table, RoBERTa's row t + p + 1 is BERT's row t. The new rows are read at padding tokens
  only, and no real token sees those: attention masks them out, all else works on one token at a time.
- *Token types.* BERT adds row 0 of a two-row table to every token of a single text, RoBERTa row 0 of a one-row table.
  Taking BERT's row 0 is the whole table, as long as there is one text and not a pair; classification here has one.

So the hidden states of all real tokens are the same numbers (tests/parity/test_bert.py, against `BertModel`).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from roberta.config import RobertaConfig
from roberta.files import CheckpointError, non_float_tensors, open_weights
from roberta.model import RobertaForSequenceClassification
from roberta.tokenizer import TextTokenizer

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"

# Parts of pretraining checkpoints that classification has no use for, by name; anything else unknown is an error.
_IGNORED_PREFIXES = ("lm_head.", "pooler.", "cls.")
_IGNORED_SUFFIXES = ("embeddings.position_ids",)
_POSITIONS = "roberta.embeddings.position_embeddings.weight"
_TOKEN_TYPES = "roberta.embeddings.token_type_embeddings.weight"


def load_checkpoint(
    directory: str | Path, config: RobertaConfig | None = None, *, new_head: bool = False
) -> RobertaForSequenceClassification:
    """Build the model of a checkpoint folder (`config.json`, `model.safetensors`), in float32 on the CPU.

    `config` is the folder's own unless given; pass a changed copy to set labels or dropout. The head is read if the
    file holds one (a fine-tuned checkpoint), unless `new_head`; otherwise it is drawn from
    N(0, initializer_range^2) with zero biases, from torch's global generator.

    Raises CheckpointError if a file is missing, cut off or of another kind, if a key is missing, unexpected, of another
    shape or type, or not finite (the message lists the keys), or if the model is larger than the machine's memory.
    """
    directory = Path(directory)
    path = directory / WEIGHTS_NAME
    config = config or RobertaConfig.from_file(directory / CONFIG_NAME)
    bert = config.model_type == "bert"
    with torch.device("meta"):  # shapes without memory: nothing is initialised only to be overwritten
        model = RobertaForSequenceClassification(config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    with open_weights(path) as file:
        keys = {name: key for key in file.keys() if (name := _parameter_name(key)) is not None}
        draw_head = new_head or not any(name.startswith("classifier.") for name in keys)
        if draw_head:
            keys = {name: key for name, key in keys.items() if not name.startswith("classifier.")}
            shapes = {name: shape for name, shape in shapes.items() if not name.startswith("classifier.")}
        _refuse(path, "lacks", set(shapes) - set(keys), "it is not a whole RoBERTa or BERT encoder")
        unexpected = {keys[name] for name in set(keys) - set(shapes)}
        _refuse(path, "holds unexpected", unexpected, "it is a checkpoint of another architecture")
        kinds = [f"{key} ({kind})" for key, kind in non_float_tensors(file).items() if key in keys.values()]
        _refuse(path, "holds no floating-point numbers in", kinds, "use a checkpoint in 16 or 32 bits")
        # By the file's header, before any memory is taken: config.json may claim anything.
        wrong = []
        for name, key in keys.items():
            found, wanted = file.get_slice(key).get_shape(), list(shapes[name])
            if bert and name == _POSITIONS:
                wanted[0] -= config.pad_token_id + 1
            elif bert and name == _TOKEN_TYPES and found:
                wanted[0] = max(1, found[0])
            if found != wanted:
                wrong.append(f"{key} ({found}, not {wanted})")
        head_only = all(key.startswith("classifier.") for key in wrong)
        fix = (
            "its head has other labels; draw a new head (model.new_head)"
            if head_only
            else "config.json describes another model"
        )
        _refuse(path, "has the wrong shape in", wrong, fix)

        _refuse_larger_than_memory(path, sum(parameter.numel() for parameter in model.parameters()))
        model.to_empty(device="cpu")
        parameters = dict(model.named_parameters())
        if draw_head:
            _initialise_head(model.classifier, config)
        for name, key in keys.items():
            _copy(file.get_tensor(key), parameters[name], name, config, bert)
        # All values are finite if the smallest and the largest are; unlike `isfinite`, this takes no memory.
        edges = {name: torch.aminmax(parameters[name].detach()) for name in keys}
        broken = [keys[name] for name, pair in edges.items() if not all(edge.isfinite() for edge in pair)]
        _refuse(path, "has values that are not finite in", broken, "fetch the checkpoint again, or use another")
    return model


def has_head(directory: str | Path) -> bool:
    """Whether a checkpoint folder's weights hold a classification head, so that none need be drawn.

    Reads the header alone. Raises CheckpointError as `load_checkpoint` does.
    """
    with open_weights(Path(directory) / WEIGHTS_NAME) as file:
        return any(key.startswith("classifier.") for key in file.keys())


def save_checkpoint(
    model: RobertaForSequenceClassification, directory: str | Path, tokenizer: TextTokenizer | None = None
) -> None:
    """Write a folder that `transformers.RobertaForSequenceClassification.from_pretrained` opens.

    `model` holds plain linear layers (adapters merged and unloaded). With a tokenizer, `AutoTokenizer` opens too.
    The weights appear whole or not at all. Raises ValueError if the model still carries adapters, OSError if a file
    can't be written.
    """
    plain = set(_parameter_names(model.config))
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    if set(tensors) != plain:
        raise ValueError("this model carries adapters; merge and unload them before saving it as a checkpoint")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_NAME).write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    part = directory / f"{WEIGHTS_NAME}.part"
    try:
        save_file(tensors, str(part), metadata={"format": "pt"})
        shutil.copymode(directory / CONFIG_NAME, part)  # the library lets the owner alone read it
        part.replace(directory / WEIGHTS_NAME)
    except SafetensorError as error:  # the library's own error, also for a full disk
        raise OSError(errno.EIO, str(error), str(directory / WEIGHTS_NAME)) from None
    finally:
        part.unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.save(directory)


def _parameter_names(config: RobertaConfig) -> list[str]:
    """Names of all parameters of a plain model."""
    with torch.device("meta"):
        return [name for name, _ in RobertaForSequenceClassification(config).named_parameters()]


def _parameter_name(key: str) -> str | None:
    """The parameter that a checkpoint's key means; None for parts that are left out by name."""
    name = key.removeprefix("roberta.").removeprefix("bert.")
    if name.startswith(_IGNORED_PREFIXES) or name.endswith(_IGNORED_SUFFIXES):
        return None
    # The first BERT files call LayerNorm's weight gamma and its bias beta.
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return name if name.startswith("classifier.") else f"roberta.{name}"


@torch.no_grad()
def _copy(source: Tensor, target: Tensor, name: str, config: RobertaConfig, bert: bool) -> None:
    """Copy a checkpoint's tensor into the parameter `name`, whose shape it has, but for the two tables of a BERT."""
    if bert and name == _POSITIONS:
        shift = config.pad_token_id + 1
        target[:shift].zero_()
        target = target[shift:]
    elif bert and name == _TOKEN_TYPES:
        source = source[:1]
    target.copy_(source)


def _initialise_head(head: nn.Module, config: RobertaConfig) -> None:
    """Weights from N(0, initializer_range^2), biases zero, as for every new layer in Devlin et al. 2018."""
    for name, parameter in head.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=config.initializer_range)


def _refuse_larger_than_memory(path: Path, parameters: int) -> None:
    """Raise CheckpointError if so many float32 parameters can't fit into this machine, whatever else is in it."""
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * parameters > held:
        raise CheckpointError(
            f"{path}: {parameters:,} parameters take {4 * parameters / 2**30:,.0f} GiB of memory, and this machine has "
            f"{held / 2**30:,.0f}; use a smaller checkpoint"
        )


def _refuse(path: Path, problem: str, keys: set[str] | list[str], fix: str) -> None:
    """Raise CheckpointError if there are such keys, naming the first of them."""
    if keys:
        shown = sorted(keys)[:6]
        more = f" and {len(keys) - len(shown)} more" if len(keys) > len(shown) else ""
        raise CheckpointError(f"{path}: {problem} {', '.join(shown)}{more}; {fix}")
