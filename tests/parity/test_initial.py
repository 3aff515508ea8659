"""Initialisations of LoRA against peft's: A, B and the base's weights, training from there, and the converted file."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from lora.adapter import adapters
from lora.budget import largest_rank
from lora.config import LoRAConfig
from lora.initial import initialize
from lora.inject import inject_lora, unload_lora
from lora.peft_format import load_adapter, save_adapter
from tests.parity import test_methods
from tests.parity.oracle import assert_close, assert_same, our_copy, peft_config, reference_model
from tests.parity.test_methods import INPUTS, our_keys, their_keys

LAYERS = ("query", "attention.output.dense", "intermediate.dense")
CONFIGS = {
    "pissa": LoRAConfig(rank=3, alpha=5, init="pissa", dropout=0.4, target_modules=LAYERS),
    "olora": LoRAConfig(rank=3, alpha=5, init="olora", target_modules=LAYERS, use_rslora=True),
    "pissa with patterns": LoRAConfig(
        rank=2, init="pissa", target_modules=LAYERS, rank_pattern={"query": 4}, alpha_pattern={"dense": 3}
    ),
}


def their_model(model: torch.nn.Module, config: LoRAConfig) -> peft.PeftModel:
    """peft's, with our settings; its name of the default initialisation is True."""
    theirs = peft_config(config)
    theirs.init_lora_weights = True if config.init == "default" else config.init
    return peft.get_peft_model(model, theirs)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "pissa_niter_3", "olora"])
def test_first_values_are_those_of_peft(tmp_path, init):
    """In float32, which peft asks for; each layer from the same state of torch's generator."""
    reference = reference_model()
    config = LoRAConfig(rank=4, alpha=6, init=init, target_modules=LAYERS)
    ours = inject_lora(our_copy(reference, tmp_path, torch.float32), config)
    theirs = peft.get_peft_model(reference, peft_config(config))  # with the default initialisation, so W is W
    for name, layer in adapters(ours).items():
        other = theirs.get_submodule(f"base_model.model.{name}")
        start = {
            "gaussian": lambda layer: layer.reset_lora_parameters("default", init),
            "orthogonal": lambda layer: layer.orthogonal_init("default"),
            "olora": lambda layer: layer.olora_init("default"),
        }.get(init, lambda layer: layer.pissa_init("default", init))
        torch.manual_seed(1)
        start(other)
        torch.manual_seed(1)
        initialize(layer, init)
        assert_same(layer.lora_A, other.lora_A["default"].weight, f"A of {name}")
        assert_same(layer.lora_B, other.lora_B["default"].weight, f"B of {name}")
        W = layer.base.weight
        update = layer.scaling * layer.lora_B @ layer.lora_A
        assert_close(W + layer.delta_weight() - update, other.base_layer.weight, 1e-6, f"base of {name}")
        assert_close(W + layer.delta_weight(), W, 1e-6, f"the start of {name}")


@pytest.fixture(params=CONFIGS)
def pair(request, tmp_path):
    """Ours and peft's, trained from the same start, in float64; the plain model; peft's file of the start."""
    config = CONFIGS[request.param]
    plain = reference_model()
    ours = inject_lora(our_copy(plain, tmp_path / "base", torch.float32), config).double()
    theirs = their_model(copy.deepcopy(plain), config).double()
    mine, wanted = our_keys(ours), their_keys(theirs)
    assert set(mine) == set(wanted)
    for key in (key for key in mine if "lora_" in key):
        assert_same(mine[key], wanted[key], f"first value of {key}")
    with torch.no_grad():
        for name, layer in adapters(ours).items():  # W - s B0 A0, which peft has rounded to float32
            other = theirs.get_submodule(f"base_model.model.{name}")
            other.base_layer.weight.copy_(layer.base.weight - layer.scaling * layer.lora_B @ layer.lora_A)
    theirs.peft_config[
        "default"
    ].init_lora_weights = True  # as peft's guide says, or the file would be decomposed again
    theirs.save_pretrained(tmp_path / "start")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            mine[key].copy_(parameter)
    return ours.eval(), theirs.eval(), plain, tmp_path / "start"


def test_forward_gradients_steps_and_merging(pair):
    ours, theirs, _, _ = pair
    frozen = {name: p.clone() for name, p in ours.named_parameters() if not p.requires_grad}
    test_methods.test_logits_gradients_and_counts(pair)
    test_methods.test_twenty_steps(pair)
    for name, parameter in ours.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, frozen[name]), f"{name} is frozen and moved"
    test_methods.test_merged_weights(pair)


def test_the_file_is_a_lora_of_twice_the_rank_over_the_original_base(pair, tmp_path):
    ours, theirs, plain, start = pair
    expected = ours(**INPUTS)
    save_adapter(ours, tmp_path / "ours", task_type="SEQ_CLS")
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(start))
    files = [load_file(tmp_path / whose / "adapter_model.safetensors") for whose in ("ours", "theirs")]
    for key, tensor in files[1].items():  # A and B alone: peft's conversion drops the head
        assert_close(files[0][key], tensor, what=key)
    settings = [json.loads((tmp_path / whose / "adapter_config.json").read_text()) for whose in ("ours", "theirs")]
    for field in ("r", "rank_pattern", "init_lora_weights", "use_rslora"):
        assert_same(settings[0][field], settings[1][field], field)
    assert settings[0]["lora_alpha"] == pytest.approx(settings[1]["lora_alpha"], rel=1e-15)
    assert settings[0]["alpha_pattern"] == settings[1]["alpha_pattern"]

    read = peft.PeftModel.from_pretrained(copy.deepcopy(plain).double(), tmp_path / "ours").double().eval()
    assert_close(read(**INPUTS).logits, expected, what="logits of peft with our file")
    again = our_copy(plain, tmp_path / "again")
    assert load_adapter(again, tmp_path / "ours")[0].rank == 2 * ours.adapter_configs[0].rank
    assert_close(again(**INPUTS), expected, what="logits of a plain LoRA with the file")
    with torch.no_grad():  # into the model that trains: the best epoch of a run
        for name, tensor in (*ours.named_parameters(), *ours.named_buffers()):
            if "lora_" in name or "initial_" in name or "classifier" in name:
                tensor.add_(1)
    load_adapter(ours, tmp_path / "ours")
    assert_same(ours(**INPUTS), expected, "logits after loading into the same model")
    plain_again = unload_lora(ours).state_dict()
    for name, tensor in our_copy(plain, tmp_path / "base").state_dict().items():
        assert name.startswith("classifier") or name.endswith("bias") or torch.equal(plain_again[name], tensor), name


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"init": "xavier"}, "lora: init is 'xavier'; choose default, gaussian, orthogonal, pissa, pissa_niter_N, ol"),
        ({"init": "pissa_niter_"}, "lora: init is 'pissa_niter_'; choose"),
        ({"init": "orthogonal", "rank": 3}, "lora: init is 'orthogonal', which halves the rank, and 3 is odd"),
        ({"init": "orthogonal", "rank_pattern": {"key": 5}}, "and 5 is odd; choose an even one"),
        ({"init": "olora", "use_dora": True}, "lora: init is 'olora', which use_dora can't be combined with"),
        (
            {"init": "pissa", "rank": 25},
            "init is 'pissa', but roberta.encoder.layer.0.attention.self.query has rank 25",
        ),
    ],
)
def test_bad_settings_are_refused(tmp_path, settings, message):
    model = our_copy(reference_model(), tmp_path)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        inject_lora(model, LoRAConfig(**settings))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_largest_rank_of_a_budget_is_found():
    config = LoRAConfig(init="orthogonal", target_modules=("0",), modules_to_save=())
    assert largest_rank(lambda: torch.nn.Sequential(torch.nn.Linear(9, 7)), config, 16 * 5 + 15) == 5


@pytest.mark.parametrize("rank", range(1, 9))
def test_a_scaling_that_a_file_rounds_is_the_same(tmp_path, rank):
    """alpha / sqrt(r) of PiSSA is written as sqrt(2) alpha and 2r: for some ranks the last bit differs."""
    config = LoRAConfig(
        rank=rank, alpha=8, init="pissa", use_rslora=True, target_modules=("0",), modules_to_save=("1",)
    )
    model = inject_lora(torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.Linear(10, 2)), config)
    save_adapter(model, tmp_path)
    load_adapter(model, tmp_path)
