"""The device that the networks run on, and their dtype."""

from __future__ import annotations

import warnings
from typing import Literal

import torch

from fewshot_diti.distributed import process_state

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
TrainingDtype = Literal["auto", "float32", "bfloat16"]  # float16 loses small gradients
_DEVICES = ("cpu", "cuda", "xpu", "mps")
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def default_device() -> torch.device:
    """The accelerator of this process (CUDA, XPU or MPS) where there is one, else the CPU.

    Warns where there is an accelerator of another kind, which is not used.
    """
    device = process_state().device
    if device.type in _DEVICES:
        return device
    warnings.warn(f"The accelerator {device.type!r} is not supported; the networks run on the CPU.", stacklevel=2)
    return torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware of the device has it, else float32. On MPS float32: the first chips lack it."""
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "xpu":
        has_bfloat16 = torch.xpu.is_bf16_supported(including_emulation=False)
    else:
        has_bfloat16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def as_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """The dtype that is meant: a torch.dtype, the name of one, or "auto" for the `default_dtype` of the device.

    Raises:
        ValueError: another name, or a dtype that networks cannot have.
    """
    if dtype == "auto":
        return default_dtype(device)
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype={dtype!r}; pass 'auto', one of {_DTYPES}, or the torch.dtype of that name.")
    found: torch.dtype = getattr(torch, name)
    return found
