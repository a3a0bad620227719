"""The device that a network works on: which there is, what it does quickly, and its memory."""

from __future__ import annotations

import ctypes
import sys

import torch

from mnist_cnn.config.schema import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def find_device(name: str) -> torch.device:
    """The device that `name` (auto, cpu, cuda, mps) means here; auto takes CUDA where there is one.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("accelerator=cuda: torch finds no CUDA device here; use accelerator=cpu or accelerator=auto")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("accelerator=mps: torch finds no Apple GPU here; use accelerator=cpu or accelerator=auto")
    return torch.device(name)


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse what the device would do, but by emulation, up to hundreds of times slower.

    Raises:
        UserError: half precision away from CUDA, or bfloat16 on a device without instructions for it.
    """
    asked = device.type == "cuda" and precision == "bf16-mixed"
    if asked and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            "accelerator.precision=bf16-mixed: this GPU has no bfloat16 instructions and would emulate them; "
            "use 16-mixed or 32-true"
        )
    if device.type != "cpu" or precision == "32-true":
        return
    if precision == "16-mixed":
        raise UserError(
            "accelerator.precision=16-mixed needs CUDA; use 32-true, or bf16-mixed where the CPU has bfloat16"
        )
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.11 and newer
        has = torch.cpu.get_capabilities()
        fast = any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    else:  # torch 2.10 has no public way
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if not fast:
        raise UserError(
            "accelerator.precision=bf16-mixed: this CPU has no bfloat16 instructions (AVX-512 BF16, AMX or Arm's BF16) "
            "and would emulate them, far slower; leave accelerator.precision at 32-true"
        )


def keep_memory() -> None:
    """Have glibc keep what is freed: activations are else given back and faulted in again at every step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
