"""Frozen weights in the compute type, and compiled steps, give the same numbers."""

import copy

import pytest
import torch
import torch.nn.functional as F

from lora.config import LoRAConfig
from lora.inject import inject_lora
from roberta.config import RobertaConfig
from roberta.model import RobertaForSequenceClassification
from training.config import TrainConfig
from training.errors import ConfigError
from training.precision import Compute, choose_compute

CONFIG = RobertaConfig(
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=34,
    label_names=("a", "b", "c"),
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
)
LORA = [
    LoRAConfig(rank=3, target_modules=("query", "value"), bias="lora_only"),
    LoRAConfig(rank=3, target_modules=("key", "intermediate.dense", "output.dense"), dropout=0.2, bias="all"),
    LoRAConfig(rank=3, target_modules=("query", "key", "value"), layers_to_transform=(1,)),
]


def adapted(lora):
    torch.manual_seed(0)
    model = inject_lora(RobertaForSequenceClassification(CONFIG), lora).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def logits_and_gradients(model, compute, calls=1):
    ids = torch.randint(2, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    for _ in range(calls):
        torch.manual_seed(2)
        model.zero_grad()
        with compute.autocast():
            logits = model(ids, torch.ones_like(ids, dtype=torch.bool))
        F.cross_entropy(logits.float(), torch.tensor([0, 1, 2, 0])).backward()
    gradients = {
        name.removeprefix("_orig_mod."): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return logits, gradients


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("lora", LORA)
def test_frozen_weights_cast_once_give_the_bits_of_weights_cast_each_time(precision, lora):
    compute = Compute(torch.device("cpu"), precision)
    model = adapted(lora)
    expected_logits, expected = logits_and_gradients(model, compute)
    cast = copy.deepcopy(model)
    compute.cast_frozen(cast.roberta)
    logits, gradients = logits_and_gradients(cast, compute)
    assert torch.equal(logits, expected_logits)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32 and torch.equal(gradient, expected[name]), name
    for name, parameter in cast.named_parameters():
        frozen_matmul = not parameter.requires_grad and name.startswith("roberta.encoder") and "LayerNorm" not in name
        assert parameter.dtype == (compute.dtype if frozen_matmul else torch.float32), name


def test_nothing_is_cast_in_float32():
    model = adapted(LORA[0])
    Compute(torch.device("cpu"), "fp32").cast_frozen(model.roberta)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_compiled_model_is_the_same_function_of_the_same_parameters(monkeypatch):
    # The model is traced and differentiated as usual; only torch's code generator, which takes a minute, is replaced.
    compiler = torch.compile
    seen = {}

    def traced(model, **options):
        seen.update(options)
        return compiler(model, backend="aot_eager", dynamic=options["dynamic"])

    monkeypatch.setattr(torch, "compile", traced)
    compute = Compute(torch.device("cpu"), "fp32")
    model = adapted(LORA[2]).eval()  # masks are drawn outside the graph, in another order
    expected_logits, expected = logits_and_gradients(model, compute)
    compiled = compute.compiled(model, "on")
    logits, gradients = logits_and_gradients(compiled, compute, calls=2)
    torch.testing.assert_close(logits, expected_logits)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name])
    assert [id(p) for p in compiled.parameters()] == [id(p) for p in model.parameters()]
    assert seen == {"dynamic": False, "mode": "default"}
    assert compute.compiled(model, "off") is model


def test_cuda_graphs_need_a_gpu():
    with pytest.raises(ConfigError, match="cuda-graphs"):
        choose_compute(TrainConfig(device="cpu", compile="cuda-graphs"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("how", ["on", "cuda-graphs"])
def test_compiled_steps_on_a_gpu(how):
    compute = Compute(torch.device("cuda"), "fp32")
    model = adapted(LORA[2]).eval().cuda()
    ids = torch.randint(2, 50, (4, 9), device="cuda")
    mask = torch.ones_like(ids, dtype=torch.bool)
    expected = model(ids, mask).detach().clone()
    compiled = compute.compiled(model, how)
    for _ in range(4):
        logits = compiled(ids, mask).clone()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
