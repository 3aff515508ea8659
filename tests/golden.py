"""The golden run: 50 training steps in float64 whose every number is stored in tests/golden.json.

    python -m tests.golden        # rewrites the file: only after a change that is meant to change results

Weights, texts and labels are sines and cosines rounded to multiples of 2^-20, so no random generator, no compiler's
sine and no release of torch decides them. The second run has dropout: its masks come from cpu/dropout.py, numpy's
SFC64 seeded by torch's generator, and it stands for their order and number.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cpu.dropout import use_fast_dropout
from data.batching import Batch, EncodedSplit, collate
from lora.config import LoRAConfig
from lora.inject import inject_lora
from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification
from train import make_optimizer, make_schedule, train_step
from training.config import TrainConfig
from training.precision import Compute

FILE = Path(__file__).with_name("golden.json")
STEPS, TEXTS, LONGEST = 50, 40, 9


def wave(count: int, phase: float) -> Tensor:
    """`count` numbers in [-1, 1] that look irregular: sin(1.7 i^1.3 + phase), as multiples of 2^-20."""
    values = [round(math.sin(1.7 * i**1.3 + phase) * 2**20) / 2**20 for i in range(1, count + 1)]
    return torch.tensor(values, dtype=torch.float64)


def model_of(dropout: float) -> RobertaForSequenceClassification:
    """Two layers of width 12, an adapter on every kind of matmul, all of it closed-form numbers."""
    config = RobertaConfig(
        vocab_size=31, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
        max_position_embeddings=LONGEST + 2, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        label_names=("a", "b", "c"),
    )  # fmt: skip
    model = RobertaForSequenceClassification(config).double()
    lora = LoRAConfig(
        rank=3, alpha=5, dropout=dropout, target_modules=("query", "key", "value", "output.dense"),
        rank_pattern={"value": 2}, bias="none",
    )  # fmt: skip
    inject_lora(model, lora)
    use_fast_dropout(model)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            values = wave(parameter.numel(), phase=number).view_as(parameter)
            parameter.copy_(1 + values / 8 if name.endswith("LayerNorm.weight") else values / 2)
    return model


def texts() -> EncodedSplit:
    """40 texts of 1 to 9 tokens; the label is the first token modulo 3."""
    lengths = np.array([1 + (7 * i) % LONGEST for i in range(TEXTS)])
    offsets = np.concatenate([[0], lengths.cumsum()])
    ids = np.array([2 + (i * i + 3 * i) % 29 for i in range(offsets[-1])], dtype=np.int32)
    return EncodedSplit(ids, offsets, ids[offsets[:-1]].astype(np.int64) % 3, LONGEST, 0)


def groups() -> list[list[Batch]]:
    """For each step two ragged micro-batches, of 5 and of 3 texts."""
    split = texts()
    rows = [np.array([(11 * (8 * step + i) + step) % TEXTS for i in range(8)]) for step in range(STEPS)]
    return [[collate(split, eight[:5], 1, "longest"), collate(split, eight[5:], 1, "longest")] for eight in rows]


def run(dropout: float) -> dict[str, list[float]]:
    """Losses, the logits of all texts afterwards, and of every trained tensor its sum, norm and last number."""
    torch.manual_seed(0)
    compute = Compute(torch.device("cpu"), "fp32")  # no autocast: the matmuls are float64 as their operands are
    model = model_of(dropout).train()
    optimizer = make_optimizer(model, TrainConfig(learning_rate=5e-3))
    schedule, scaler = make_schedule(optimizer, STEPS, 5), compute.grad_scaler()
    found = {
        "losses": [
            train_step(model, group, optimizer, schedule, scaler, compute, max_grad_norm=1.0).item()
            for group in groups()
        ]
    }
    everything = collate(texts(), np.arange(TEXTS), 1, "longest")
    with torch.no_grad():
        found["logits"] = model.eval()(everything.input_ids, everything.attention_mask).flatten().tolist()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                flat = parameter.flatten()
                found[name] = [flat.sum().item(), flat.norm().item(), flat[-1].item()]
    return found


def runs() -> dict[str, dict[str, list[float]]]:
    """Both golden runs by name."""
    return {"without dropout": run(0.0), "with dropout": run(0.125)}


if __name__ == "__main__":
    lines = [
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"    {json.dumps(key)}: {json.dumps(values)}" for key, values in one.items())
        + "\n  }"
        for name, one in runs().items()
    ]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(f"wrote {FILE}")
