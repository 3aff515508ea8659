"""The numbers of peft's prefix tuning that test_prefix_tuning.py compares with: prefix_peft.json.

    python -m venv .venv-prefix
    .venv-prefix/bin/pip install "peft==0.21.*" "transformers==4.51.*"
    .venv-prefix/bin/python -m tests.parity.prefix_peft

A prefix is a past of keys and values, which RoBERTa takes in transformers 4 and no longer in 5; so this needs an
environment of its own. The script also loads files both ways there. Weights follow a formula: no random generator.
"""

import json
import tempfile
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F

from lora.adapter import adapters
from lora.config import PrefixTuningConfig
from lora.inject import inject_lora
from lora.peft_format import load_adapter, save_adapter
from lora.prefix_tuning import PrefixTuning
from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification

PATH = Path(__file__).with_suffix(".json")
CASES = {"prefixes": {}, "prefixes by a projection": {"prefix_projection": True, "encoder_hidden_size": 5}}
SIZES = {
    "vocab_size": 23,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 12,
    "pad_token_id": 1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
INPUTS = {
    "input_ids": torch.tensor([[0, 5, 21, 14, 9, 2], [0, 7, 3, 2, 1, 1]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
}
LABELS = torch.tensor([2, 0])


@torch.no_grad()
def fill(parameters):
    """Set each tensor to numbers that depend on its name alone."""
    for name, parameter in parameters.items():
        index = torch.arange(parameter.numel(), dtype=torch.float64)
        start = zlib.crc32(name.encode()) % 1000
        values = 0.5 * torch.sin(start + 1.3 * index + 0.01 * index**2).reshape(parameter.shape)
        parameter.copy_(values + 1 if name.endswith("LayerNorm.weight") else values)


def our_model(case):
    """Ours with the case's settings and with values by the formula."""
    model = RobertaForSequenceClassification(RobertaConfig(**SIZES, label_names=("a", "b", "c"))).double().eval()
    fill(dict(model.named_parameters()))
    inject_lora(model, PrefixTuningConfig(num_virtual_tokens=3, **CASES[case]))
    parts = parameters_by_their_names(model)
    wanted = {name: torch.cat(tuple(tensors), dim=dim) for name, (tensors, dim) in parts.items()}
    fill(wanted)
    with torch.no_grad():
        for name, (tensors, dim) in parts.items():
            for tensor, value in zip(tensors, wanted[name].chunk(len(tensors), dim), strict=True):
                tensor.copy_(value)
    return model


def parameters_by_their_names(model):
    """Name in peft's encoder -> our parameters, which lie side by side in it, and the dimension in which they do."""
    layers = [adapter for adapter in adapters(model).values() if isinstance(adapter, PrefixTuning)]
    projection = layers[0].projection
    if projection is None:
        return {"embedding.weight": ([layer.prefix for layer in layers], 1)}
    return {
        "embedding.weight": ([projection.tokens], 0),
        "transform.0.weight": ([projection.dense.weight], 0),
        "transform.0.bias": ([projection.dense.bias], 0),
        "transform.2.weight": ([layer.out.weight for layer in layers], 0),
        "transform.2.bias": ([layer.out.bias for layer in layers], 0),
    }


def logits(model):
    """Those of either side."""
    found = model(**INPUTS)
    return getattr(found, "logits", found)


def train(model):
    """Logits after 20 optimizer steps."""
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(logits(model), LABELS).backward()
        optimizer.step()
    return logits(model)


def main():
    """Write the numbers, and check that files are read in both directions."""
    import peft
    import transformers

    torch.set_default_dtype(torch.float64)
    config = transformers.RobertaConfig(**SIZES, type_vocab_size=1, layer_norm_eps=1e-5, num_labels=3)

    def their_base():
        model = transformers.RobertaForSequenceClassification(config).eval()
        fill(dict(model.named_parameters()))
        return model

    found = {"made with": f"peft {peft.__version__}, transformers {transformers.__version__}"}
    for case, settings in CASES.items():
        model = peft.get_peft_model(
            their_base(), peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3, **settings)
        )
        encoder = model.prompt_encoder["default"].named_parameters()
        fill(parameters := dict(encoder))
        before = logits(model)
        F.cross_entropy(before, LABELS).backward()
        found[case] = {
            "logits": before.tolist(),
            "gradients": {name: parameter.grad.tolist() for name, parameter in parameters.items()},
            "trainable": model.get_nb_trainable_parameters()[0],
        }
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            ours = RobertaForSequenceClassification(RobertaConfig(**SIZES, label_names=("a", "b", "c"))).eval()
            fill(dict(ours.named_parameters()))
            load_adapter(ours, folder)
            assert torch.allclose(logits(ours), before, rtol=0, atol=1e-12)
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(our_model(case), folder, task_type="SEQ_CLS")
            read = peft.PeftModel.from_pretrained(their_base(), folder).eval()
            assert torch.allclose(logits(read), before, rtol=0, atol=1e-12)
        found[case]["trained"] = train(model).tolist()
    PATH.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
