"""One run in several processes: each computes its share of every batch, and gradients are summed once per step.

    torchrun --nproc_per_node=4 train.py CONFIG

The loss of a step is a sum over its n texts, and so is its gradient:

    g = (1 / n) sum over k of g_k,   g_k the gradient of the texts of process k

Every process makes the same batches from the same seed, takes rows k, k + N, k + 2N, ... of each, and divides by the
total n (with class weights, by the sum of all weights, and g_k is weighted). The sum over processes is then the
gradient of a single process, up to rounding, also where shares differ in size; clipping, loss scaling and AdamW see the
same numbers everywhere, and the weights stay equal without being sent.
Only trainable parameters are communicated, 4 bytes each.

`DistributedDataParallel` takes the mean over processes instead, which is another number where their shares differ, and
communicates after each backward pass unless `no_sync` is set; here it happens once, after accumulation. Overlapping
communication with the backward pass saves nothing where all gradients fit into one message.
Source: Li et al. 2020, "PyTorch Distributed", sections 3.2 (gradient reduction) and 3.2.4 (accumulation).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.errors import ConfigError, LostProcessError

_LOST_AFTER = datetime.timedelta(seconds=45)
"""Timeout of the communication within a step."""
_PATIENCE = datetime.timedelta(hours=2)
"""Timeout where one process may work alone for long: a download, tokenizing, a checkpoint on a slow disk, scoring."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them. With a single process every method returns at once."""

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """Number of processes."""
    steps: Any = None
    """Process group of the training steps, with a short timeout; the default group has a long one."""
    store: Any = None
    """Key-value store shared by the processes, which works also while some of them fail."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """The share of this process in a list: process k of N takes items k, k + N, k + 2N, ..."""
        return slice(self.rank, None, self.size)

    @property
    def signals_may_repeat(self) -> bool:
        """Whether torchrun may forward a signal that this process also gets from the scheduler."""
        return self.size > 1 or "TORCHELASTIC_RUN_ID" in os.environ

    def take_gpu(self, device: str) -> None:
        """Select the GPU of this process. Raises ConfigError if this machine has more processes than GPUs."""
        if self.size == 1 or device == "cpu" or not torch.cuda.is_available():
            return
        here, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if here > gpus:
            raise ConfigError(
                f"{here} processes on a machine with {gpus} GPU: start {gpus} (--nproc_per_node), or give "
                "--train.device cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))

    def seed(self, seed: int, step: int) -> None:
        """Seed torch for one step by (seed, rank, step), so that dropout masks differ between processes.

        No generator state has to be saved, so a run can resume with another number of processes. A single process
        does not reseed.
        """
        if self.size > 1:
            torch.manual_seed(int(np.random.SeedSequence((seed, self.rank, step)).generate_state(1, np.uint64)[0]))

    def sum_gradients(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
        """Replace each gradient by its sum over all processes, and return the sum of `loss`, a scalar.

        One message of (trainable parameters + 1) numbers. Others of a step are the 16 bytes of `all_reduce_max` and,
        with unlabelled texts, the means of `PseudoLabels`.
        """
        if self.size == 1:
            return loss
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), loss.reshape(1)])
        with _detect_lost():
            dist.all_reduce(flat, group=self.steps)
        parts = flat[:-1].split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return flat[-1]

    def all_reduce_max(self, *values: int) -> tuple[int, ...]:
        """The maximum of each value over all processes: if one has to stop or save after this step, all do."""
        if self.size == 1:
            return values
        largest = torch.tensor(values, dtype=torch.int64)
        with _detect_lost():
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.steps)
        return tuple(largest.tolist())

    def sum(self, tensor: Tensor, in_step: bool = False) -> Tensor:
        """The sum of a tensor over all processes, in place, with the long timeout unless it is part of a step."""
        if self.size > 1:
            with _detect_lost():
                dist.all_reduce(tensor, group=self.steps if in_step else None)
        return tensor

    def wait(self) -> None:
        """Wait until every process has reached this call."""
        self.sum(torch.zeros(1))

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block in process 0 first, then in the others, which find in the cache what it fetched."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def copy_from_main(self, model: nn.Module) -> None:
        """Give every process the trainable parameters of process 0."""
        if self.size == 1:
            return
        self.wait()
        with _detect_lost():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    dist.broadcast(parameter.detach(), 0, group=self.steps)

    def check_same_step(self, step: int) -> None:
        """Raise ConfigError if the processes would resume from different steps: they see different run folders."""
        highest, lowest = self.all_reduce_max(step, -step)
        if highest != -lowest:
            raise ConfigError(
                f"--resume: one process finds the run at step {highest}, another at step {-lowest}; give an --output "
                "that every machine sees, or copy the run folder to each"
            )

    def report_error(self, line: str) -> None:
        """Print an error on stderr, unless another process has already, and write it to the file torchrun reads."""
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            message = {"message": line, "extraInfo": {"timestamp": int(time.time())}}
            Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")
        first = True
        if self.store is not None:
            with contextlib.suppress(RuntimeError):  # the process that hosts the store has ended
                first = self.store.add("errors", 1) == 1
        if first:
            print(line, file=sys.stderr, flush=True)


ALONE = World()


@contextlib.contextmanager
def join() -> Iterator[World]:
    """The processes that `torchrun`, or any launcher that sets its environment variables, started; otherwise ALONE.

    CPU tensors are sent by gloo, GPU tensors by NCCL. Only process 0 prints to stdout.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, size = next(dist.rendezvous("env://", timeout=_PATIENCE))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    world = World(rank, size, dist.new_group(timeout=_LOST_AFTER), dist.PrefixStore("loraberta", store))
    with contextlib.ExitStack() as stack:
        if not world.is_main:
            nowhere = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123  a device, not a file
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.callback(dist.destroy_process_group)
        yield world


@contextlib.contextmanager
def _detect_lost() -> Iterator[None]:
    """Raise LostProcessError if a collective fails: another process died or has stopped responding.

    torchrun, which also notices, sends SIGTERM a tenth of a second later; it is ignored so that the error is printed.
    """
    try:
        yield
    except RuntimeError as error:  # gloo's errors have no class of their own
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # "[file:line] Read error [127.0.0.1]:1234: Connection reset by peer. This is typically caused by ..."
        why = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
        raise LostProcessError(
            f"another process of this run died or no longer responds ({why}); the checkpoints are kept: "
            "resume with the same command and --resume"
        ) from error
