"""Device and number format of a run.

Mixed precision (Micikevicius et al. 2018): parameters and optimizer stay in float32, matmuls run in a 16-bit format.
bfloat16 has float32's exponent range. float16 has a narrower one: small gradients would underflow to zero, so the loss
is multiplied by a large scale before the backward pass and the gradients are divided by it afterwards ("loss scaling",
section 3.2; `torch.amp.GradScaler` finds the scale).
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
_DETERMINISTIC_WORKSPACES = (":4096:8", ":16:8")


@dataclass(frozen=True)
class Compute:
    """A device and the number format of its matmuls."""

    device: torch.device
    precision: str
    """bf16, fp16 or fp32."""

    @property
    def dtype(self) -> torch.dtype:
        """The number format as a torch dtype."""
        return _DTYPES[self.precision]

    def autocast(self) -> torch.autocast:
        """The context in which matmuls run in the chosen format; does nothing for fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.precision != "fp32", cache_enabled=True)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Loss scaling for fp16; disabled for the other formats."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def cast_frozen(self, encoder: nn.Module) -> None:
        """Cast the frozen parameters of linear layers once, instead of in every forward pass as autocast would.

        The results are the same, with half the memory for these weights. Trained parameters stay in float32, where an
        update of 1e-4 is not lost; so do embeddings and LayerNorm, which autocast does not cast.
        """
        if self.precision == "fp32":
            return
        for module in encoder.modules():
            if isinstance(module, nn.Linear):
                for parameter in module.parameters(recurse=False):
                    if not parameter.requires_grad and parameter.is_floating_point():
                        parameter.data = parameter.data.to(self.dtype)

    def compiled(self, model: nn.Module, how: str) -> nn.Module:
        """`model` as it is, compiled, or compiled with CUDA graphs (`train.compile`); the parameters are shared.

        Each batch width is compiled once; batches are padded to a multiple of `WIDTH_WHEN_COMPILED` tokens.
        """
        if how == "off":
            return model
        return torch.compile(model, dynamic=False, mode="reduce-overhead" if how == "cuda-graphs" else "default")

    def describe(self) -> str:
        """Device, threads and format, for the console."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        count = torch.get_num_threads()
        threads = "" if self.device.type == "cuda" else f", {count} thread{'s' if count > 1 else ''}"
        return f"{name}{threads}, {self.precision}"


def use_determinism(wanted: bool) -> None:
    """Restrict torch to deterministic kernels, or allow all; call it before the GPU is used.

    On a GPU, the order of a sum depends on thread timing, and cuBLAS's algorithm on the stream's workspace. With
    `wanted`, torch raises RuntimeError where it has no deterministic kernel, and cuBLAS gets a workspace of fixed size
    (CUBLAS_WORKSPACE_CONFIG, by default 24 MiB). On a CPU the kernels used here are always deterministic.
    Source: PyTorch, "Reproducibility"; NVIDIA, cuBLAS documentation, section 2.1.4 "Results Reproducibility".

    Raises ConfigError if the environment sets a workspace with which cuBLAS is not deterministic.
    """
    if wanted:
        workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _DETERMINISTIC_WORKSPACES[0])
        if workspace not in _DETERMINISTIC_WORKSPACES:
            raise ConfigError(
                f"train.deterministic: CUBLAS_WORKSPACE_CONFIG is {workspace!r} in the environment; unset it, or set "
                f"{' or '.join(_DETERMINISTIC_WORKSPACES)}"
            )
    torch.use_deterministic_algorithms(wanted)


def choose_compute(settings: TrainConfig) -> Compute:
    """Resolve `device` and `precision` where they are "auto".

    Raises ConfigError for a GPU where there is none, bf16 on a GPU without it, or CUDA graphs without a GPU.
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
