"""Methods that train parameters of the model itself, against transformers with the same parameters trainable.

peft has neither BitFit nor full fine-tuning. LayerNorm tuning, which it has, is in test_methods.py.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from lora.config import BitFitConfig, FullConfig, LoRAConfig
from lora.inject import count_parameters, inject_lora, merge_lora, unload_lora
from lora.peft_format import load_adapter, save_adapter
from tests.parity.oracle import assert_close, assert_same, our_copy, ragged_batch, reference_model

LAST = "roberta.encoder.layer.1."
METHODS = {
    "BitFit": (BitFitConfig(), lambda name: name.startswith("classifier.") or name.endswith(".bias")),
    "full": (FullConfig(), lambda name: True),
    "head": (FullConfig(modules_to_save=("classifier",)), lambda name: name.startswith("classifier.")),
    "last layer": (
        FullConfig(modules_to_save=("layer.1", "out_proj")),
        lambda n: n.startswith((LAST, "classifier.out")),
    ),
}
BATCH = ragged_batch([17, 1, 9, 30])
INPUTS = {name: BATCH[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture(params=METHODS)
def pair(request, tmp_path):
    """Ours and transformers' with the same trainable parameters, in float64; ours as it was; the settings."""
    config, trains = METHODS[request.param]
    theirs = reference_model().double()
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(trains(name))
    ours = our_copy(theirs, tmp_path / "base")
    return inject_lora(ours, config), theirs, our_copy(theirs, tmp_path / "again"), config


def test_logits_gradients_counts_and_twenty_steps(pair):
    ours, theirs, plain, _ = pair
    wanted = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    mine = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert_same(set(mine), set(wanted), "trained parameters")
    assert_same(count_parameters(ours).trainable, sum(p.numel() for p in wanted.values()), "their count")
    optimizers = [torch.optim.AdamW(trained.values(), lr=1e-2) for trained in (mine, wanted)]
    for step in range(20):
        batch = ragged_batch([5, 12, 3], seed=step)
        logits = [model(batch["input_ids"], batch["attention_mask"]) for model in (ours, theirs)]
        logits[1] = logits[1].logits
        assert_close(*logits, tolerance=1e-8, what=f"logits of step {step}")
        for values in logits:
            F.cross_entropy(values, batch["labels"]).backward()
        for name, parameter in mine.items() if step == 0 else ():
            if not name.endswith("key.bias"):  # its gradient is rounding alone, which Adam scales up to full steps
                assert_close(parameter.grad, wanted[name].grad, what=f"gradient of {name}")
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
    for name, parameter in mine.items():
        if not name.endswith("key.bias"):
            assert_close(parameter, wanted[name], 1e-8, name)
    for name, parameter in plain.named_parameters():
        if name not in mine:
            assert_same(ours.get_parameter(name), parameter, f"{name} is frozen and moved")


def test_file_merge_and_unload(pair, tmp_path):
    ours, _, plain, config = pair
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    expected = ours(**INPUTS)
    save_adapter(ours, tmp_path / "file", also=("classifier",))  # as of a new head, trained or not
    with safe_open(tmp_path / "file/adapter_model.safetensors", "pt") as file:
        held = {key.removeprefix("base_model.model.") for key in file.keys()}
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert held == trained | {name for name, _ in ours.named_parameters() if name.startswith("classifier.")}
    other = copy.deepcopy(plain)
    read = load_adapter(plain, tmp_path / "file")
    assert type(read[0]) is type(config)
    assert_same(plain(**INPUTS), expected, "logits with the file")
    assert trained <= {name for name, p in plain.named_parameters() if p.requires_grad}
    load_adapter(ours, tmp_path / "file")  # into a model with the same method: the best epoch of a run
    assert_same(ours(**INPUTS), expected, "logits after loading again")
    with pytest.raises(ValueError, match="carries adapters already"):
        inject_lora(ours, LoRAConfig())

    for method in (BitFitConfig(), FullConfig(modules_to_save=("classifier", "embeddings")), LoRAConfig(rank=1)):
        carrying = inject_lora(copy.deepcopy(other), method)
        before = copy.deepcopy(carrying.state_dict())
        if type(method) is type(config) and {n for n, p in carrying.named_parameters() if p.requires_grad} <= held:
            load_adapter(carrying, tmp_path / "file")
        else:
            with pytest.raises(ValueError, match="load it afresh"):
                load_adapter(carrying, tmp_path / "file")
            assert all(torch.equal(value, before[name]) for name, value in carrying.state_dict().items())

    merge_lora(ours)
    assert_same(unload_lora(ours)(**INPUTS), expected, "logits of the merged model")
    inject_lora(ours, LoRAConfig())  # a plain model again


@pytest.mark.parametrize(
    "made, message",
    [
        (lambda: FullConfig(modules_to_save=()), "full: modules_to_save is empty; name at least one module"),
        (lambda: FullConfig(modules_to_save=("bert",)), "full: modules_to_save: 'bert' matches no module"),
        (lambda: BitFitConfig(modules_to_save=("score",)), "bitfit: modules_to_save: 'score' matches no module"),
    ],
)
def test_bad_settings_are_refused(tmp_path, made, message):
    model = our_copy(reference_model(), tmp_path)
    with pytest.raises(ValueError, match=message):
        inject_lora(model, made())
    assert all(parameter.requires_grad for parameter in model.parameters()), "the model was changed"
