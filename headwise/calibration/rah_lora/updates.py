"""Low-rank changes of projections: as hooks while they are tried, and as the factors of a PEFT LoRA once they are kept."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear


@dataclass(frozen=True)
class Factors:
    """A change `up @ down` of a linear map's weight, in fp32: PEFT's lora_B and lora_A at scale 1."""

    up: Float[Tensor, "out rank"]
    down: Float[Tensor, "rank in"]


Update = Mapping[str, Factors]
"""Changes by the projection's full path in the model."""


def scaled(update: Update, alpha: float) -> Update:
    """The update times a step size."""
    return {path: Factors(alpha * factors.up, factors.down) for path, factors in update.items()}


def stacked(updates: Sequence[Update]) -> Update:
    """Their sum: the factors of a projection side by side, its rank the sum of theirs."""
    paths = sorted({path for update in updates for path in update})
    own = {path: [update[path] for update in updates if path in update] for path in paths}
    return {
        path: Factors(torch.cat([f.up for f in all_], 1).contiguous(), torch.cat([f.down for f in all_], 0).contiguous())
        for path, all_ in own.items()
    }


@contextmanager
def updated(model: nn.Module, update: Update) -> Iterator[None]:
    """The model with these changes inside the block, computed as PEFT computes a LoRA, to the last bit, which in bfloat16 is what makes
    the divergence that of the adapter; its weights are not touched.
    """
    handles = [model.get_submodule(path).register_forward_hook(partial(_add, factors)) for path, factors in update.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(factors: Factors, _module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    (given,) = inputs
    return (output + linear(linear(given.to(factors.down.dtype), factors.down), factors.up)).to(output.dtype)
