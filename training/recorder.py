"""What happens around the training loop: the console, metrics.jsonl, checkpoints, signals, the report.

Nothing here changes what is computed; a reader of the algorithm can skip it.
"""

from __future__ import annotations

import math
import shlex
import signal
import time
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from data.batching import Batch
from lora.inject import count_parameters
from lora.peft_format import save_adapter
from training.calibration import calibrate, read_temperature, write_temperature
from training.checkpoint import TrainState, check_fingerprints, load, restore, save
from training.classes import write_names
from training.config import RunConfig
from training.distributed import World
from training.errors import ConfigError
from training.html_report import write_html_report
from training.model_card import write_model_card
from training.plots import draw_plots
from training.precision import Compute
from training.progress import Progress, minutes, program, say
from training.report import build_report, peak_memory_bytes
from training.run_folder import RunFolder, check_board
from training.scoring import Scores, confident_mistakes
from training.setup import Inputs
from training.unlabelled import PseudoLabels

_KEPT = {"best": "best so far", "last": "last so far"}  # train.keep -> what an adapter on disk is


class Recorder:
    """The run folder and the console of one run, and the state of its loop.

    Used as a context, it handles signals: SIGINT and SIGTERM end the run after the current step, with a checkpoint.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        self.folder = RunFolder(config.output, writes=world.is_main)
        self.state = TrainState()
        self.interrupted = 0
        """Number of the signal on which all processes stop; 0 without one."""
        self._signal = 0
        self._started = time.perf_counter()
        self._resuming = config.resume and self.folder.config.is_file()

    def is_finished(self) -> bool:
        """Whether the run to be resumed is complete. Raises ConfigError if the run folder may not be written."""
        if not self._resuming:
            self.folder.check_free(self.config.overwrite)
        else:
            self.folder.check_same_run(self.config)
            if self.folder.is_complete():
                if self.world.is_main:
                    write_pages(self.folder)  # the run may have been killed while it did this
                say(f"{self.folder.path} is finished; there is nothing to resume")
                return True
        if self.config.train.tensorboard:
            check_board()
        return False

    def start(
        self,
        inputs: Inputs,
        compute: Compute,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        scaler: torch.amp.GradScaler,
        pseudo_labels: PseudoLabels | None = None,
    ) -> TrainState:
        """Make the run folder, or restore the newest checkpoint into model, optimizer, schedule, scaler, pseudo-labels.

        Returns the state of the loop. Raises ConfigError if a checkpoint does not belong to this run.
        """
        folder, settings, world = self.folder, self.config.train, self.world
        count = count_parameters(model)
        self._inputs, self._compute, self._count = inputs, compute, count
        self._trained, self._pseudo_labels = (model, optimizer, schedule, scaler), pseudo_labels
        self._fingerprints = inputs.fingerprints()
        found = load(folder.checkpoints) if self._resuming else None
        if found is None:
            folder.create(self.config, inputs.text.label_names, replace=self.config.overwrite or self._resuming)
        else:
            values, tensors, complaints = found
            for complaint in complaints:
                say(complaint)
            check_fingerprints(values["fingerprints"], self._fingerprints)
            self.state = restore(values, tensors, *self._trained)
            if pseudo_labels:
                pseudo_labels.load_state(self.state.averages, compute.device)
            folder.cut_metrics(self.state.metrics_bytes)
            say(f"resumed     epoch {self.state.epoch}, after step {self.state.step}")
        if settings.tensorboard:
            folder.open_board(self.state.step)
        world.check_same_step(self.state.step)

        processes = f", in each of {world.size} processes" if world.size > 1 else ""
        total_steps = settings.epochs * inputs.steps_per_epoch
        epochs = "1 epoch" if settings.epochs == 1 else f"at most {settings.epochs} epochs"
        say(f"compute     {compute.describe()}{processes}")
        say(f"steps       {inputs.steps_per_epoch} per epoch, {total_steps} in {epochs}")
        say(f"run folder  {folder.path}")
        say(f"\n{count.table()}")
        say(f"trainable: {count.trainable:,} of {count.total:,} parameters ({count.percentage:.2f} %)\n")

        # Learning rate and loss of each step since the last logged line; the losses are still on the device.
        self._unread = [(rate, torch.tensor(loss, device=compute.device)) for rate, loss in self.state.unread]
        self._progress = Progress(total_steps, self.state.step - len(self._unread), shown=world.is_main)
        self._before = self.state.seconds, self.state.train_seconds
        self._train_started = self._last_checkpoint = time.perf_counter()
        return self.state

    def __enter__(self) -> Recorder:
        self._handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self._handlers:
            signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._on_signal:  # a handler set since then stays
                signal.signal(number, handler)
        self._times()

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number
        if not self.world.signals_may_repeat:
            signal.signal(number, self._handlers[signal.Signals(number)])  # a second one stops immediately
            say("stopping after the current step or validation, with a checkpoint; press Ctrl-C again to stop now")

    def begin_epoch(self) -> None:
        """Start timing the epoch once every process has its batches."""
        self.world.wait()
        self._progress.resume_clock()

    def record_step(self, loss: Tensor, learning_rate: float, batches: list[Batch]) -> None:
        """Count a step, log and save when due, and set `interrupted` if a signal was received.

        Reads the losses from the device only when a line is logged, as that synchronizes with a GPU. Raises
        ConfigError for a loss that is not finite.
        """
        state, settings = self.state, self.config.train
        self._unread.append((learning_rate, loss))
        state.tokens += sum(batch.tokens for batch in batches)
        state.step += 1
        state.step_of_epoch += 1
        if state.step % settings.log_every == 0 or state.step_of_epoch == self._inputs.steps_per_epoch:
            self._log_steps(learning_rate)
        by_steps = settings.checkpoint_steps and state.step % settings.checkpoint_steps == 0
        by_time = time.perf_counter() - self._last_checkpoint >= 60 * settings.checkpoint_minutes
        self.interrupted, due = self.world.all_reduce_max(self._signal, int(by_steps or by_time))
        if due or self.interrupted:
            self._save_checkpoint()

    def _log_steps(self, learning_rate: float) -> None:
        state = self.state
        losses = torch.stack([loss for _, loss in self._unread]).tolist()  # synchronizes with the device
        for i, loss in enumerate(losses, start=state.step - len(losses) + 1):
            if not math.isfinite(loss):
                kept = f"the last good adapter is in {self.folder.adapter}" if state.best else "nothing was saved yet"
                rate = self._unread[i - state.step - 1][0]
                raise ConfigError(
                    f"the loss is {loss} at step {i} (learning rate {rate:.2e}); lower train.learning_rate; {kept}"
                )
        mean_loss = sum(losses) / len(losses)
        state.epoch_loss += sum(losses)
        state.epoch_steps += len(losses)
        rate = self._progress.update(len(losses), state.tokens, mean_loss, learning_rate)
        log = {"loss": mean_loss, "learning_rate": learning_rate, "tokens_per_second": rate}
        self.folder.log(step=state.step, epoch=state.epoch, **log)
        self._unread, state.tokens = [], 0

    def end_epoch(self, validation: Scores) -> None:
        """Log the validation scores of the epoch, count it, save a checkpoint."""
        state = self.state
        scores = {name: getattr(validation, name) for name in ("loss", "accuracy", "precision", "recall", "f1")}
        scores |= {f"micro_{name}": value for name, value in (validation.micro or {}).items()}
        self.folder.log(step=state.step, epoch=state.epoch, split="validation", **scores)
        mark = f"  ({_KEPT[self.config.train.keep]})" if state.best_epoch == state.epoch else ""
        say(
            f"epoch {state.epoch:>2}/{self.config.train.epochs}  "
            f"train loss {state.epoch_loss / state.epoch_steps:.4f}  validation loss {validation.loss:.4f}  "
            f"{validation.headline()}  macro F1 {validation.f1:.3f}{mark}"
        )
        state.epoch, state.step_of_epoch = state.epoch + 1, 0
        state.epoch_loss, state.epoch_steps = 0.0, 0
        self._save_checkpoint()
        (self.interrupted,) = self.world.all_reduce_max(self._signal)  # maybe received during the evaluation

    def save_adapter(self, logits: Tensor | None = None) -> None:
        """Write adapter, tokenizer, class names and, from validation `logits`, the temperature."""
        if self.world.is_main:
            folder, inputs = self.folder.adapter, self._inputs
            # A new head is not in the base checkpoint: it is saved completely, also where it is only partly trained.
            also = ("classifier",) if inputs.new_head else ()
            save_adapter(self._trained[0], folder, base_model=inputs.checkpoint.name, task_type="SEQ_CLS", also=also)
            inputs.tokenizer.save(folder)
            inputs.model_config.save(folder)
            write_names(self.folder.adapter_labels, inputs.text.label_names)
            if logits is not None:
                write_temperature(folder, logits, inputs.splits["validation"].labels)

    def _times(self) -> None:
        now = time.perf_counter()
        self.state.seconds = self._before[0] + now - self._started
        self.state.train_seconds = self._before[1] + now - self._train_started

    def _save_checkpoint(self) -> None:
        state = self.state
        state.unread = [(rate, float(loss)) for rate, loss in self._unread]
        if self._pseudo_labels:
            state.averages = self._pseudo_labels.state()
        state.metrics_bytes = self.folder.metrics.stat().st_size if self.folder.metrics.is_file() else 0
        self._times()
        if self.world.is_main:
            keep = self.config.train.checkpoint_keep
            save(self.folder.checkpoints, state, *self._trained, self._fingerprints, keep)
        self.world.wait()
        self._last_checkpoint = time.perf_counter()

    def finish(self, test: Scores | None, logits: Tensor | None, test_seconds: float) -> int:
        """Write the report and the pages, print the scores; returns the exit code: 0, or 128 + the signal.

        `test` and `logits` are those of the test split, None for an interrupted run.
        """
        state, folder, inputs, count = self.state, self.folder, self._inputs, self._count
        mistakes: list[dict[str, Any]] = []
        calibration = None
        if logits is not None:
            labels, texts = inputs.splits["test"].labels, inputs.text.test.texts
            temperature = read_temperature(folder.adapter)  # 1 for multi-label data
            mistakes = confident_mistakes(logits / temperature, labels, texts, inputs.text.label_names)
            calibration = calibrate(logits, labels, temperature) if labels.ndim == 1 else None
        seconds = self._before[0] + time.perf_counter() - self._started
        model, compute = self._trained[0], self._compute
        report = build_report(
            self.config, inputs, model, count, compute, state, test, seconds, test_seconds, mistakes, calibration
        )
        folder.write_report(report)  # before the pages: a picture that fails takes no scores with it
        if test is None:
            epoch = report["epochs_run"]
            by = _KEPT[self.config.train.keep]
            kept = f"epoch {state.best_epoch}, the {by}" if state.best else f"step {state.step}"
            config = shlex.quote(str(folder.config))
            say(f"\ninterrupted in epoch {epoch} after step {state.step}; {folder.adapter} holds the adapter of {kept}")
            say(f"resume:  the same command with --resume, or {program('train.py')} {config} --resume")
        else:
            deciding = "accuracy" if test.micro is None else "micro F1"
            best = f"best epoch {state.best_epoch} by validation {deciding}, ties by loss"
            kept = best if self.config.train.keep == "best" else f"epoch {state.best_epoch}, the last"
            say(f"\n{kept}; on the test split:\n")
            say(f"{test.table()}\n\n{test.summary()}")
            if calibration:
                say(calibration.summary())
        if self.world.is_main:
            write_pages(folder)
        peak = peak_memory_bytes(self._compute) / 2**20  # with that of drawing
        say(
            f"wall time {minutes(report['seconds'])} (training {minutes(state.train_seconds)})   "
            f"peak memory {peak:,.0f} MiB   trainable parameters {count.trainable:,}"
        )
        say(f"report:  {folder.html}")
        say(f'try it:  {program("evaluate.py")} {shlex.quote(str(folder.path))} --text "a text of your own"')
        self.world.wait()  # torchrun ends all processes when the first ends with a code that is not 0
        return 128 + self.interrupted if self.interrupted else 0  # as shells count


def write_pages(folder: RunFolder) -> None:
    """Write the plots and pages from the other files; remove the checkpoints of a finished run.

    What can't be written is one line on the console: the run's results are in the other files.
    """
    for path, write in ((folder.plots, draw_plots), (folder.html, write_html_report), (folder.card, write_model_card)):
        try:
            write(folder)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            say(f"warning: {path} is not complete ({reason}); the same command with --resume writes it again")
    if folder.is_complete():
        folder.remove_checkpoints()
