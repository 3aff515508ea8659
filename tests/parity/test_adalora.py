"""AdaLoRA's training against peft's: penalty, importance, budget and pruning in `train_step`; files after pruning."""

import copy
import dataclasses
import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from lora.adapter import adapters
from lora.config import AdaLoRAConfig
from lora.errors import LoRAError
from lora.inject import inject_lora
from lora.peft_format import load_adapter, save_adapter
from tests.parity.oracle import assert_close, assert_same, our_copy, ragged_batch, reference_model
from tests.parity.test_methods import our_keys, their_keys
from tests.parity.test_training import CLIP, CPU, RATE, _Overflowing, encoded_texts, groups, one_batch, same, state_of
from train import make_optimizer, make_schedule, train_step
from training.config import TrainConfig, parse_config

TARGETS = ("query", "value", "output.dense")
STEPS = 18
CONFIG = AdaLoRAConfig(
    init_r=4, target_r=1, tinit=2, tfinal=4, beta1=0.7, beta2=0.6, total_step=STEPS, target_modules=TARGETS
)
BATCH = ragged_batch([17, 1, 9, 30])
INPUTS = {name: BATCH[name] for name in ("input_ids", "attention_mask")}


def made(folder, config=CONFIG):
    """Ours and peft's with the same random values in every trained tensor; the plain model."""
    reference = reference_model()
    ours = inject_lora(our_copy(reference, folder / "base"), config).train()
    plain = copy.deepcopy(reference)
    names = "init_r target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step".split()
    settings = {name: getattr(config, name) for name in names} | {"lora_alpha": config.alpha}
    theirs = peft.AdaLoraConfig(task_type="SEQ_CLS", target_modules=list(TARGETS), **settings)
    theirs = peft.get_peft_model(reference, theirs).double().train()
    theirs.base_model.rankallocator.reset_ipt = lambda: None  # keeps the last importance, to compare it
    generator, mine = torch.Generator().manual_seed(7), our_keys(ours)
    with torch.no_grad():
        for key, parameter in their_keys(theirs).items():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
            mine[key].copy_(parameter)
    return ours, theirs, plain


def trainer(model):
    """Optimizer and schedule."""
    optimizer = make_optimizer(model, TrainConfig(learning_rate=RATE))
    return optimizer, make_schedule(optimizer, STEPS, 3)


def trained(folder, steps, config=CONFIG):
    """What `made` gives, after the same optimizer steps, and the losses of both."""
    ours, theirs, plain = made(folder, config)
    losses = [], []
    (optimizer, schedule), (their_optimizer, their_schedule) = trainer(ours), trainer(theirs)
    for step, group in enumerate(groups(encoded_texts())[:steps]):
        losses[0].append(train_step(ours, group, optimizer, schedule, CPU.grad_scaler(), CPU, CLIP))
        ids, mask, labels = one_batch(group)
        loss = theirs(input_ids=ids, attention_mask=mask, labels=labels).loss
        losses[1].append(loss.detach())
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(theirs.parameters(), CLIP) > CLIP
        their_optimizer.step()
        theirs.base_model.update_and_allocate(step)
        their_optimizer.zero_grad()
        their_schedule.step()
    return ours.eval(), theirs.eval(), plain, [torch.stack(values) for values in losses]


CASES = {
    "to the end": (STEPS, dataclasses.replace(CONFIG, deltaT=3)),  # the last pruning is not at a third step
    "while the budget falls": (9, CONFIG),
    "without a last phase": (STEPS, dataclasses.replace(CONFIG, tfinal=0, target_r=3)),
    "every third step": (13, dataclasses.replace(CONFIG, deltaT=3, tinit=0)),
}


@pytest.fixture(params=CASES)
def pair(request, tmp_path):
    return trained(tmp_path, *CASES[request.param])


def test_training_gives_the_same_losses_weights_importance_and_ranks(pair):
    ours, theirs, _, losses = pair
    assert_close(*losses, 1e-8, "losses")
    wanted, wrapped = their_keys(theirs), adapters(ours)
    for key, parameter in our_keys(ours).items():
        assert_close(parameter, wanted[key], 1e-8, key)
    kept = {f"{name}.lora_E.default": one.kept.tolist() for name, one in wrapped.items()}
    assert_same(kept, theirs.peft_config["default"].rank_pattern, "ranks")
    left = [sum(flags) for flags in kept.values()]
    assert 0 < sum(left) < 4 * len(left) and (sum(left) > len(left) or min(left) == 0)  # a layer without triplets too
    allocator = theirs.base_model.rankallocator
    for kind, expected in (("sensitivity", allocator.exp_avg_ipt), ("uncertainty", allocator.exp_avg_unc)):
        for name, adapter in wrapped.items():
            E, A, B = (expected[f"{name}.lora_{letter}.default"] for letter in "EAB")
            assert_close(getattr(adapter, kind), torch.cat([E, A, B.T], dim=1), 1e-8, f"{kind} of {name}")


def test_files_after_pruning_go_both_ways(pair, tmp_path):
    ours, theirs, plain, _ = pair
    expected = ours(**INPUTS)
    save_adapter(ours, tmp_path / "ours", task_type="SEQ_CLS")
    theirs.save_pretrained(tmp_path / "theirs")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(plain).double(), tmp_path / "ours").eval()
    assert_close(read(**INPUTS).logits, expected, what="logits of peft with our file")
    model = our_copy(plain, tmp_path / "again")
    load_adapter(model, tmp_path / "theirs")
    assert_close(model(**INPUTS), expected, 1e-8, "logits of ours with peft's file")
    save_adapter(model, tmp_path / "second", task_type="SEQ_CLS")
    files = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs", "second")}
    patterns = [json.loads((tmp_path / name / "adapter_config.json").read_text())["rank_pattern"] for name in files]
    assert_same(patterns, [patterns[1]] * 3, "rank_pattern")
    for name in ("ours", "second"):
        assert files[name].keys() == files["theirs"].keys()
        for key, tensor in files["theirs"].items():
            assert files[name][key].shape == tensor.shape
            if tensor.numel():
                assert_close(files[name][key], tensor, 1e-8, key)


def test_between_two_prunings_the_file_computes_what_the_model_does(tmp_path):
    """Triplets that have grown again since the last pruning are in our file; peft's lacks them."""
    ours, _, plain, _ = trained(tmp_path, 12, CASES["every third step"][1])
    save_adapter(ours, tmp_path / "ours", task_type="SEQ_CLS")
    read = peft.PeftModel.from_pretrained(copy.deepcopy(plain).double(), tmp_path / "ours").eval()
    assert_close(read(**INPUTS).logits, ours(**INPUTS), what="logits of peft with our file")


def test_a_file_is_loaded_into_a_model_with_other_ranks(tmp_path):
    """As at the end of a run whose best epoch came early."""
    early, late = (trained(tmp_path, steps)[0] for steps in (9, STEPS))
    expected = {"early": early(**INPUTS), "late": late(**INPUTS)}
    for name, model in (("early", early), ("late", late)):
        save_adapter(model, tmp_path / name)
    for name, model in (("late", early), ("early", late)):
        load_adapter(model, tmp_path / name)
        assert_close(model(**INPUTS), expected[name], what=f"logits with the {name} file")
        save_adapter(model, tmp_path / "again")
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "again" / file).read_bytes() == (tmp_path / name / file).read_bytes()


def test_a_step_that_overflows_allocates_nothing(tmp_path):
    ours, *_ = made(tmp_path)
    model = _Overflowing(ours.float())
    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0**10)
    optimizer, schedule = trainer(model)
    states = []
    for step, group in enumerate(groups(encoded_texts())[:8]):
        model.overflow = step == 6
        states.append((*state_of(model, optimizer, schedule), [buffer.clone() for buffer in ours.buffers()]))
        train_step(model, group, optimizer, schedule, scaler, CPU, CLIP)
    assert schedule.last_epoch == 7 and scaler.get_scale() == 2.0**9
    assert same(states[6], states[7]) and not same(states[5][-1], states[6][-1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_r": 0}, "init_r is 0; it is an integer, 1 or more"),
        ({"target_r": 2.5}, "target_r is 2.5; it is an integer, 1 or more"),
        ({"deltaT": 0}, "deltaT is 0; it is an integer, 1 or more"),
        ({"tfinal": -1}, "tfinal is -1; it is an integer, 0 or more"),
        ({"total_step": 0}, "total_step is 0; it is an integer, 1 or more"),
        ({"alpha": 0.0}, "alpha is 0.0; it must be above 0"),
        ({"dropout": 1.0}, "dropout is 1.0; it is a probability"),
        ({"beta1": 1.0}, "beta1 is 1.0; it must be between 0 and 1"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight is -0.1; it must be 0 or more"),
        ({"total_step": 30, "tinit": 10, "tfinal": 20}, "tinit is 10 and tfinal 20: of 30 steps they leave none"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings, message):
    with pytest.raises(LoRAError, match=f"^adalora: {message}"):
        AdaLoRAConfig(**settings)


def test_what_does_not_fit_a_run_or_a_model_is_refused(tmp_path):
    def run(**settings):
        return parse_config({"adalora": settings}, "run.toml").methods[0].for_run(50)

    assert (run().total_step, run(total_step=40).total_step) == (50, 40)
    for settings, message in [
        ({"tinit": 20, "tfinal": 30}, "of 50 steps they leave none"),
        ({"init_r": 4}, "target_r is 8, but init_r is 4"),
        ({"kept": {"query": [True]}}, "kept is given"),
    ]:
        with pytest.raises(LoRAError, match=f"^adalora: .*{message}"):
            run(**settings)
    with pytest.raises(LoRAError, match=r"^adalora: init_r is 25, but .*query has 24 singular values"):
        inject_lora(our_copy(reference_model(), tmp_path), dataclasses.replace(CONFIG, init_r=25))
    model = inject_lora(our_copy(reference_model(), tmp_path), dataclasses.replace(CONFIG, total_step=None))
    with pytest.raises(LoRAError, match=r"^adalora: total_step is missing"):
        save_adapter(model, tmp_path / "adapter")


def changed_file(folder, changes):
    """The folder of an adapter with these fields in its settings."""
    save_adapter(inject_lora(our_copy(reference_model(), folder), CONFIG), folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path.parent


QUERY = "roberta.encoder.layer.0.attention.self.query.lora_E"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "all"}, "bias"),
        ({"rank_pattern": {"a": 3}}, "rank_pattern is .* it must be lists of true and false by name"),
        ({"rank_pattern": {QUERY: [True]}}, "1 entries, but init_r is 4"),
        ({"rank_pattern": {QUERY: [True] * 3 + [False]}}, "wrong shape"),
        ({"init_r": 10**9}, "query has 24 singular values"),
    ],
)
def test_files_are_refused_by_what_is_wrong_with_them(changes, message, tmp_path):
    with pytest.raises(LoRAError, match=message):
        load_adapter(our_copy(reference_model(), tmp_path), changed_file(tmp_path, changes))


def test_what_a_file_says_without_effect_is_ignored_or_warned_of(tmp_path):
    folder = changed_file(tmp_path, {"r": 77, "rank_pattern": {"another.lora_E": [True] * 4}})  # peft ignores r
    with pytest.warns(UserWarning, match="rank_pattern 'another.lora_E' matches no adapted layer"):
        load_adapter(our_copy(reference_model(), tmp_path), folder)
