"""Where a run computes and in which number format.

Mixed precision (Micikevicius et al. 2018): parameters and optimizer stay in float32, matmuls run in a 16-bit format.
bfloat16 has float32's exponent, so nothing else is needed. float16 has a narrow one: small gradients would become
zero, so the loss is multiplied by a large scale before the backward pass and the gradients divided by it after
("loss scaling", section 3.2 there; `torch.amp.GradScaler` finds the scale).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import nn

from training.config import TrainConfig
from training.errors import ConfigError

WIDTH_WHEN_COMPILED = 32  # tokens; four widths up to length 128
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_REPEATABLE_WORKSPACES = (":4096:8", ":16:8")


@dataclass(frozen=True)
class Compute:
    """A device and the number format of its matmuls."""

    device: torch.device
    precision: str
    """bf16, fp16 or fp32."""

    @property
    def dtype(self) -> torch.dtype:
        """The number format as torch calls it."""
        return _DTYPES[self.precision]

    def autocast(self) -> torch.autocast:
        """The context in which matmuls run in the chosen format; does nothing for fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.precision != "fp32", cache_enabled=True)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for fp16; for the others a scaler that passes everything through."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def cast_frozen(self, encoder: nn.Module) -> None:
        """Keep what autocast would cast anew in every forward pass, the frozen weights of linear layers, cast for good.

        The same numbers, half the memory for these weights, and no cast in any step. What is trained stays in float32,
        where an update of 1e-4 is not lost; so do embeddings and LayerNorm, which autocast leaves alone.
        """
        if self.precision == "fp32":
            return
        for module in encoder.modules():
            if isinstance(module, nn.Linear):
                for parameter in module.parameters(recurse=False):
                    if not parameter.requires_grad:
                        parameter.data = parameter.data.to(self.dtype)

    def compiled(self, model: nn.Module, how: str) -> nn.Module:
        """`model` as `train.compile` says: as it is, compiled, or compiled into CUDA graphs; parameters are shared.

        Each width of a batch is compiled once; batches are padded to a multiple of `WIDTH_WHEN_COMPILED` tokens.
        """
        if how == "off":
            return model
        return torch.compile(model, dynamic=False, mode="reduce-overhead" if how == "cuda-graphs" else "default")

    def describe(self) -> str:
        """For the lines printed before training."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        count = torch.get_num_threads()
        threads = "" if self.device.type == "cuda" else f", {count} thread{'s' if count > 1 else ''}"
        return f"{name}{threads}, {self.precision}"


def use_determinism(wanted: bool) -> None:
    """Let torch use only kernels that give the same bits each time, or any; to be called before the GPU is used.

    On a GPU sums are added up in whatever order threads finish, and cuBLAS may choose another algorithm from one
    stream's workspace to the next. With `wanted`, torch takes a kernel with a fixed order where it has one and raises
    RuntimeError where it has none, and cuBLAS gets a workspace of fixed size by CUBLAS_WORKSPACE_CONFIG, 24 MiB unless
    the environment says otherwise. On a CPU the kernels used here are repeatable with or without it.
    Source: PyTorch, "Reproducibility"; NVIDIA, cuBLAS documentation, section 2.1.4 "Results Reproducibility".

    Raises ConfigError if the environment asks for a workspace with which cuBLAS is not repeatable.
    """
    if wanted:
        workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _REPEATABLE_WORKSPACES[0])
        if workspace not in _REPEATABLE_WORKSPACES:
            raise ConfigError(
                f"train.deterministic: CUBLAS_WORKSPACE_CONFIG is {workspace!r} in the environment; unset it, or set "
                f"{' or '.join(_REPEATABLE_WORKSPACES)}"
            )
    torch.use_deterministic_algorithms(wanted)


def choose_compute(settings: TrainConfig) -> Compute:
    """Resolve `device` and `precision` where they are "auto".

    Raises ConfigError if a GPU is asked for and there is none, bf16 on a GPU without it, or CUDA graphs without a GPU.
    """
    has_cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not has_cuda:
        raise ConfigError("train.device is cuda, but torch sees no GPU; choose cpu or auto")
    device = torch.device("cuda" if settings.device == "cuda" or (settings.device == "auto" and has_cuda) else "cpu")
    bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    precision = settings.precision
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16" if bf16 else "fp16"
    if precision == "bf16" and not bf16:
        raise ConfigError("train.precision is bf16, but this GPU computes it in emulation only; choose fp16 or auto")
    if settings.compile == "cuda-graphs" and device.type != "cuda":
        raise ConfigError("train.compile is cuda-graphs, but the run is not on a GPU; choose off or on")
    return Compute(device, precision)
