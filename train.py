"""Fine-tune a RoBERTa by LoRA: the whole run, from a TOML file to a scored classifier, in the order it happens.

    python train.py experiments/quickstart.toml --lora.rank 8

Reading order for a learner: `train_step` first (one optimizer step, with everything that mixed precision and
accumulation add to it), then `train` from top to bottom.
"""

from __future__ import annotations

import dataclasses
import math
import random
import signal
import sys
import time
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpu import speed_up
from data.assets import fetch_checkpoint, sha256_of
from data.augmentation import augment_texts, check_script
from data.batching import WIDTH_MULTIPLE, Batch, encode_split, evaluation_batches, training_batches
from data.sources import Split, load_source
from lora.inject import count_parameters, inject_lora
from lora.peft_format import load_adapter, save_adapter
from roberta.config import RobertaConfig
from roberta.tokenizer import TextTokenizer
from roberta.weights import has_head, load_checkpoint
from training.budget import check_budget
from training.checkpoint import Position, check_fingerprints, restore
from training.checkpoint import load as load_latest
from training.checkpoint import save as save_checkpoint
from training.command_line import run_command
from training.config import RunConfig, parse_command_line
from training.distributed import ALONE, World, join
from training.errors import ConfigError
from training.html_report import write_html_report
from training.model_card import write_model_card
from training.plots import draw_plots
from training.precision import WIDTH_WHEN_COMPILED, Compute, choose_compute, use_determinism
from training.progress import Progress, minutes, say, this_python
from training.report import build_report
from training.run_folder import RunFolder, check_board
from training.scoring import confident_mistakes, predict, score


def train_step(
    model: nn.Module,
    batches: list[Batch],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    compute: Compute,
    max_grad_norm: float,
    world: World = ALONE,
) -> Tensor:
    """One optimizer step on `batches`, which count as one large batch (gradient accumulation).

        loss = (1 / n) sum over all n texts of cross-entropy(logits, label)

    Returns that loss in nats, a scalar still on the device: reading it is the caller's decision, as it makes a GPU
    wait. With fp16 a step whose gradients overflow changes nothing but the loss scale (Micikevicius et al. 2018).
    `max_grad_norm` = 0 leaves the gradients as they are.
    Of several processes each holds some of the n texts, and all make the same step.
    """
    texts = sum(len(batch.labels) + batch.num_remote for batch in batches)
    step_loss = torch.zeros((), device=compute.device)
    for batch in batches:
        input_ids = batch.input_ids.to(compute.device, non_blocking=True)
        attention_mask = batch.attention_mask.to(compute.device, non_blocking=True)
        labels = batch.labels.to(compute.device, non_blocking=True)
        with compute.autocast():
            logits = model(input_ids, attention_mask)  # (batch, labels)
            # Divided by the texts of all batches, not of this one: a short last batch weighs what its texts weigh.
            loss = F.cross_entropy(logits, labels, reduction="sum") / texts
        scaler.scale(loss).backward()  # adds to .grad
        step_loss = step_loss + loss.detach()

    step_loss = world.sum_gradients(model.parameters(), step_loss)  # once a step; infs of one process reach all
    scaler.unscale_(optimizer)  # before clipping: the norm is meant for the gradients themselves
    if max_grad_norm > 0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    scale = scaler.get_scale()
    scaler.step(optimizer)  # skips the step if a gradient is inf or nan
    scaler.update()  # ... and then halves the scale
    optimizer.zero_grad(set_to_none=True)
    if scaler.get_scale() >= scale:
        schedule.step()  # a skipped step must not use up learning rate
    return step_loss


def make_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, decay_bias_and_norm: bool
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters (Loshchilov & Hutter 2017, algorithm 2).

    Decay pulls matrices towards zero; biases and LayerNorm's parameters, all vectors, are left alone unless asked
    for. "Fused": one pass over each tensor (one kernel on a GPU) instead of one for each term of the formula.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if decay_bias_and_norm or parameter.ndim > 1]
    spared = [parameter for parameter in trainable if not decay_bias_and_norm and parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, fused=True)


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


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (CPU and GPU)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def groups_of(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` batches; the last may be shorter."""
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def finish(folder: RunFolder) -> None:
    """What is made of the other files alone: plots, pages; a finished run has no more use for checkpoints."""
    draw_plots(folder)
    write_html_report(folder)
    write_model_card(folder)
    if folder.is_complete():
        folder.remove_checkpoints()


def train(config: RunConfig, world: World = ALONE) -> int:
    """Run `config` from data to report. Returns the exit code: 0, or 128 + the signal that stopped it.

    Every process of `world` runs all of it, on its share of each batch; process 0 alone writes and prints. Raises
    ConfigError, DataError, CheckpointError or LoRAError for what can't be used, OSError for what can't be written.
    """
    settings, started = config.train, time.perf_counter()
    folder = RunFolder(config.output, writes=world.is_main)
    resuming = config.resume and folder.config.is_file()
    if resuming:
        folder.check_same_run(config)
        if folder.is_complete():
            if world.is_main:
                finish(folder)  # it may have been killed while it did this
            say(f"{folder.path} is finished; there is nothing to resume")
            return 0
    else:
        folder.check_free(config.overwrite)
    if settings.tensorboard:
        check_board()
    use_determinism(settings.deterministic)
    world.take_gpu(settings.device)
    compute = choose_compute(settings)
    seed_everything(settings.seed)

    # --- text ---------------------------------------------------------------------------------------------------
    with world.main_first():
        text = load_source(config.data, settings.seed).cleaned(config.data.cleaning)
    augmentation = config.data.augmentation
    say(f"data        {text.origin}")
    say(
        f"            {len(text.train.texts):,} texts to train on, {len(text.validation.texts):,} to validate, "
        f"{len(text.test.texts):,} to test, {len(text.label_names)} classes"
    )
    if augmentation.n_aug:
        check_script(text.train.texts, text.origin)
        say(f"            EDA: {augmentation.n_aug} new texts of each training text, alpha {augmentation.alpha:g}")

    # --- pretrained checkpoint, and the budget before anything large is read --------------------------------------
    with world.main_first():
        checkpoint = fetch_checkpoint(config.model.checkpoint)
    say(f"checkpoint  {checkpoint.origin}")
    model_config = RobertaConfig.from_file(checkpoint.directory / "config.json")
    changes = {
        "hidden_dropout_prob": config.model.hidden_dropout,
        "attention_probs_dropout_prob": config.model.attention_dropout,
        "classifier_dropout": config.model.classifier_dropout,
    }
    model_config = dataclasses.replace(
        model_config,
        label_names=text.label_names,
        **{name: value for name, value in changes.items() if value is not None},
    )
    check_budget(model_config, config.lora, settings.max_trainable)
    if config.data.max_length > model_config.max_length:
        raise ConfigError(
            f"data.max_length is {config.data.max_length}, but the checkpoint has positions for "
            f"{model_config.max_length} tokens; lower it"
        )
    tokenizer = TextTokenizer.from_directory(checkpoint.directory, config.data.max_length)
    tokenizer.check_fits(model_config, checkpoint.directory)

    # --- text to ids ----------------------------------------------------------------------------------------------
    with world.main_first():
        splits = {
            name: encode_split(getattr(text, name), tokenizer, description=f"tokenizing {name}")
            for name in ("train", "validation", "test")
        }
    cut = sum(split.truncated for split in splits.values())
    say(f"            {cut:,} texts are longer than {config.data.max_length} tokens and are cut there")

    # --- model: load, wrap, freeze, count -------------------------------------------------------------------------
    new_head = config.model.new_head or not has_head(checkpoint.directory)
    model = load_checkpoint(checkpoint.directory, model_config, new_head=new_head)
    inject_lora(model, config.lora)  # freezes all but A, B, the biases asked for, and the head
    count = count_parameters(model)
    compute.cast_frozen(model.roberta)  # 16-bit runs: frozen weights rounded once, not in every step
    model.to(compute.device)
    if compute.device.type == "cpu":
        speed_up(model)
    stepped = compute.compiled(model, settings.compile)  # the same parameters; only training steps go through it
    optimizer = make_optimizer(model, settings.learning_rate, settings.weight_decay, settings.decay_bias_and_norm)
    scaler = compute.grad_scaler()

    def save_best() -> None:
        if not world.is_main:
            return
        # A head drawn here is in no checkpoint: it is saved whole, also where only a part of it is trained.
        also = ("classifier",) if new_head else ()
        save_adapter(model, folder.adapter, base_model=checkpoint.name, task_type="SEQ_CLS", also=also)
        tokenizer.save(folder.adapter)

    def batches_of_epoch(epoch: int, skip: int) -> Iterable[Batch]:
        split = splits["train"]
        if augmentation.n_aug:
            new = augment_texts(text.train.texts, text.train.labels, augmentation, settings.seed, epoch)
            split = encode_split(Split(*new), tokenizer, description="tokenizing EDA")
        return training_batches(  # shuffled anew each epoch, texts of similar length together
            split,
            settings.batch_size,
            tokenizer.pad_token_id,
            settings.seed,
            epoch,
            config.data.padding,
            compute.device,
            skip,
            world.share,
            WIDTH_WHEN_COMPILED if settings.compile != "off" else WIDTH_MULTIPLE,
        )

    def logits_on(name: str) -> Tensor:
        batches = evaluation_batches(
            splits[name],
            settings.eval_batch_size,
            tokenizer.pad_token_id,
            config.data.padding,
            compute.device,
            world.share,
        )
        # Without dropout and gradients; then the model trains on. A row is 0 in all processes but one, so the sum is
        # exact, and all of them see the same scores.
        return world.sum(predict(model, batches, len(splits[name].labels), compute))

    texts_per_epoch = (1 + augmentation.n_aug) * len(splits["train"].labels)
    batches_per_epoch = -(-texts_per_epoch // settings.batch_size)
    steps_per_epoch = -(-batches_per_epoch // settings.accumulation_steps)
    total_steps = settings.epochs * steps_per_epoch
    schedule = make_schedule(optimizer, total_steps, round(settings.warmup_fraction * total_steps))

    # --- where to begin: at the start, or where a checkpoint says ----------------------------------------------------
    fingerprints = {
        "the data": text.fingerprint,
        "the base weights": sha256_of(checkpoint.directory / "model.safetensors"),
        "the tokenizer": tokenizer.fingerprint,
    }
    position = Position()
    found = load_latest(folder.checkpoints) if resuming else None
    if found is None:
        folder.create(config, text.label_names, replace=config.overwrite or resuming)
    else:
        state, tensors, complaints = found
        for complaint in complaints:
            say(complaint)
        check_fingerprints(state["fingerprints"], fingerprints)
        position = restore(state, tensors, model, optimizer, schedule, scaler)
        folder.cut_metrics(position.metrics_bytes)
        say(f"resumed     epoch {position.epoch}, after step {position.step}")
    if settings.tensorboard:
        folder.open_board(position.step)
    world.check_same_position(position.step)
    say(f"compute     {compute.describe()}" + (f", in each of {world.size} processes" if world.size > 1 else ""))
    epochs = "1 epoch" if settings.epochs == 1 else f"{settings.epochs} epochs at most"
    say(f"steps       {steps_per_epoch} an epoch, {total_steps} in {epochs}")
    say(f"run folder  {folder.path}")
    say(f"\n{count.table()}")
    say(f"trainable: {count.trainable:,} of {count.total:,} parameters ({count.percentage:.2f} %)\n")

    # --- the loop ---------------------------------------------------------------------------------------------------
    # In short: in each epoch, a train_step for each group of batches; then score the validation split, and keep the
    # adapter if it is the best so far. The rest is logging, checkpoints, and stopping.
    stop_signal = stopping = 0  # what this process was sent; what all processes have agreed on

    def on_signal(number: int, _frame: object) -> None:
        nonlocal stop_signal
        stop_signal = number
        if not world.hears_signals_twice:
            signal.signal(number, previous_handlers[number])  # a second one stops at once
            say("stopping after this step, with a checkpoint; once more stops at once")

    def write_checkpoint() -> None:
        position.waiting = [(rate, float(loss)) for rate, loss in waiting]
        position.metrics_bytes = folder.metrics.stat().st_size if folder.metrics.is_file() else 0
        position.seconds = seconds_before + time.perf_counter() - started
        position.train_seconds = train_seconds_before + time.perf_counter() - train_started
        if world.is_main:
            save_checkpoint(
                folder.checkpoints,
                position,
                model,
                optimizer,
                schedule,
                scaler,
                fingerprints,
                settings.checkpoint_keep,
            )
        world.wait()

    previous_handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous_handlers:
        signal.signal(number, on_signal)
    progress = Progress(total_steps, position.step - len(position.waiting), shown=world.is_main)
    seconds_before, train_seconds_before = position.seconds, position.train_seconds
    train_started = last_checkpoint = time.perf_counter()
    model.train()
    try:
        while position.epoch <= settings.epochs:
            if settings.patience and position.epoch - 1 - position.best_epoch >= settings.patience:
                say(f"no better validation accuracy for {settings.patience} epochs: stopping early")
                break
            progress.resume_clock()
            # Learning rates and losses since the last logged line; the losses not yet read from the device.
            waiting = [(rate, torch.tensor(loss, device=compute.device)) for rate, loss in position.waiting]
            skip = position.step_of_epoch * settings.accumulation_steps
            batches = batches_of_epoch(position.epoch, skip)
            world.wait()
            for group in groups_of(batches, settings.accumulation_steps):
                learning_rate = schedule.get_last_lr()[0]
                world.seed(settings.seed, position.step)  # of several processes each has masks of its own
                loss = train_step(stepped, group, optimizer, schedule, scaler, compute, settings.max_grad_norm, world)
                waiting.append((learning_rate, loss))
                position.tokens += sum(batch.tokens for batch in group)
                position.step += 1
                position.step_of_epoch += 1
                if position.step % settings.log_every == 0 or position.step_of_epoch == steps_per_epoch:
                    losses = torch.stack([loss for _, loss in waiting]).tolist()  # here the host waits for the device
                    for back, loss in enumerate(losses):
                        if not math.isfinite(loss):
                            raise ConfigError(
                                f"the loss is {loss} at step {position.step - len(losses) + 1 + back} (learning rate "
                                f"{waiting[back][0]:.2e}); lower train.learning_rate; "
                                + (
                                    f"the last good adapter is in {folder.adapter}"
                                    if position.best
                                    else "nothing was saved yet"
                                )
                            )
                    mean_loss = sum(losses) / len(losses)
                    position.epoch_loss += sum(losses)
                    position.epoch_steps += len(losses)
                    rate = progress.update(len(losses), position.tokens, mean_loss, learning_rate)
                    folder.log(
                        step=position.step,
                        epoch=position.epoch,
                        loss=mean_loss,
                        learning_rate=learning_rate,
                        tokens_per_second=rate,
                    )
                    waiting, position.tokens = [], 0
                by_steps = settings.checkpoint_steps and position.step % settings.checkpoint_steps == 0
                by_time = time.perf_counter() - last_checkpoint >= 60 * settings.checkpoint_minutes
                stopping, due = world.agree(stop_signal, by_steps or by_time)
                if due or stopping:
                    write_checkpoint()
                    last_checkpoint = time.perf_counter()
                if stopping:
                    break
            if stopping:
                break

            validation = score(logits_on("validation"), splits["validation"].labels, text.label_names)
            folder.log(
                step=position.step,
                epoch=position.epoch,
                split="validation",
                loss=validation.loss,
                accuracy=validation.accuracy,
                precision=validation.precision,
                recall=validation.recall,
                f1=validation.f1,
            )
            best = position.best
            better = best is None or (validation.accuracy, -validation.loss) > (best.accuracy, -best.loss)
            if better:
                position.best, position.best_epoch = validation, position.epoch
                save_best()
            say(
                f"epoch {position.epoch:>2}/{settings.epochs}  train loss "
                f"{position.epoch_loss / position.epoch_steps:.4f}  validation loss {validation.loss:.4f}  accuracy "
                f"{100 * validation.accuracy:.2f} %  macro F1 {validation.f1:.3f}"
                + ("  (best so far)" if better else "")
            )
            position.epoch, position.step_of_epoch = position.epoch + 1, 0
            position.epoch_loss, position.epoch_steps = 0.0, 0
            write_checkpoint()
            last_checkpoint = time.perf_counter()
            (stopping,) = world.agree(stop_signal)
            if stopping:  # it came while the epoch was scored
                break
    finally:
        progress.close()
        for number, handler in previous_handlers.items():
            if signal.getsignal(number) is on_signal:  # what was set since then holds
                signal.signal(number, handler)
    train_seconds = train_seconds_before + time.perf_counter() - train_started
    epochs_run = position.epoch - 1 if position.step_of_epoch == 0 else position.epoch

    # --- after: the best adapter, scored once on the test split ----------------------------------------------------
    test, mistakes, test_seconds = None, [], 0.0
    if not stopping:
        if world.is_main:
            load_adapter(model, folder.adapter)
        world.copy_from_main(model)
        test_started = time.perf_counter()
        logits = logits_on("test")
        test_seconds = time.perf_counter() - test_started
        test = score(logits, splits["test"].labels, text.label_names)
        mistakes = confident_mistakes(logits, splits["test"].labels, text.test.texts, text.label_names)
    elif position.best is None:  # stopped within the first epoch: what there is beats nothing
        save_best()
    report = build_report(
        config=config,
        origins={
            "data": text.origin,
            "checkpoint": checkpoint.origin,
            "model_type": model_config.model_type,
        },
        label_names=text.label_names,
        count=count,
        compute=compute,
        validation=position.best,
        test=test,
        epochs_run=epochs_run,
        best_epoch=position.best_epoch,
        steps=position.step,
        train_seconds=train_seconds,
        seconds=seconds_before + time.perf_counter() - started,
        test_seconds=test_seconds,
        mistakes=mistakes,
    )
    folder.write_report(report)
    if world.is_main:
        finish(folder)
    if test is None:
        say(f"\ninterrupted in epoch {epochs_run} after step {position.step}; the adapter is in {folder.adapter}")
        say(f"go on:   the same command with --resume, or {this_python()} train.py {folder.config} --resume")
    else:
        say(f"\nbest epoch {position.best_epoch} by validation accuracy; on the test split:\n")
        say(test.table())
        say(
            f"\ntest accuracy {100 * test.accuracy:.2f} %   macro precision {test.precision:.3f}   recall "
            f"{test.recall:.3f}   F1 {test.f1:.3f}   loss {test.loss:.4f}"
        )
    say(
        f"wall time {minutes(report['seconds'])} (training {minutes(train_seconds)})   "
        f"peak memory {report['peak_memory_bytes'] / 2**20:,.0f} MiB   trainable parameters {count.trainable:,}"
    )
    say(f"report:  {folder.html}")
    say(f'try it:  {this_python()} evaluate.py {folder.path} --text "a text of your own"')
    world.wait()  # torchrun ends all processes when the first ends with a code that is not 0
    return 128 + stopping if stopping else 0  # as shells count


if __name__ == "__main__":
    with join() as world:  # alone, unless torchrun started it
        code = run_command(lambda: train(parse_command_line(sys.argv[1:]), world), world)
    sys.exit(code)
