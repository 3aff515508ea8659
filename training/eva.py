"""EVA in a run: where A starts, from the training batches of the first epoch (`lora/eva.py`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from typing import Any

from torch import Tensor, nn

from lora.adapter import adapters
from lora.eva import initialize_from_inputs
from lora.linear import LoRALinear
from training.config import RunConfig
from training.distributed import ALONE, World
from training.precision import Compute
from training.progress import say
from training.setup import Inputs, epoch_batches

_MOST = 1000
"""Batches after which the components must have converged; usual are 10 to 100."""


def initialize_eva(model: nn.Module, inputs: Inputs, config: RunConfig, compute: Compute, world: World) -> None:
    """Set LoRA's A if `lora.init` is "eva"; without it, do nothing.

    Every process runs on the complete batches, the first epoch's, repeated if they are few; all then start from the A
    of process 0. A resumed run does it again, and then reads A from the checkpoint. Raises LoRAError if a layer has no
    input for each token, or if the components do not converge.
    """
    if config.lora is None or config.lora.init != "eva":
        return
    layers = {name: layer for name, layer in adapters(model).items() if isinstance(layer, LoRALinear)}

    encoder: Any = model.roberta

    def run(input_ids: Tensor, mask: Tensor) -> None:
        with compute.autocast():
            encoder(input_ids, mask)  # the vectors of all tokens, in the last layer too

    def batches() -> Iterator[tuple[Tensor, Callable[[], object]]]:
        for batch in islice(cycle(epoch_batches(inputs, config, 1, 0, compute, ALONE)), _MOST):
            mask = batch.attention_mask.to(compute.device)
            yield mask, partial(run, batch.input_ids.to(compute.device), mask)

    started, was_training = time.perf_counter(), model.training
    model.eval()
    used = initialize_from_inputs(layers, batches(), config.lora.eva_config)
    model.train(was_training)
    world.copy_from_main(model)
    say(f"EVA         A from the inputs in {used} batches, {time.perf_counter() - started:.1f} s")
