"""The seam of the methods: a method is a subclass, and everything else works through what it declares."""

import pytest
import torch
from torch import nn

from lora import Adapter, adapters, count_parameters, inject_lora, load_adapter, merge_lora, save_adapter, unload_lora
from lora import config as config_module
from lora.config import METHODS, LoRAConfig
from roberta.config import PUBLISHED
from roberta.model import RobertaForSequenceClassification


class ScaleAndShift(Adapter):
    """y = m * (x W^T + b) + c: a method with other parameters than LoRA's, which changes W and b when merged."""

    method = "scale"
    peft_keys = {"m": "scale.m", "c": "shift"}  # noqa: RUF012

    def __init__(self, base, **_settings):
        super().__init__(base)
        self.m, self.c = self.parameter_like(base.out_features), self.parameter_like(base.out_features)
        nn.init.ones_(self.m), nn.init.zeros_(self.c)

    def settings(self):
        return {}

    def forward(self, x):
        return self.base(x) if self.is_merged else self.m * self.base(x) + self.c

    def merged(self):
        return self.m[:, None] * self.base.weight, self.m * self.base.bias + self.c


@pytest.fixture
def scaled(monkeypatch):
    """`LoRAConfig.wrap` makes the other method; nothing else is told of it."""
    monkeypatch.setattr(config_module, "LoRALinear", ScaleAndShift)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict({"first": nn.Linear(6, 5), "head": nn.Linear(5, 2)}).double()


def logits(model, x):
    return model["head"](torch.tanh(model["first"](x)))


CONFIG = LoRAConfig(target_modules=("first",), modules_to_save=("head",))


@pytest.mark.usefixtures("scaled")
def test_freezing_counting_merging_and_files_ask_the_adapter(tmp_path):
    model = inject_lora(network(), CONFIG)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "first.m", "first.c", "head.weight", "head.bias"
    }  # fmt: skip
    assert count_parameters(model).parts["scale on first"] == (10, 10)
    with torch.no_grad():
        model["first"].m.normal_(), model["first"].c.normal_()
    x = torch.randn(4, 6, dtype=torch.float64)
    expected = logits(model, x)
    save_adapter(model, tmp_path)
    fresh = network()
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh, x), expected)
    bits = [p.detach().clone() for p in model["first"].base.parameters()]
    merge_lora(model)
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.equal(model["first"].base.bias, bits[1])
    model["first"].unmerge()
    assert all(map(torch.equal, model["first"].base.parameters(), bits))
    merge_lora(model)
    unload_lora(model)
    assert not adapters(model) and type(model["first"]) is nn.Linear
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("scaled")
def test_another_method_on_the_model_is_not_overwritten(tmp_path, monkeypatch):
    save_adapter(inject_lora(network(), CONFIG), tmp_path)
    model = network()
    monkeypatch.undo()
    inject_lora(model, CONFIG)
    with pytest.raises(ValueError, match=r"expected .*lora_A.weight, found .*first.scale"):
        load_adapter(model, tmp_path)


def test_a_model_without_adapters_can_not_be_saved(tmp_path):
    with pytest.raises(ValueError, match="carries no adapters"):
        save_adapter(network(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    model = unload_lora(inject_lora(network(), CONFIG))
    with pytest.raises(ValueError, match="carries no adapters"):
        save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("training", [True, False])
def test_adapters_have_the_mode_of_the_layer_that_they_wrap(training):
    model = inject_lora(
        network().train(training), LoRAConfig(dropout=0.5, target_modules=("first",), modules_to_save=())
    )
    assert {module.training for module in model.modules()} == {training}


@pytest.mark.parametrize("kind", METHODS.values(), ids=METHODS)
def test_settings_and_adapters_agree_on_what_can_be_merged(kind):
    with torch.device("meta"):
        model = inject_lora(RobertaForSequenceClassification(PUBLISHED["roberta-base"]), kind())
    assert kind.merges == all(adapter.can_merge for adapter in adapters(model).values())
