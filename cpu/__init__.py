"""Optimizations for CPUs only.

Without this folder and the call of `speed_up`, the program computes the same function with other dropout masks and
other rounding. A program calls `speed_up` once its model is built; importing `lora` or `roberta` changes nothing.
"""

from torch import nn

from cpu.dropout import use_fast_dropout
from cpu.process import allow_onednn, keep_freed_memory


def speed_up(model: nn.Module) -> None:
    """Speed up this process and `model` on the CPU: cheap dropout masks, oneDNN's matmuls, freed memory kept."""
    allow_onednn()
    keep_freed_memory()
    use_fast_dropout(model)
