"""A step on a device other than the CPU creates every tensor on that device.

The meta device has no memory and needs no hardware, and mixing it with CPU tensors is an error.
"""

import contextlib

import pytest
import torch

from data.batching import Batch
from lora.config import LoRAConfig
from lora.inject import inject_lora
from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification
from train import make_schedule, train_step
from training.precision import Compute

SIZES = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}


class OnMeta(Compute):
    """As for a GPU in fp32; torch has no autocast for the meta device."""

    def autocast(self):
        return contextlib.nullcontext()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_forward_backward_and_step_create_nothing_on_the_cpu(dropout):
    probabilities = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout)
    with torch.device("meta"):
        model = RobertaForSequenceClassification(RobertaConfig(**SIZES, **probabilities)).train()
    inject_lora(model, LoRAConfig(rank=2, dropout=dropout, bias="all"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, foreach=False)
    schedule = make_schedule(optimizer, 10, 0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    ids = torch.zeros(3, 5, dtype=torch.int64)  # batches come from the CPU
    batch = Batch(ids, ids.bool(), torch.zeros(3, dtype=torch.int64), torch.ones(3), torch.arange(3), 15, 3.0)
    gradients = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient, name=name: gradients.update({name: gradient}))
    loss = train_step(model, [batch, batch], optimizer, schedule, scaler, OnMeta(torch.device("meta"), "fp32"), 1.0)
    assert loss.device.type == "meta"
    assert gradients.keys() == trained and {gradient.device.type for gradient in gradients.values()} == {"meta"}
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert moments and {moment.device.type for moment in moments} == {"meta"}
