"""One run in several processes: each takes its share of every batch, and gradients are summed once a step.

    torchrun --nproc_per_node=4 train.py CONFIG

The loss of a step is a sum over its n texts, and so is its gradient:

    g = (1 / n) sum over k of g_k,   g_k the gradient of the texts of process k

Every process makes the same batches from the same seed, takes rows k, k + N, k + 2N, ... of each, and divides by the n
that all of them share. The sum over processes is then the gradient of one process, to rounding, however the rows
divide; clipping, loss scaling and AdamW see the same numbers everywhere, and the weights stay equal without being sent.
All but a million parameters being frozen, little travels: 4 bytes for each trainable parameter.

`DistributedDataParallel` averages instead: it takes the mean over processes, which is another number where their shares
differ, and it sends after each backward pass unless told `no_sync`. Here accumulation ends before anything is sent. Its
other service, to send while the backward pass still runs, saves nothing where all gradients fit into one message.
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
"""A process that others wait for in a step is given up after this."""
_PATIENCE = datetime.timedelta(hours=2)
"""The same where one may be long at work alone: a download, tokenizing, a checkpoint onto a slow disk, scoring."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them. Alone, every method does nothing and costs nothing."""

    rank: int = 0
    """Number of this process, from 0."""
    size: int = 1
    """How many there are."""
    steps: Any = None
    """The process group in which a step communicates; the default group is for what may take long."""
    store: Any = None
    """Where processes leave notes for each other, also while some of them fail."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    @property
    def share(self) -> slice:
        """Which of a list of things are this process's: number k of N takes k, k + N, k + 2N, ..."""
        return slice(self.rank, None, self.size)

    @property
    def hears_signals_twice(self) -> bool:
        """Whether torchrun passes on a signal that this process may have got already: schedulers signal them all."""
        return self.size > 1 or "TORCHELASTIC_RUN_ID" in os.environ

    def take_gpu(self, device: str) -> None:
        """Make the GPU of this process the current one, unless `device` is cpu or there is none.

        Raises ConfigError if this machine has more processes than GPUs.
        """
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
        """Seed torch for one step, by (seed, rank, step): each process drops other elements, and resumes exactly.

        Nothing of it has to be kept in a checkpoint, so that a run may go on in another number of processes. Alone,
        the generator just runs on.
        """
        if self.size > 1:
            torch.manual_seed(int(np.random.SeedSequence((seed, self.rank, step)).generate_state(1, np.uint64)[0]))

    def sum_gradients(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
        """Replace each gradient by its sum over all processes, and return the sum of `loss`, a scalar.

        One message of (trainable parameters + 1) numbers: the only one of a step, but for 16 bytes of `all_reduce_max`.
        """
        if self.size == 1:
            return loss
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([*(gradient.reshape(-1) for gradient in gradients), loss.reshape(1)])
        with _losing():
            dist.all_reduce(flat, group=self.steps)
        parts = flat[:-1].split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        return flat[-1]

    def all_reduce_max(self, *values: int) -> tuple[int, ...]:
        """The largest of each value over all processes: what one of them wants to do after this step, all do."""
        if self.size == 1:
            return values
        largest = torch.tensor(values, dtype=torch.int64)
        with _losing():
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.steps)
        return tuple(largest.tolist())

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor on the CPU over all processes, in place; they may come to it at very different times."""
        if self.size > 1:
            with _losing():
                dist.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Until every process has come here."""
        self.sum(torch.zeros(1))

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Let process 0 through alone, then the others: what it fetches, they find in the cache."""
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
        with _losing():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    dist.broadcast(parameter.detach(), 0, group=self.steps)

    def check_same_step(self, step: int) -> None:
        """Raise ConfigError if the processes would go on from different steps: they do not see the same run folder."""
        highest, lowest = self.all_reduce_max(step, -step)
        if highest != -lowest:
            raise ConfigError(
                f"--resume: one process finds the run at step {highest}, another at step {-lowest}; give an --output "
                "that every machine sees, or copy the run folder to each"
            )

    def report_error(self, line: str) -> None:
        """Print an error on stderr, unless another process has: the first is the cause, or as good as the others.

        torchrun, which ends with a report of its own, finds the line in a file that it names.
        """
        if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            message = {"message": line, "extraInfo": {"timestamp": int(time.time())}}
            Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")
        first = True
        if self.store is not None:
            with contextlib.suppress(RuntimeError):  # whoever kept the notes is gone
                first = self.store.add("errors", 1) == 1
        if first:
            print(line, file=sys.stderr, flush=True)


ALONE = World()


@contextlib.contextmanager
def join() -> Iterator[World]:
    """The processes that `torchrun` started, or any launcher that sets its variables; without them, ALONE.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say who is who; LOCAL_RANK and LOCAL_WORLD_SIZE which GPU is whose.
    CPU tensors travel by gloo, GPU tensors by NCCL. Only process 0 is heard on stdout.
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
            nowhere = stack.enter_context(open(os.devnull, "w"))  # noqa: PTH123  a device is no path
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.callback(dist.destroy_process_group)
        yield world


@contextlib.contextmanager
def _losing() -> Iterator[None]:
    """Around a collective: its failure means that another process is gone, or silent for too long.

    After it this process has nothing left to do but to say so. torchrun, which also saw the other one die, tells it to
    end (SIGTERM) a tenth of a second later, which must not come before the line that says how to go on.
    """
    try:
        yield
    except RuntimeError as error:  # gloo's have no class of their own
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # "[file:line] Read error [127.0.0.1]:1234: Connection reset by peer. This is typically caused by ..."
        why = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]
        raise LostProcessError(
            f"another process of this run died or no longer answers ({why}); what was saved is kept: go on with the "
            "same command and --resume"
        ) from error
