"""Methods side by side: the forward pass of each combination against one written by hand, and their files."""

import math

import peft
import pytest
import torch
import torch.nn.functional as F

from lora.adapter import adapters
from lora.config import BitFitConfig, BottleneckConfig, LoRAConfig, PromptTuningConfig
from lora.inject import count_parameters, inject_lora
from lora.peft_format import load_adapter, save_adapter
from tests.parity.oracle import assert_close, assert_same, our_copy, ragged_batch, reference_model

LORA = LoRAConfig(rank=3, alpha=6, target_modules=("query", "value", "output.dense"))
PROMPT, BOTTLENECK = PromptTuningConfig(num_virtual_tokens=4), BottleneckConfig(reduction_factor=4)
HYBRIDS = {
    "LoRA + prompt": (LORA, PROMPT),
    "LoRA + bottleneck": (LORA, BOTTLENECK),
    "LoRA + BitFit": (LORA, BitFitConfig()),
    "LoRA + prompt + bottleneck + BitFit": (LORA, PROMPT, BOTTLENECK, BitFitConfig()),
}
BATCH = ragged_batch([17, 1, 9])
INPUTS = {name: BATCH[name] for name in ("input_ids", "attention_mask")}


def by_hand(model: torch.nn.Module, heads: int = 4) -> torch.Tensor:
    """Logits from the parameters alone: RoBERTa's formulas with those of each method written into them."""
    p, wrapped = {}, adapters(model)
    for name, value in model.named_parameters():
        p[name.replace(".base.", ".")] = value

    def linear(x, name):
        y = x @ p[f"{name}.weight"].T + p[f"{name}.bias"]
        if f"{name}.lora_A" in p:
            y = y + (6 / 3) * x @ p[f"{name}.lora_A"].T @ p[f"{name}.lora_B"].T
        return y

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    ids, mask = INPUTS["input_ids"], INPUTS["attention_mask"]
    table = "roberta.embeddings"
    x = p[f"{table}.word_embeddings.weight"][ids]
    if "prompt_tuning" in {adapter.config.table for adapter in wrapped.values()}:
        prompt = p[f"{table}.word_embeddings.prompt"]
        x = torch.cat([prompt.expand(len(ids), -1, -1), x], dim=1)
        mask = torch.cat([torch.ones(len(ids), len(prompt), dtype=mask.dtype), mask], dim=1)
    positions = mask.cumsum(1) * mask + 1
    x = x + p[f"{table}.position_embeddings.weight"][positions] + p[f"{table}.token_type_embeddings.weight"][0]
    x = norm(x, f"{table}.LayerNorm")
    for number in range(2):
        layer = f"roberta.encoder.layer.{number}"
        q, k, v = (linear(x, f"{layer}.attention.self.{part}") for part in ("query", "key", "value"))
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        attended = torch.softmax(scores.masked_fill(mask[:, None, None, :] == 0, -math.inf), -1) @ v
        h = linear(attended.transpose(1, 2).flatten(2), f"{layer}.attention.output.dense")
        x = norm(x + h, f"{layer}.attention.output.LayerNorm")
        wide = linear(x, f"{layer}.intermediate.dense")
        h = linear(wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2))), f"{layer}.output.dense")
        if f"{layer}.output.W_down" in p:
            z = norm(x + h, f"{layer}.output.LayerNorm")
            down = z @ p[f"{layer}.output.W_down"].T + p[f"{layer}.output.b_down"]
            h = h + down.clamp(min=0) @ p[f"{layer}.output.W_up"].T + p[f"{layer}.output.b_up"]
        x = norm(x + h, f"{layer}.output.LayerNorm")
    return linear(torch.tanh(linear(x[:, 0], "classifier.dense")), "classifier.out_proj")


def randomized(folder, configs):
    model = inject_lora(our_copy(reference_model(), folder), *configs)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval()


@pytest.mark.parametrize("configs", HYBRIDS.values(), ids=HYBRIDS)
def test_a_combination_is_its_formulas_in_one_forward_pass(tmp_path, configs):
    model = randomized(tmp_path, configs)
    logits, expected = model(**INPUTS), by_hand(model)
    assert_close(logits, expected, what="logits")
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    gradients = torch.autograd.grad(F.cross_entropy(logits, BATCH["labels"]), trained.values())
    wanted = torch.autograd.grad(F.cross_entropy(expected, BATCH["labels"]), trained.values())
    for name, ours, theirs in zip(trained, gradients, wanted, strict=True):
        if not name.endswith("key.bias"):  # cancels in the softmax: its gradient is rounding alone
            assert_close(ours, theirs, what=name)
    alone = {
        name
        for config in configs
        for name, value in inject_lora(our_copy(reference_model(), tmp_path), config).named_parameters()
        if value.requires_grad
    }
    assert_same(len(trained), len(alone), "trained tensors of all, and of each alone")
    assert count_parameters(model).trainable == sum(value.numel() for value in trained.values())


@pytest.mark.parametrize("configs", HYBRIDS.values(), ids=HYBRIDS)
def test_a_combination_has_a_folder_for_each_method(tmp_path, configs):
    model = randomized(tmp_path / "base", configs)
    save_adapter(model, tmp_path / "adapter", task_type="SEQ_CLS")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {config.table for config in configs}
    again = our_copy(reference_model(), tmp_path / "again")
    assert {config.table for config in load_adapter(again, tmp_path / "adapter")} == {
        config.table for config in configs
    }
    assert_close(again.eval()(**INPUTS), model(**INPUTS), what="logits of the folders")
    opened = peft.PeftModel.from_pretrained(reference_model().double(), tmp_path / "adapter" / "lora").double().eval()
    alone = our_copy(reference_model(), tmp_path / "alone")
    load_adapter(alone, tmp_path / "adapter" / "lora")
    assert_close(alone.eval()(**INPUTS), opened(**INPUTS).logits, what="LoRA's folder alone, in peft")
