"""The other side of every proof: the same model in `transformers` + `peft`, and how far two tensors are apart.

Models are random and small, with every value that training starts at zero (B, biases) drawn at random too: with
B = 0 most proofs would compare the pretrained model with itself.
"""

from __future__ import annotations

import re
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from lora.config import LoRAConfig
from lora.inject import inject_lora
from roberta.model import RobertaForSequenceClassification
from roberta.weights import load_checkpoint

SMALL = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    "type_vocab_size": 1,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "layer_norm_eps": 1e-5,
    "num_labels": 3,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Two layers of roberta-base's width; a small vocabulary, as the table's size enters no arithmetic.
BASE_WIDTH = SMALL | {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}


measured: list[tuple[str, float, float]] = []
"""(unit, found, allowed) of every comparison in the running test; conftest.py collects them for the table of proofs.

Units: "deviation" (relative), "exact" (0 if equal, else 1, allowed 0), "of theirs" (our error over theirs).
"""


def deviation(ours: Tensor, theirs: Tensor) -> float:
    """max |ours - theirs| / max |theirs|."""
    assert ours.shape == theirs.shape, f"{tuple(ours.shape)} against {tuple(theirs.shape)}"
    scale = theirs.abs().max().item()
    return (ours - theirs).abs().max().item() / (scale or 1.0)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10, what: str = "") -> None:
    """Fail if the relative deviation exceeds `tolerance`, and say by how much."""
    found = deviation(ours.detach(), theirs.detach())
    measured.append(("deviation", found, tolerance))
    assert found <= tolerance, f"{what}: relative deviation {found:.2e}, allowed {tolerance:.0e}"


def assert_same(ours: Any, theirs: Any, what: str = "") -> None:
    """Fail unless the two are equal: tensors bit for bit, anything else by ==."""
    same = torch.equal(ours, theirs) if isinstance(theirs, Tensor) else bool(ours == theirs)
    measured.append(("exact", 0.0 if same else 1.0, 0.0))
    assert same, f"{what}: {str(ours)[:300]} against {str(theirs)[:300]}"


def assert_no_worse(ours: float, theirs: float, factor: float, what: str = "") -> None:
    """Fail if our error exceeds `factor` times theirs."""
    measured.append(("of theirs", ours / theirs, factor))
    assert ours <= factor * theirs, f"{what}: {ours:.2e}, theirs {theirs:.2e}"


def reference_model(
    seed: int = 0, attention: str = "sdpa", kind: str = "Roberta", head: str = "SequenceClassification", **sizes: Any
) -> nn.Module:
    """A random `transformers.RobertaForSequenceClassification`, or another kind or head, float32, in eval mode."""
    config = getattr(transformers, f"{kind}Config")(**(SMALL | NO_DROPOUT | sizes))
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}For{head}")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm.weight" in name:
                parameter.uniform_(0.5, 1.5)
            else:  # wide enough that attention and GELU leave their linear range
                parameter.normal_(std=0.3 if parameter.shape[-1] < 100 else 0.05)
    return model


def our_copy(reference: nn.Module, folder: Any, dtype: torch.dtype = torch.float64) -> RobertaForSequenceClassification:
    """The same model as ours, by way of the checkpoint that `transformers` writes."""
    reference.save_pretrained(folder)
    return load_checkpoint(folder).to(dtype).eval()


def peft_config(config: LoRAConfig) -> peft.LoraConfig:
    """Our settings as peft's; it adds the classifier to modules_to_save by itself."""

    def listed(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return peft.LoraConfig(
        task_type="SEQ_CLS",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=listed(config.target_modules),
        exclude_modules=listed(config.exclude_modules),
        layers_to_transform=listed(config.layers_to_transform),
        layers_pattern=listed(config.layers_pattern),
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        bias=config.bias,
        modules_to_save=[name for name in config.modules_to_save if name != "classifier"] or None,
        use_rslora=config.use_rslora,
    )


def our_name(peft_name: str) -> str | None:
    """Our name of a parameter of a peft model; None for the frozen original of a module trained in full."""
    if ".original_module." in peft_name:
        return None
    name = peft_name.removeprefix("base_model.model.")
    name = name.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".base.")
    return re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1", name)


def adapted_pair(
    folder: Any, config: LoRAConfig, seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: Any
) -> tuple[nn.Module, peft.PeftModel]:
    """Ours and peft's, adapted alike, with the same random values in every trainable tensor."""
    reference = reference_model(seed, **sizes)
    ours = our_copy(reference, folder, dtype)
    inject_lora(ours, config)
    theirs = peft.get_peft_model(reference.to(dtype), peft_config(config)).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
                parameter.copy_(value.to(parameter.dtype))
    copy_parameters(theirs, ours)
    return ours.eval(), theirs.eval()


@torch.no_grad()
def copy_parameters(theirs: nn.Module, ours: nn.Module) -> None:
    """Give ours the values of theirs, name by name; a name that only one side has is an error."""
    wanted = {our_name(name): parameter for name, parameter in theirs.named_parameters() if our_name(name)}
    mine = dict(ours.named_parameters())
    assert set(wanted) == set(mine), f"{sorted(set(wanted) ^ set(mine))[:5]}"
    for name, parameter in mine.items():
        parameter.copy_(wanted[name])


def ragged_batch(
    lengths: list[int], vocab: int = 97, labels: int = 3, seed: int = 0, pad: int = 1
) -> dict[str, Tensor]:
    """Random ids of the given lengths, padded on the right, with mask and labels."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    input_ids = torch.randint(3, vocab, (len(lengths), width), generator=generator)
    attention_mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    input_ids = input_ids.where(attention_mask.bool(), torch.tensor(pad))
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": torch.randint(0, labels, (len(lengths),), generator=generator),
    }
