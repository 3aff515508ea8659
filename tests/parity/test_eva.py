"""EVA against peft's `initialize_lora_eva_weights` with rho = 1: A, logits, training from there, the file."""

import copy
import json
from functools import partial
from itertools import cycle, islice

import peft
import pytest
import torch
from peft.tuners.lora import EvaConfig as TheirEvaConfig
from peft.tuners.lora import initialize_lora_eva_weights
from safetensors.torch import load_file

from lora.adapter import adapters
from lora.budget import largest_rank
from lora.config import LoRAConfig
from lora.eva import EvaConfig, initialize_from_inputs
from lora.inject import inject_lora
from lora.peft_format import load_adapter, save_adapter
from tests.parity import test_methods
from tests.parity.oracle import SMALL, assert_close, assert_same, our_copy, peft_config, reference_model
from tests.parity.test_methods import INPUTS, our_keys, their_keys

LAYERS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
CONFIGS = {
    "all layers": LoRAConfig(rank=3, alpha=5, init="eva", dropout=0.4, target_modules=LAYERS),
    "tau, rank and alpha by layer": LoRAConfig(
        rank=2,
        init="eva",
        target_modules=LAYERS,
        rank_pattern={"intermediate.dense": 4},
        alpha_pattern={"value": 3},
        use_rslora=True,
        eva_config=EvaConfig(tau=0.999),
    ),
    "DoRA": LoRAConfig(rank=3, init="eva", use_dora=True, target_modules=("query", "value")),
}


def some_batches(number=12, seed=3, width=9):
    """Batches with padding; the first of one width, the last with fewer real tokens than components."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(number):
        lengths = torch.randint(3, width + 1, (6,), generator=generator)
        mask = (torch.arange(width) < lengths[:, None]).long()
        ids = torch.randint(3, SMALL["vocab_size"], (6, width), generator=generator)
        found.append({"input_ids": torch.where(mask.bool(), ids, SMALL["pad_token_id"]), "attention_mask": mask})
    few = {"input_ids": torch.tensor([[0, 2]]), "attention_mask": torch.tensor([[1, 0]])}
    return [found[0], few, *found[1:]]


def initialize_ours(model, config, batches, most=1000):
    """Set A from `batches`, repeated as peft repeats them."""
    passes = ((b["attention_mask"].bool(), partial(model.roberta, **b)) for b in islice(cycle(batches), most))
    return initialize_from_inputs(adapters(model), passes, config.eva_config)


def their_model(model, config, batches):
    """peft's, with our settings, after its initialisation."""
    theirs = peft_config(config)
    theirs.init_lora_weights, theirs.use_dora = "eva", config.use_dora
    theirs.eva_config = TheirEvaConfig(rho=config.eva_config.rho, tau=config.eva_config.tau)
    theirs = peft.get_peft_model(model.double(), theirs).double().eval()
    initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    return theirs


@pytest.fixture(params=CONFIGS)
def pair(request, tmp_path):
    """Ours and peft's, from the same batches, in float64; the plain model; the settings."""
    config, plain, batches = CONFIGS[request.param], reference_model(), some_batches()
    ours = inject_lora(our_copy(plain, tmp_path / "base"), config).eval()
    before = torch.get_rng_state()
    used = initialize_ours(ours, config, batches)
    assert torch.equal(torch.get_rng_state(), before), "the decomposition draws from a generator of its own"
    assert used > 2
    return ours, their_model(copy.deepcopy(plain), config, batches), plain, config


def test_first_values_are_those_of_peft(pair):
    ours, theirs, plain, config = pair
    mine, wanted = our_keys(ours), their_keys(theirs)
    assert set(mine) == set(wanted)
    for key in (key for key in mine if "lora_" in key):
        assert_close(mine[key], wanted[key], what=f"first value of {key}")
        assert "lora_A" not in key or mine[key].abs().max() > 0
    for name, layer in adapters(ours).items():
        assert not layer.lora_B.any()
        assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(layer.rank).double(), 1e-5, f"orthonormal rows of {name}")
    assert_same(theirs.peft_config["default"].rank_pattern.keys() != set(), bool(config.rank_pattern), "ranks moved")
    assert_close(ours(**INPUTS), plain.double()(**INPUTS).logits, what="logits at the start")
    assert_close(ours(**INPUTS), theirs(**INPUTS).logits, what="logits")


def test_training_from_there(pair):
    ours = pair[0]
    start = {name: p.detach().clone() for name, p in ours.named_parameters()}
    test_methods.test_logits_gradients_and_counts(pair)
    test_methods.test_twenty_steps(pair)
    for name, parameter in ours.named_parameters():
        moved = not torch.equal(parameter, start[name])
        assert moved == parameter.requires_grad, f"{name} moved: {moved}"


def test_the_file_is_a_plain_lora(pair, tmp_path):
    ours, theirs, plain, _ = pair
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in their_keys(theirs).items():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            our_keys(ours)[key].copy_(parameter)
    expected = ours(**INPUTS)
    assert_close(expected, theirs(**INPUTS).logits, what="logits after a change")
    save_adapter(ours, tmp_path / "ours", task_type="SEQ_CLS")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / whose / "adapter_model.safetensors") for whose in ("ours", "theirs")]
    assert set(files[0]) == set(files[1])
    settings = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (settings["init_lora_weights"], settings["eva_config"]) == (True, None)
    read = peft.PeftModel.from_pretrained(copy.deepcopy(plain).double(), tmp_path / "ours").double().eval()
    assert_close(read(**INPUTS).logits, expected, what="logits of peft with our file")
    for whose in ("ours", "theirs"):
        again = our_copy(plain, tmp_path / "again")
        load_adapter(again, tmp_path / whose)
        assert_close(again(**INPUTS), expected, what=f"logits with the file of {whose}")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"eva_config": {"rho": 2.0}}, "lora: eva_config.rho is 2.0; ranks are not redistributed, so it must be 1"),
        ({"eva_config": {"tau": 1.5}}, "lora: eva_config.tau is 1.5; it is a cosine similarity in"),
        ({"init": "gaussian", "eva_config": {"tau": 0.9}}, "lora: eva_config has no effect, as init is 'gaussian'"),
        ({"rank": 25}, "init is 'eva', but roberta.encoder.layer.0.attention.self.query has rank 25; it can be 24"),
        ({"rank_pattern": {"key": 5}}, "query and .*key and .*value have equal inputs; give them one rank"),
        ({"target_modules": r"classifier\.dense", "modules_to_save": ()}, "classifier.dense has no inputs"),
        ({"eva_config": {"tau": 1.0}}, "query has not converged in 3 batches; lower eva_config.tau"),
    ],
)
def test_bad_settings_are_refused(tmp_path, settings, message):
    model = our_copy(reference_model(), tmp_path)
    with pytest.raises(ValueError, match=message):  # from the settings, the adapters or the inputs
        config = LoRAConfig(**{"init": "eva"} | settings | {"eva_config": EvaConfig(**settings.get("eva_config", {}))})
        inject_lora(model, config)
        start = {name: p.clone() for name, p in model.named_parameters()}
        try:
            initialize_ours(model, config, some_batches(3)[:3], most=3)
        finally:
            assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())


def test_inputs_of_another_shape_are_refused(tmp_path):
    """The whole model computes the last layer for <s> alone."""
    config = LoRAConfig(init="eva")
    model = inject_lora(our_copy(reference_model(), tmp_path), config)
    passes = [(b["attention_mask"].bool(), partial(model, **b)) for b in some_batches()]
    with pytest.raises(ValueError, match="layer.1.attention.self.query has no input for each token"):
        initialize_from_inputs(adapters(model), passes, config.eva_config)
    assert not any(layer._forward_pre_hooks for layer in adapters(model).values())


def test_the_largest_rank_of_a_budget_is_found():
    config = LoRAConfig(init="eva", eva_config=EvaConfig(tau=0.9), target_modules=("0",), modules_to_save=())
    assert largest_rank(lambda: torch.nn.Sequential(torch.nn.Linear(9, 7)), config, 16 * 5 + 15) == 5


def test_the_decomposition_is_not_in_16_bits():
    """Under autocast, where the encoder's matmuls are."""
    found, config = [], LoRAConfig(rank=3, init="eva", target_modules=("0",), modules_to_save=())
    inputs = torch.randn(20, 6, 9, 24, generator=torch.Generator().manual_seed(1)) * torch.arange(24).exp2()
    for enabled in (False, True):
        model = inject_lora(torch.nn.Sequential(torch.nn.Linear(24, 5)), config)
        batches = [(torch.ones(6, 9, dtype=torch.bool), partial(model, x)) for x in inputs]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            initialize_from_inputs(adapters(model), batches, config.eva_config)
        found.append(model[0].lora_A)
    assert_same(*found, "A")
