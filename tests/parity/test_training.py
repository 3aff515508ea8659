"""The training loop against a plain loop over transformers + peft: same losses, same final weights; fp16's scaler."""

import copy
import dataclasses

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft.optimizers import create_loraplus_optimizer

from data.batching import EncodedSplit, collate
from lora.config import LoRAConfig
from tests.parity.oracle import adapted_pair, assert_close, assert_same, our_name
from train import make_optimizer, make_schedule, train_step
from training.config import TrainConfig
from training.precision import Compute

CPU = Compute(torch.device("cpu"), "fp32")
STEPS, WARMUP, RATE, CLIP = 50, 5, 5e-3, 1.0
CONFIG = LoRAConfig(rank=4, alpha=8, bias="lora_only", target_modules=("query", "key", "value", "output.dense"))


def encoded_texts(rows: int = 64, seed: int = 0) -> EncodedSplit:
    """Random texts of 1 to 20 tokens that can be learnt: the label is the first token modulo 3."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 21, rows)
    offsets = np.concatenate([[0], lengths.cumsum()])
    ids = random.integers(3, 97, offsets[-1]).astype(np.int32)
    return EncodedSplit(ids, offsets, ids[offsets[:-1]].astype(np.int64) % 3, 20, 0)


def groups(split: EncodedSplit) -> list[list]:
    """STEPS groups of three ragged micro-batches of 5, 3 and 1 texts."""
    random = np.random.default_rng(1)
    made = []
    for _ in range(STEPS):
        rows = random.choice(len(split.labels), 9, replace=False)
        made.append([collate(split, part, 1, "longest") for part in np.split(rows, [5, 8])])
    return made


def one_batch(group: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and labels of several batches as one."""
    width = max(batch.input_ids.shape[1] for batch in group)
    ids = torch.cat([F.pad(batch.input_ids, (0, width - batch.input_ids.shape[1]), value=1) for batch in group])
    mask = torch.cat([F.pad(b.attention_mask, (0, width - b.attention_mask.shape[1])) for b in group])
    return ids, mask, torch.cat([batch.labels for batch in group])


def reference_losses(model: peft.PeftModel, batches: list[list], decay: bool) -> list[float]:
    """The same training written over transformers and peft: one padded batch of all nine texts a step."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    spared = {name for name in trained if name.endswith("bias") and not decay}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in trained.items() if name not in spared], "weight_decay": 0.01},
            {"params": [trained[name] for name in sorted(spared)], "weight_decay": 0.0},
        ],
        lr=RATE,
    )
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    losses = []
    for group in batches:
        # Accumulation must equal one large batch, so the reference takes it as one: mean loss over all texts.
        ids, mask, labels = one_batch(group)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("decay", [False, True], ids=["spared biases", "all decayed"])
def test_fifty_steps_give_the_same_losses_and_weights(tmp_path, decay):
    ours, theirs = adapted_pair(tmp_path, CONFIG)
    frozen = {name: p.detach().clone() for name, p in ours.named_parameters() if not p.requires_grad}
    # Split so that every trained tensor moves, the clipping bites and the steps are really small and large.
    batches = groups(encoded_texts())
    expected = reference_losses(theirs.train(), batches, decay)

    optimizer = make_optimizer(ours, TrainConfig(learning_rate=RATE, decay_bias_and_norm=decay))
    schedule, scaler = make_schedule(optimizer, STEPS, WARMUP), CPU.grad_scaler()
    start = {name: p.detach().clone() for name, p in ours.named_parameters() if p.requires_grad}
    ours.train()
    losses = [train_step(ours, group, optimizer, schedule, scaler, CPU, CLIP).item() for group in batches]

    assert_close(torch.tensor(losses, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), 1e-8, "losses")
    final = {our_name(name): p for name, p in theirs.named_parameters() if our_name(name)}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert not torch.equal(parameter, start[name]), f"{name} did not move"
            if not name.endswith("key.base.bias"):  # its gradient is rounding alone, which Adam scales up to full steps
                assert_close(parameter, final[name], 1e-8, name)
        else:
            assert_same(parameter, frozen[name], f"{name} is frozen and moved")
    assert np.mean(losses[-10:]) < np.mean(losses[:10])


def test_twenty_steps_of_lora_plus_are_those_of_peft(tmp_path):
    """Its groups too: B and every vector at 16 times the rate, biases without decay."""
    ours, theirs = adapted_pair(tmp_path, CONFIG)
    optimizer = make_optimizer(ours, TrainConfig(learning_rate=RATE / 16, lora_plus_ratio=16))
    expected = create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=RATE / 16, loraplus_lr_ratio=16, loraplus_weight_decay=0.01
    )
    final = {our_name(name): p for name, p in theirs.named_parameters() if p.requires_grad}

    def settings(optimizer: torch.optim.Optimizer, trained: dict[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
        found = {
            id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
        }
        return {name: found[id(p)] for name, p in trained.items()}

    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert_same(settings(optimizer, trained), settings(expected, final), "rate and decay of each parameter")
    assert make_schedule(optimizer, 9, 0).get_last_lr()[0] == RATE / 16, "the rate that is logged"
    for group in groups(encoded_texts())[:20]:
        ids, mask, labels = one_batch(group)
        for logits, one in ((ours(ids, mask), optimizer), (theirs(ids, mask).logits, expected)):
            F.cross_entropy(logits, labels).backward()
            one.step(), one.zero_grad()
    for name, parameter in trained.items():
        if not name.endswith("key.base.bias"):  # its gradient is rounding alone, which Adam scales up to full steps
            assert_close(parameter, final[name], 1e-8, name)


class _Summed:
    """Processes that run one after the other: adds up what they would send."""

    size = 1

    def __init__(self):
        self.gradients, self.loss = {}, 0.0

    def sum_gradients(self, parameters, loss):
        for i, parameter in enumerate(parameters):
            if parameter.grad is not None:
                self.gradients[i] = self.gradients.get(i, 0.0) + parameter.grad
        self.loss = self.loss + loss
        return loss


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("multi_label", [False, True], ids=["class weights", "multi-label"])
def test_class_weights_and_multi_label_give_the_loss_and_gradients_of_one_large_batch(tmp_path, multi_label, processes):
    """Of batches of 5, 3 and 1 texts, accumulated; four processes leave some of them without a text."""
    ours, theirs = adapted_pair(tmp_path, CONFIG)
    split, classes = encoded_texts(), np.resize([0, 0, 2, 0, 1, 0, 0], 64)
    class_weights = len(classes) / (3 * np.bincount(classes))
    if multi_label:
        split = dataclasses.replace(split, labels=np.random.default_rng(2).integers(0, 2, (len(classes), 3)))
    else:
        split = dataclasses.replace(split, labels=classes, weights=class_weights[classes])
    rows = [[0, 1, 2, 3, 4], [5, 6, 7], [8]]

    ids, mask, labels = one_batch([collate(split, np.array(part), 1, "longest") for part in rows])
    if multi_label:
        theirs.base_model.model.config.problem_type = "multi_label_classification"
        loss = theirs(input_ids=ids, attention_mask=mask, labels=labels.double()).loss
    else:
        loss = torch.nn.CrossEntropyLoss(torch.from_numpy(class_weights))(theirs(ids, mask).logits, labels)
    loss.backward()

    world, optimizer = _Summed(), torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.0)
    for rank in range(processes):
        group = [collate(split, np.array(part), 1, "longest", slice(rank, None, processes)) for part in rows]
        train_step(ours, group, optimizer, make_schedule(optimizer, 9, 0), CPU.grad_scaler(), CPU, 0.0, world)
    assert_close(world.loss, loss, what="loss")
    expected = {our_name(name): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(world.gradients) == len(expected)
    for i, (name, _) in enumerate(ours.named_parameters()):
        if i in world.gradients and not name.endswith("key.base.bias"):  # its gradient is rounding alone
            assert_close(world.gradients[i], expected[name], what=name)


def one_pass_alone(logits, labels, weights):
    """Sum of the weighted losses, and the distributions (texts, distributions, outcomes), all by their definition."""
    if labels.ndim == 1:
        p = torch.softmax(logits, dim=1)[:, None]
        truth = F.one_hot(labels, logits.shape[1])[:, None]
    else:
        p = torch.stack([torch.sigmoid(logits), 1 - torch.sigmoid(logits)], dim=2)
        truth = torch.stack([labels, 1 - labels], dim=2)
    return (weights * -(truth * p.log()).sum(dim=2).mean(dim=1)).sum(), p


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("multi_label", [False, True], ids=["class weights", "multi-label"])
def test_r_drop_is_half_of_the_papers_loss_with_the_same_masks(tmp_path, multi_label, processes):
    """Liang et al. 2021, equation 4, over transformers and peft; four processes leave some batches without a text."""
    config = LoRAConfig(rank=3, dropout=0.4, layers_to_transform=(0,))  # the last layer draws masks for <s> alone
    ours, theirs = adapted_pair(tmp_path, config, classifier_dropout=0.6)
    ours.train(), theirs.train()
    split, classes, alpha = encoded_texts(), np.resize([0, 0, 2, 0, 1, 0, 0], 64), 1.7
    labels = np.random.default_rng(2).integers(0, 2, (64, 3)) if multi_label else classes
    split = dataclasses.replace(split, labels=labels, weights=None if multi_label else 0.5 + classes)
    rows = [np.array(part) for part in ([0, 1, 2, 3, 4], [5, 6, 7], [8])]
    shares = [[collate(split, p, 1, "longest", slice(k, None, processes)) for p in rows] for k in range(processes)]

    torch.manual_seed(3)
    nll, divergence, differ = 0.0, 0.0, 0.0
    for batch in (batch for share in shares for batch in share):
        passes = [theirs(batch.input_ids, batch.attention_mask).logits for _ in range(2)]
        (one, p), (other, q) = (one_pass_alone(logits, batch.labels, batch.weights) for logits in passes)
        kl = (p * (p / q).log()).sum(dim=2).mean(dim=1) + (q * (q / p).log()).sum(dim=2).mean(dim=1)
        nll, divergence = nll + one + other, divergence + (batch.weights * kl).sum() / 2
        differ = max(differ, (p - q).abs().max().item())
    loss = (nll + alpha * divergence) / 2 / sum(batch.total_weight for batch in shares[0])
    loss.backward()
    assert differ > 0.1, "both passes have the same masks"

    torch.manual_seed(3)
    world, optimizer = _Summed(), torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.0)
    for share in shares:
        train_step(ours, share, optimizer, make_schedule(optimizer, 9, 0), CPU.grad_scaler(), CPU, 0.0, world, alpha)
    assert_close(world.loss, loss, what="loss")
    expected = {our_name(name): p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(world.gradients) == len(expected)
    for i, (name, _) in enumerate(ours.named_parameters()):
        if i in world.gradients:
            assert_close(world.gradients[i], expected[name], what=name)


def test_schedule_is_the_one_of_transformers():
    for total, warmup in [(50, 5), (10, 0), (7, 7), (1, 0), (100, 33)]:
        rates = []
        for make in (
            lambda optimizer: make_schedule(optimizer, total, warmup),  # noqa: B023  called at once
            lambda optimizer: transformers.get_linear_schedule_with_warmup(optimizer, warmup, total),  # noqa: B023
        ):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
            schedule = make(optimizer)
            one = []
            for _ in range(total):
                one.append(schedule.get_last_lr()[0])
                optimizer.step(), schedule.step()
            rates.append(one)
        assert_same(rates[0], rates[1], f"{total} steps, {warmup} of warm-up")


class _Overflowing(torch.nn.Module):
    """A model whose gradients are inf on demand."""

    def __init__(self, model):
        super().__init__()
        self.model, self.overflow = model, False

    def forward(self, input_ids, attention_mask):
        logits = self.model(input_ids, attention_mask)
        return logits * torch.tensor(float("inf")) if self.overflow else logits


def state_of(model, optimizer, schedule):
    return copy.deepcopy(([p.detach() for p in model.parameters()], optimizer.state_dict(), schedule.state_dict()))


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b or callable(a)


def test_fp16_scaler_skips_a_step_that_overflows(tmp_path):
    ours, _ = adapted_pair(tmp_path, CONFIG, dtype=torch.float32)
    model = _Overflowing(ours)
    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0**10)
    optimizer = make_optimizer(model, TrainConfig(learning_rate=RATE))
    schedule = make_schedule(optimizer, STEPS, WARMUP)
    batches = groups(encoded_texts())
    train_step(model, batches[0], optimizer, schedule, scaler, CPU, CLIP)
    assert schedule.last_epoch == 1 and scaler.get_scale() == 2.0**10

    before = state_of(model, optimizer, schedule)
    model.overflow = True
    train_step(model, batches[1], optimizer, schedule, scaler, CPU, CLIP)
    assert same(before, state_of(model, optimizer, schedule)), "a skipped step changed something"
    assert scaler.get_scale() == 2.0**9

    model.overflow = False
    train_step(model, batches[2], optimizer, schedule, scaler, CPU, CLIP)
    assert schedule.last_epoch == 2 and not same(before, state_of(model, optimizer, schedule))


def test_loss_scale_does_not_change_the_step(tmp_path):
    # A power of two scales without rounding, so scaling, clipping and unscaling must leave the very same weights.
    results = []
    for enabled in (False, True):
        ours, _ = adapted_pair(tmp_path, CONFIG, dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0**10)
        optimizer = make_optimizer(ours, TrainConfig(learning_rate=RATE))
        schedule = make_schedule(optimizer, STEPS, 0)
        for group in groups(encoded_texts())[:3]:
            train_step(ours, group, optimizer, schedule, scaler, CPU, 0.05)
        results.append([p.detach().clone() for p in ours.parameters()])
    for one, other in zip(*results, strict=True):
        assert_close(one, other, 1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_training_on_a_gpu_lowers_the_loss(tmp_path, precision):
    ours, _ = adapted_pair(tmp_path, CONFIG, dtype=torch.float32)
    compute = Compute(torch.device("cuda"), precision)
    ours.cuda().train()
    optimizer = make_optimizer(ours, TrainConfig(learning_rate=RATE))
    schedule, scaler = make_schedule(optimizer, STEPS, WARMUP), compute.grad_scaler()
    losses = [
        train_step(ours, group, optimizer, schedule, scaler, compute, CLIP).item() for group in groups(encoded_texts())
    ]
    assert np.isfinite(losses).all() and np.mean(losses[-10:]) < np.mean(losses[:10])
