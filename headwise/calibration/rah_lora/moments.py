"""What value projections read on a calibration set: the second moments by which heads' outputs are compared."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headwise.calibration.rah_lora.projections import Projections
from headwise.vlm import Batch


class Moments:
    """Sums of `x x^T` over the real tokens read so far, x being what a layer's value projection reads, with a 1 behind it where that has a
    bias.
    """

    def __init__(self, projections: Projections, layers: Iterable[int]) -> None:
        """Of these layers, nothing read yet."""
        self._modules = {layer: projections.module(layer, "v_proj") for layer in layers}
        self._sums = dict[int, Tensor]()

    @contextmanager
    def reading(self, batch: Batch) -> Iterator[None]:
        """Passes of this batch inside the block are added up."""
        real = batch.inputs["attention_mask"].bool()
        with ExitStack() as stack:
            for layer, module in self._modules.items():
                stack.callback(module.register_forward_pre_hook(partial(self._add, layer, real)).remove)
            yield

    def of(self, layer: int) -> Float[Tensor, "in in"]:
        """The sum over all tokens, in fp32."""
        return self._sums[layer]

    def _add(self, layer: int, real: Tensor, module: nn.Module, inputs: tuple[Tensor]) -> None:
        given = inputs[0][real].float()
        if "bias" in dict(module.named_parameters()):
            given = torch.cat([given, torch.ones_like(given[:, :1])], dim=1)
        found = given.T @ given
        self._sums[layer] = self._sums[layer] + found if layer in self._sums else found
