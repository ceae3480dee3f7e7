"""What loading weights has in common, whoever's model they are: quietly, in which precision, on which device."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
from torch import nn
from transformers import modeling_gguf_pytorch_utils
from transformers.utils.logging import set_tqdm_hook, tqdm

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def torch_device(device: str = "auto") -> torch.device:
    """auto: the GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


def torch_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the hardware multiplies it (CUDA, CPUs with AMX or AVX512-BF16), else float32."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type != "cpu":
        return torch.bfloat16
    amx, avx512 = torch.cpu._is_amx_tile_supported, torch.cpu._is_avx512_bf16_supported  # pyright: ignore[reportPrivateUsage]
    return torch.bfloat16 if amx() or avx512() else torch.float32


@contextmanager
def quiet() -> Iterator[None]:
    """Without what is no news: progress bars where no terminal shows them (in a log every step of a bar is a line), PEFT 0.21 asking
    transformers 5.23 for `is_gradient_checkpointing`, an attribute that got another name, and sam2 1.1.0 compiling its transforms in a way
    that torch 2.14 has given up. Warning filters set inside end with the block.
    """
    before = set_tqdm_hook(lambda bar, args, kwargs: bar(*args, **{**kwargs, "disable": None}))  # None: tqdm looks for the terminal itself
    try:
        with warnings.catch_warnings(), patch.object(modeling_gguf_pytorch_utils, "tqdm", tqdm):  # the one bar that evades the hook
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
            yield
    finally:
        set_tqdm_hook(before)


@contextmanager
def restored_flags(module: nn.Module) -> Iterator[None]:
    """At the end each weight gets its `requires_grad` back, which PEFT takes from the model that it is put on."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No weight takes gradients inside: passes hold less for a backward one, and on a CPU bfloat16 is multiplied by the kernels that serve
    a model under PEFT, which round otherwise than those for weights that take gradients.
    """
    with restored_flags(module):
        module.requires_grad_(False)
        yield


def require_safetensors(folder: Path) -> None:
    """Raises ValueError if there are none: transformers would look for a pickle, whatever it was told."""
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder}: no weights as *.safetensors; pickled ones are not read")
