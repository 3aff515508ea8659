"""Fine-tune a RoBERTa by LoRA: the whole run, from a TOML file to a scored classifier, in the order it happens.

    python train.py experiments/quickstart.toml --lora.rank 8

Reading order for a learner: `train_step` (one optimizer step, with everything that mixed precision and accumulation add
to it), `train_epoch`, then `train` from top to bottom. Reading the data, the console, checkpoints, signals and the
report are in `training/`; of that folder only adamw8bit, calibration (probabilities), distributed, eva, precision,
scoring (a text's loss, which epoch is best), setup (seeds, batches), substitution, tmix and unlabelled affect the
numbers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn

from cpu import speed_up
from data.batching import Batch, evaluation_batches
from lora.adalora import allocate_ranks, orthogonality_penalty
from lora.inject import drop_encoders, inject_lora
from lora.peft_format import load_adapter
from training.adamw8bit import AdamW8bit
from training.checkpoint import TrainState
from training.command_line import run_command
from training.config import RunConfig, TrainConfig, parse_command_line
from training.distributed import ALONE, World, join
from training.eva import initialize_eva
from training.precision import Compute
from training.progress import say
from training.recorder import Recorder
from training.scoring import Scores, mean_of_windows, predict, r_drop_losses, score, text_losses
from training.setup import Inputs, epoch_batches, load_base, load_inputs, recompute_activations, set_up_process
from training.tmix import mixing, tmix_losses
from training.unlabelled import PseudoLabels


def train_step(
    model: nn.Module,
    batches: list[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    compute: Compute,
    max_grad_norm: float,
    world: World = ALONE,
    r_drop: float = 0.0,
    tmix: float = 0.0,
    pseudo_labels: PseudoLabels | None = None,
) -> Tensor:
    """One optimizer step on `batches`, which count as one large batch (gradient accumulation).

        loss = sum over all texts of w L(logits, labels) / sum over labelled texts of w

    L is the text's loss (`text_losses`; with R-Drop `r_drop_losses`, with TMix `tmix_losses`), w its weight: 1, or that
    of its class (train.class_weights). Unlabelled texts get label and weight from the model (`PseudoLabels`); AdaLoRA
    adds its penalty. Returns that loss in nats, a scalar still on the device: reading it is the caller's decision, as
    it makes a GPU wait. With fp16 a step whose gradients overflow changes only the loss scale (Micikevicius et al.
    2018) and the averages of `PseudoLabels`. `max_grad_norm` = 0 leaves the gradients as they are.
    Of several processes each holds some of the texts, and all make the same step.
    """
    total_weight = sum(batch.total_weight for batch in batches)  # over all processes; the number of texts if w = 1
    step_loss = torch.zeros((), device=compute.device)
    if pseudo_labels is not None:
        batches = [*batches, *pseudo_labels.label(model, batches, schedule.last_epoch, compute, world)]
    for batch in batches:
        input_ids = batch.input_ids.to(compute.device, non_blocking=True)
        attention_mask = batch.attention_mask.to(compute.device, non_blocking=True)
        labels = batch.labels.to(compute.device, non_blocking=True)
        with compute.autocast(), mixing(model, tmix, labels) as mix:  # None without TMix
            logits = model(input_ids, attention_mask)  # (batch, classes)
            if r_drop > 0:  # the same texts again, with other dropout masks
                losses = r_drop_losses(logits, model(input_ids, attention_mask), labels, r_drop)  # (batch,)
            else:
                losses = tmix_losses(logits, labels, mix) if mix else text_losses(logits, labels)  # (batch,)
            # Divided by the weights of all batches: each text counts as in one large batch, also in a shorter last one.
            loss = (batch.weights.to(losses, non_blocking=True) * losses).sum() / total_weight
        loss = loss + orthogonality_penalty(model, share=1 / (len(batches) * world.size))  # AdaLoRA alone
        scaler.scale(loss).backward()  # adds to .grad
        step_loss = step_loss + loss.detach()

    step_loss = world.sum_gradients(model.parameters(), step_loss)  # an overflow in one process makes all skip the step
    scaler.unscale_(optimizer)  # before clipping: the norm is meant for the gradients themselves
    if max_grad_norm > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    scale = scaler.get_scale()
    scaler.step(optimizer)  # skips the step if a gradient is inf or nan
    scaler.update()  # ... and then halves the scale
    if scaler.get_scale() >= scale:
        allocate_ranks(model, schedule.last_epoch)  # AdaLoRA alone
        schedule.step()  # a skipped step does not advance the schedule
    optimizer.zero_grad(set_to_none=True)
    return step_loss


def make_optimizer(model: nn.Module, settings: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters (Loshchilov & Hutter 2017, algorithm 2).

    Decay pulls matrices towards zero; biases and LayerNorm's parameters, all vectors, are left alone unless asked
    for. LoRA+ (Hayou et al. 2024) trains LoRA's B at `lora_plus_ratio` times the rate of A; as in peft, all vectors,
    the head's biases too, are trained at B's rate.
    "Fused": one pass over each tensor (one kernel on a GPU) instead of one for each term of the formula.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    groups[settings.learning_rate, settings.weight_decay] = []  # A's comes first: the first group's rate is logged
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ratio = settings.lora_plus_ratio if name.endswith("lora_B") or parameter.ndim <= 1 else 1.0
            rate = settings.learning_rate * ratio
            decay = settings.weight_decay if settings.decay_bias_and_norm or parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    filled = [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items() if group]
    return AdamW8bit(filled) if settings.optimizer == "adamw8bit" else torch.optim.AdamW(filled, fused=True)


def make_schedule(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rate: up from 0 to its peak in `warmup_steps` steps, then down to 0 in a straight line.

    factor(t) = t / warmup for t < warmup, else (total - t) / (total - warmup). Source: Devlin et al. 2018, A.2.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_epoch(
    model: nn.Module,
    batches: Iterable[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    compute: Compute,
    settings: TrainConfig,
    recorder: Recorder,
    world: World,
    pseudo_labels: PseudoLabels | None,
) -> None:
    """One `train_step` for each `accumulation_steps` batches; ends early if the recorder is interrupted."""
    model.train()
    remaining = iter(batches)
    while group := list(islice(remaining, settings.accumulation_steps)):
        world.seed(settings.seed, recorder.state.step)  # of several processes each draws its own dropout masks
        learning_rate = float(schedule.get_last_lr()[0])
        clip, r_drop, tmix = settings.max_grad_norm, settings.r_drop, settings.tmix
        loss = train_step(model, group, optimizer, schedule, scaler, compute, clip, world, r_drop, tmix, pseudo_labels)
        recorder.record_step(loss, learning_rate, group)
        if recorder.interrupted:
            return


def evaluate_split(
    model: nn.Module, inputs: Inputs, name: str, config: RunConfig, compute: Compute, world: World
) -> tuple[Scores, Tensor]:
    """Scores and logits (texts, labels) of the split `name`, without dropout and gradients."""
    split, batch_size = inputs.splits[name], config.train.eval_batch_size
    pad_token_id = inputs.tokenizer.pad_token_id
    batches = evaluation_batches(split, batch_size, pad_token_id, config.data.padding, compute.device, world.share)
    # A row is 0 in all processes but one, so the sum is exact, and all of them see the same scores.
    logits = mean_of_windows(world.sum(predict(model, batches, len(split.lengths), compute)), split)
    return score(logits, split.labels, inputs.text.label_names), logits


def is_better(scores: Scores, best: Scores | None) -> bool:
    """Whether the accuracy (multi-label: micro F1) is higher than the best so far, or as high with a lower loss."""
    return best is None or (scores.deciding, -scores.loss) > (best.deciding, -best.loss)


def out_of_patience(state: TrainState, patience: int) -> bool:
    """Whether the last `patience` epochs brought no better validation scores; never with a patience of 0."""
    return patience > 0 and state.epoch - 1 - state.best_epoch >= patience


def train(config: RunConfig, world: World = ALONE) -> int:
    """Run `config` from data to report. Returns the exit code: 0, or 128 + the signal that stopped it.

    Every process of `world` runs all of it, on its share of each batch; process 0 alone writes and prints. Raises
    ConfigError, DataError, CheckpointError or LoRAError for what can't be used, OSError for what can't be written.
    """
    settings, recorder = config.train, Recorder(config, world)
    if recorder.is_finished():
        return 0
    compute = set_up_process(settings, world)  # device, number format, seeds
    inputs = load_inputs(config, world)  # text, checkpoint, tokenizer, token ids

    model = load_base(inputs.checkpoint.directory, inputs.model_config, inputs.new_head, config.model.base_bits)
    total_steps = settings.epochs * inputs.steps_per_epoch
    methods = [method.for_run(total_steps) for method in config.methods]  # AdaLoRA's schedule has the run's length
    inject_lora(model, *methods)  # freezes all but the adapters, the biases asked for, and the head
    compute.cast_frozen(model.roberta)  # 16-bit runs: frozen weights rounded once, not in every step
    model.to(compute.device)
    if compute.device.type == "cpu":
        speed_up(model)  # also replaces each nn.Dropout by cpu.dropout.FastDropout: the same distribution of masks
    if settings.gradient_checkpointing:
        recompute_activations(model.roberta.encoder)
    initialize_eva(model, inputs, config, compute, world)  # lora.init = "eva" alone: A from the inputs of its layer
    train_model = compute.compiled(model, settings.compile)  # the same parameters; only training steps use it

    optimizer = make_optimizer(model, settings)
    schedule = make_schedule(optimizer, total_steps, round(settings.warmup_fraction * total_steps))
    scaler = compute.grad_scaler()
    pseudo_labels = PseudoLabels(config.unlabelled, total_steps) if config.unlabelled else None
    # New, or as a checkpoint holds it.
    state = recorder.start(inputs, compute, model, optimizer, schedule, scaler, pseudo_labels)

    with recorder:
        while state.epoch <= settings.epochs:
            if out_of_patience(state, settings.patience):
                say(f"no better validation scores for {settings.patience} epochs: stopping early")
                break
            skip = state.step_of_epoch * settings.accumulation_steps  # trained on before the run was interrupted
            batches = epoch_batches(inputs, config, state.epoch, skip, compute, world)
            recorder.begin_epoch()
            train_epoch(
                train_model, batches, optimizer, schedule, scaler, compute, settings, recorder, world, pseudo_labels
            )
            if recorder.interrupted:
                break
            validation, logits = evaluate_split(model, inputs, "validation", config, compute, world)
            if settings.keep == "last" or is_better(validation, state.best):
                state.best, state.best_epoch = validation, state.epoch
                recorder.save_adapter(logits)
            recorder.end_epoch(validation)
            if recorder.interrupted:
                break

    if recorder.interrupted:
        if state.best is None:  # no epoch was completed: the current adapter is better than none
            recorder.save_adapter()
        return recorder.finish(test=None, logits=None, test_seconds=0.0)
    drop_encoders(model)  # P-tuning's and prefix tuning's: the adapter on disk holds what they computed
    if world.is_main:
        load_adapter(model, recorder.folder.adapter)  # the best epoch's
    world.copy_from_main(model)
    started = time.perf_counter()
    test, logits = evaluate_split(model, inputs, "test", config, compute, world)
    return recorder.finish(test, logits, time.perf_counter() - started)


if __name__ == "__main__":
    with join() as world:  # alone, unless torchrun started it
        code = run_command(lambda: train(parse_command_line(sys.argv[1:]), world), world)
    sys.exit(code)
