"""Every method beside LoRA against peft's: one entry in METHODS and all of this is compared.

Logits, gradients, counts, twenty optimizer steps, merged weights, files in both directions; with dropout where peft's
method has it, both sides drawing the same masks.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F

from lora.adapter import adapters
from lora.config import (
    AdaLoRAConfig,
    IA3Config,
    LayerNormConfig,
    LoRAConfig,
    MethodConfig,
    PromptTuningConfig,
    PTuningConfig,
    VeRAConfig,
    VirtualTokensConfig,
)
from lora.inject import count_parameters, inject_lora, merge_lora, own_parameters, unload_lora
from lora.peft_format import load_adapter, save_adapter
from tests.parity.oracle import assert_close, assert_same, our_copy, ragged_batch, reference_model

TARGETS = ("query", "value", "output.dense")
FEED_FORWARD = ("intermediate.dense", "output.dense")


@dataclass
class Case:
    """Our settings, peft's class and the settings that mean the same there."""

    ours: MethodConfig
    theirs: type
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    """Of the model, where the usual small ones do not fit."""


METHODS = {
    "AdaLoRA": Case(
        AdaLoRAConfig(init_r=4, alpha=8, dropout=0.3, total_step=30, target_modules=TARGETS),
        peft.AdaLoraConfig,
        {"init_r": 4, "lora_alpha": 8, "lora_dropout": 0.3, "total_step": 30, "target_modules": list(TARGETS)},
    ),
    "DoRA": Case(
        LoRAConfig(rank=3, alpha=8, dropout=0.4, target_modules=TARGETS, use_dora=True, bias="lora_only"),
        peft.LoraConfig,
        {
            "r": 3,
            "lora_alpha": 8,
            "lora_dropout": 0.4,
            "use_dora": True,
            "bias": "lora_only",
            "target_modules": list(TARGETS),
        },
    ),
    "VeRA": Case(
        VeRAConfig(rank=5, dropout=0.3, target_modules=TARGETS, projection_prng_key=3, bias="vera_only"),
        peft.VeraConfig,
        {"r": 5, "vera_dropout": 0.3, "target_modules": list(TARGETS), "projection_prng_key": 3, "bias": "vera_only"},
    ),
    "VeRA, only its seed saved": Case(
        VeRAConfig(rank=5, d_initial=0.3, save_projection=False),
        peft.VeraConfig,
        {"r": 5, "d_initial": 0.3, "target_modules": ["query", "key", "value"], "save_projection": False},
    ),
    "IA3": Case(
        IA3Config(),
        peft.IA3Config,
        {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
    ),
    "IA3 on other layers": Case(
        IA3Config(target_modules=("query", *FEED_FORWARD), feedforward_modules=FEED_FORWARD),
        peft.IA3Config,
        {"target_modules": ["query", *FEED_FORWARD], "feedforward_modules": list(FEED_FORWARD)},
    ),
    "LayerNorm of one layer": Case(
        LayerNormConfig(layers_to_transform=(1,)), peft.LNTuningConfig, {"target_modules": r".*layer\.1\..*LayerNorm"}
    ),
    "LayerNorm beside other modules": Case(
        LayerNormConfig(
            exclude_modules=("attention.output.LayerNorm",), modules_to_save=("roberta.embeddings", "classifier")
        ),
        peft.LNTuningConfig,
        {
            "target_modules": ["LayerNorm"],
            "exclude_modules": ["attention.output.LayerNorm"],
            "modules_to_save": ["roberta.embeddings"],
        },
    ),
    "prompt tuning": Case(PromptTuningConfig(num_virtual_tokens=5), peft.PromptTuningConfig, {"num_virtual_tokens": 5}),
    "P-tuning by an MLP": Case(
        PTuningConfig(num_virtual_tokens=5), peft.PromptEncoderConfig, {"num_virtual_tokens": 5}
    ),
    "P-tuning by an LSTM": Case(
        PTuningConfig(
            num_virtual_tokens=4,
            encoder_reparameterization_type="LSTM",
            encoder_hidden_size=7,
            encoder_num_layers=3,
            encoder_dropout=0.3,
        ),
        peft.PromptEncoderConfig,
        {
            "num_virtual_tokens": 4,
            "encoder_reparameterization_type": "LSTM",
            "encoder_hidden_size": 7,
            "encoder_num_layers": 3,
            "encoder_dropout": 0.3,
        },
    ),
}


def our_keys(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trained parameters of ours by their keys in peft's file."""
    wrapped, found = adapters(model), {}
    for name, adapter in wrapped.items():
        for own, parameter in adapter.own_parameters().items():
            found[adapter.config.parameter_key(name, adapter.peft_keys.get(own, own))] = parameter
    config = model.adapter_configs[0]
    targets = {f"{name}.": f"{name}.{config.peft_layer}." for name in config.targets(model)}
    for name, parameter in own_parameters(model, wrapped).items():
        if parameter.requires_grad:
            module, own = name[: name.rindex(".") + 1], name.rpartition(".")[2]
            found[f"{config.key_prefix}{targets.get(module, module)}{own}"] = parameter
    return found


def their_keys(model: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
    """The trained parameters of peft's, by the same keys."""
    renamed = {
        ".modules_to_save.default.": ".",
        "prompt_encoder.default.embedding.weight": "prompt_embeddings",
        "prompt_encoder.default.mlp_head": "mlp",
        "prompt_encoder.default.lstm_head": "lstm",
        ".default": "",
        "magnitude_vector.weight": "magnitude_vector",
    }

    def key(name: str) -> str:
        for theirs, ours in renamed.items():
            name = name.replace(theirs, ours)
        return name

    return {key(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture(params=METHODS)
def pair(request, tmp_path):
    """Ours and peft's with the same random values in every trained tensor, in float64; the plain model; the case."""
    case = METHODS[request.param]
    reference = reference_model(**case.sizes)
    ours = inject_lora(our_copy(reference, tmp_path / "base"), case.ours)
    plain = copy.deepcopy(reference)
    config = case.theirs(task_type="SEQ_CLS", **copy.deepcopy(case.settings))
    theirs = peft.get_peft_model(reference, config).double()
    mine, wanted = our_keys(ours), their_keys(theirs)
    assert set(mine) == set(wanted), sorted(set(mine) ^ set(wanted))[:6]
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            mine[key].copy_(parameter)
    return ours.eval(), theirs.eval(), plain, case


BATCH = ragged_batch([17, 1, 9, 30])
INPUTS = {name: BATCH[name] for name in ("input_ids", "attention_mask")}


def test_logits_gradients_and_counts(pair):
    ours, theirs, _, _ = pair
    wanted = their_keys(theirs)
    for training in (True, False):
        ours.train(training), theirs.train(training)
        torch.manual_seed(2)  # the same masks; all tokens through the last layer, as in peft's model
        logits = ours.classifier(ours.roberta(**INPUTS)[:, 0])
        torch.manual_seed(2)
        expected = theirs(**INPUTS).logits
        assert_close(logits, expected, what=f"logits, training: {training}")
        for values in (logits, expected):
            F.cross_entropy(values, BATCH["labels"]).backward()
        for key, parameter in our_keys(ours).items():
            assert_close(parameter.grad, wanted[key].grad, what=f"gradient of {key}")
    assert_close(ours(**INPUTS), expected, what="logits, the last layer on <s> alone")
    assert_same(count_parameters(ours).trainable, theirs.get_nb_trainable_parameters()[0], "trained parameters")


def test_twenty_steps(pair):
    ours, theirs, _, _ = pair
    for model in (ours, theirs):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for step in range(20):
            batch = ragged_batch([5, 12, 3], seed=step)
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            F.cross_entropy(getattr(logits, "logits", logits), batch["labels"]).backward()
            optimizer.step(), optimizer.zero_grad()
    wanted = their_keys(theirs)
    for key, parameter in our_keys(ours).items():
        assert_close(parameter, wanted[key], 1e-8, key)


def test_merged_weights(pair):
    ours, theirs, _, _ = pair
    if not all(adapter.can_merge for adapter in adapters(ours).values()):
        with pytest.raises(ValueError, match="can't be merged"):
            merge_lora(ours)
        return
    before = ours(**INPUTS)
    merge_lora(ours)
    assert_close(ours(**INPUTS), before, what="logits of the merged model")
    theirs.merge_adapter()  # not merge_and_unload, which fails for IA3 beside a head of several layers
    expected = {name.removeprefix("base_model.model."): value for name, value in theirs.named_parameters()}
    adapted = {name: adapter.base for name, adapter in adapters(ours).items()}
    for name, layer in adapted.items():
        for own, parameter in layer.named_parameters():
            assert_close(parameter, expected[f"{name}.base_layer.{own}"], what=f"{name}.{own}")
    unload_lora(ours)
    assert_close(ours(**INPUTS), before, what="logits of the merged model without adapters")


@pytest.fixture
def float64_prompts(pair):
    """peft reads virtual tokens into a table of torch's default type."""
    torch.set_default_dtype(torch.float64 if isinstance(pair[-1].ours, VirtualTokensConfig) else torch.float32)
    yield
    torch.set_default_dtype(torch.float32)


def test_files_both_ways(pair, float64_prompts, tmp_path):
    ours, theirs, plain, case = pair
    expected = ours(**INPUTS)
    save_adapter(ours, tmp_path / "ours", task_type="SEQ_CLS")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(plain).double(), tmp_path / "ours").double().eval()
    assert_close(read(**INPUTS).logits, expected, what="logits of peft with our file")
    theirs.save_pretrained(tmp_path / "theirs")
    model = our_copy(plain, tmp_path / "again")
    assert type(load_adapter(model, tmp_path / "theirs")[0]) is type(case.ours)
    assert_close(model.eval()(**INPUTS), expected, what="logits of ours with peft's file")
