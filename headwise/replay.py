"""A batch that is run once, and then again from any layer on: a change of a layer leaves what lies below it as it was."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwise.likelihood import answer_logits, answer_targets
from headwise.vlm import VLM, Batch

Call = tuple[tuple[Any, ...], dict[str, Any]]
EXACT, COARSE = 1e-4, 5e-2
"""How far the replayed logits may be from the model's own, per largest logit: in fp32 (or finer), and in coarser types."""


class Replay:
    """A pass over one batch: the logits of the model as it was, and those of the model, changed since, from a layer on.

    A pass from layer l on costs the share (L - l) / L of a whole one.
    """

    def __init__(
        self, vlm: VLM, rows: Bool[Tensor, "batch token"], run: Callable[[], Float[Tensor, "row vocabulary"]], layers: Collection[int]
    ) -> None:
        """Run the model once and keep the stream before each of these layers.

        rows: the tokens whose logits are wanted, which `run` gives from the one pass that it makes. Raises ValueError if they cannot be
        had from the decoder's stream, as the model does more than it is known to.
        """
        self._vlm, self._layers, self._rows = vlm, _layers(vlm), rows
        self.examples = rows.nonzero()[:, 0]
        with torch.no_grad(), _kept(vlm, layers) as kept:
            own = run()
            self.logits = self._read(kept.output)
        self._call, self._streams = kept.call, kept.streams
        worst = float((self.logits - own).abs().max() / own.abs().max().clamp_min(1))
        bound = EXACT if vlm.dtype in (torch.float32, torch.float64) else COARSE
        if not worst <= bound:
            raise ValueError(f"{vlm.base.config.model_type}: its logits are not those of its decoder's stream, they are off by {worst:.2g}")

    def again(self, start: int) -> Float[Tensor, "row vocabulary"]:
        """The logits of the model as it is now: changed in no layer below `start`, one of those whose stream was kept."""
        arguments, options = self._call
        with torch.no_grad(), self._from(start):
            return self._read(self._vlm.decoder(*arguments, **options).last_hidden_state)

    def _read(self, stream: Float[Tensor, "batch token width"]) -> Float[Tensor, "row vocabulary"]:
        head = self._vlm.base.get_output_embeddings()
        assert head is not None
        logits = head(stream[self._rows])
        cap = getattr(self._vlm.text_config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @contextmanager
    def _from(self, start: int) -> Iterator[None]:
        """The layers below hand on what they get, and the first one gets its stream."""

        def passed(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden_states

        def replaced(_module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            stream = self._streams[start]
            return ((stream, *arguments[1:]), options) if arguments else ((), {**options, "hidden_states": stream})

        handle = self._layers[start].register_forward_pre_hook(replaced, with_kwargs=True)
        try:
            for layer in self._layers[:start]:
                layer.forward = passed
            yield
        finally:
            handle.remove()
            for layer in self._layers[:start]:
                del layer.forward


def replay_answers(vlm: VLM, batch: Batch, layers: Collection[int]) -> Replay:
    """Of the logits from which the tokens of prompts' answers are predicted; its `examples` say whose each is. Raises as `Replay`."""
    return Replay(vlm, answer_targets(batch).roll(-1, dims=1), partial(answer_logits, vlm, batch), layers)


@dataclass
class _Kept:
    """What the decoder was given and gave, and the stream before some layers."""

    call: Call = ((), {})
    output: Any = None
    streams: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def _kept(vlm: VLM, layers: Collection[int]) -> Iterator[_Kept]:
    """Filled by a pass of the model inside the block."""
    kept, modules = _Kept(), _layers(vlm)

    def keep_call(_module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        kept.call = (arguments, options)

    def keep_stream(layer: int, _module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        kept.streams[layer] = arguments[0] if arguments else options["hidden_states"]

    def keep_output(_module: nn.Module, _arguments: tuple[Any, ...], output: Any) -> None:
        kept.output = output.last_hidden_state

    with ExitStack() as stack:
        handles = [vlm.decoder.register_forward_pre_hook(keep_call, with_kwargs=True), vlm.decoder.register_forward_hook(keep_output)]
        handles += [modules[layer].register_forward_pre_hook(partial(keep_stream, layer), with_kwargs=True) for layer in layers]
        for handle in handles:
            stack.callback(handle.remove)
        yield kept


def _layers(vlm: VLM) -> list[nn.Module]:
    layers = vlm.decoder.layers
    assert isinstance(layers, nn.ModuleList)
    return list(layers)
