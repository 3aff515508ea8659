"""What makes a CPU faster, and nothing else.

Delete this folder and the line that calls it, and the program computes the same with other dropout masks.

`speed_up` is called by a program, once its model is built. Importing a module of `lora` or `roberta` changes nothing.
"""

from torch import nn

from cpu.dropout import use_fast_dropout
from cpu.process import allow_onednn, keep_freed_memory


def speed_up(model: nn.Module) -> None:
    """Make this process, and `model` on the CPU, faster: cheap dropout masks, oneDNN's matmuls, freed memory kept."""
    allow_onednn()
    keep_freed_memory()
    use_fast_dropout(model)
