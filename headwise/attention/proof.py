"""The proof that what is observed is what the model attends to, run on a small batch before any score counts."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from headwise.attention.observe import Observed, forward, observe
from headwise.attention.schema import MAPS
from headwise.attention.seam import Attention, set_implementation, visiting
from headwise.vlm import VLM, Batch, encode

QUESTIONS = ("What is in the picture?", "Is there a small green star to the left of the large circle?")
ANSWERS = ("A red circle.", "Yes, it is to the left.")


@dataclass(frozen=True)
class Bound:
    """How large a figure may be in fp32 and in bfloat16, or how small if `least`; `meaning` is read by whoever sees it fail."""

    float32: float
    bfloat16: float
    meaning: str
    least: bool = False


BOUNDS = {
    "row_sums": Bound(1e-5, 1e-5, "the largest distance of a row's sum from 1"),
    "layer_eager": Bound(1e-5, 1e-5, "the largest difference from eager attention on the same layer's queries and keys, in fp32"),
    "model_eager": Bound(1e-5, 2e-2, "the mean over rows of the largest difference from the model's own eager `output_attentions`"),
    "observed_logits": Bound(0.0, 0.0, "what observing changes in the logits"),
    "rebuilt_logits": Bound(1e-4, 1e-1, "what changes in the logits, per largest logit, if outputs are rebuilt from what was observed"),
    "replaced_logits": Bound(
        1e-3, 1e-3, "what changes in the logits, per largest logit, if every token attends to itself alone", least=True
    ),
    "padding": Bound(1e-4, 1e-1, "how far a padded batch of 2 is from two batches of 1, per largest value of the statistic"),
}
"""In bfloat16 the kernels' rounding adds up over the layers; there `layer_eager` is the strict comparison."""


def prove(vlm: VLM) -> dict[str, float]:
    """Measure each figure of `BOUNDS` on two seeded examples and return them.

    Raises ValueError naming the figure that is out of its bounds: the statistics of this model would not mean what they say.
    """
    batch = _probe(vlm)
    plain: Tensor = forward(vlm, batch, logits_to_keep=0).logits[batch.segments.real].float()
    seen, observed_logits = _seen(vlm, batch)
    scale = float(plain.abs().max())
    figures = {
        "row_sums": max(float((probabilities.sum(-1) - 1).abs().max()) for _, probabilities in seen),
        "layer_eager": max(float(_row_distances(_eager(attention), probabilities, batch).max()) for attention, probabilities in seen),
        "model_eager": _model_eager(vlm, batch, [probabilities for _, probabilities in seen]),
        "observed_logits": float((observed_logits - plain).abs().max()),
        "rebuilt_logits": float((_logits_with(vlm, batch, _rebuilt) - plain).abs().max()) / scale,
        "replaced_logits": float((_logits_with(vlm, batch, _to_itself) - plain).abs().max()) / scale,
        "padding": _padding(vlm),
    }
    _check(figures, str(vlm.dtype).removeprefix("torch."), vlm.base.config.model_type)
    return figures


def _check(figures: dict[str, float], dtype: str, model_type: str) -> None:
    for name, figure in figures.items():
        bound = BOUNDS[name]
        limit: float = bound.float32 if dtype == "float32" else bound.bfloat16
        if not (figure >= limit if bound.least else figure <= limit):
            raise ValueError(
                f"{model_type} in {dtype}: {name} = {figure:.2g}, {'at least' if bound.least else 'at most'} {limit:g} is needed "
                f"({bound.meaning}); its attention statistics cannot be trusted: try dtype float32"
            )


def _probe(vlm: VLM, examples: slice = slice(None)) -> Batch:
    """Two questions of unlike length about two seeded pictures (no picture for a text-only model)."""
    random = np.random.default_rng(0)
    blocks = [random.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in QUESTIONS]
    images = [None if vlm.visual_id is None else Image.fromarray(b).resize((64, 64), Image.Resampling.NEAREST) for b in blocks]
    return encode(vlm, images[examples], QUESTIONS[examples], ANSWERS[examples])


def _seen(vlm: VLM, batch: Batch) -> tuple[list[tuple[Attention, Tensor]], Tensor]:
    """Each layer's attention with its whole probabilities, and the logits under observation."""
    seen: list[tuple[Attention, Tensor]] = []

    def visit(attention: Attention, output: Tensor) -> None:
        seen.append((attention, _probabilities(attention)))

    with visiting(vlm, visit):
        logits = forward(vlm, batch, logits_to_keep=0).logits
    return seen, logits[batch.segments.real].float()


def _probabilities(attention: Attention) -> Float[Tensor, "batch head query key"]:
    return torch.cat([rows.probabilities for rows in attention.rows(block=16)], dim=2)


def _eager(attention: Attention) -> Float[Tensor, "batch head query key"]:
    """Attention the slow way: keys repeated for every query head, the whole mask at once."""
    groups, queries, keys = attention.query.shape[1] // attention.key.shape[1], attention.query.shape[2], attention.key.shape[2]
    mask = attention.mask
    if mask is None:
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=attention.query.device)
        mask = allowed.tril() if attention.causal else allowed
    bias = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask.float()
    scores = torch.einsum("bhqd,bhkd->bhqk", attention.query.float(), attention.key.float().repeat_interleave(groups, dim=1))
    return (scores * attention.scaling + bias).softmax(-1)


def _model_eager(vlm: VLM, batch: Batch, seen: list[Tensor]) -> float:
    before = vlm.text_config._attn_implementation  # pyright: ignore[reportPrivateUsage] - there is no public one
    assert before is not None
    set_implementation(vlm, "eager")
    try:
        eager = forward(vlm, batch, output_attentions=True).attentions
    finally:
        set_implementation(vlm, before)
    rows = [_row_distances(theirs.float(), ours, batch).mean() for theirs, ours in zip(eager, seen, strict=True)]
    return float(torch.stack(rows).mean())


def _row_distances(
    theirs: Float[Tensor, "batch head query key"], ours: Float[Tensor, "batch head query key"], batch: Batch
) -> Float[Tensor, "row head"]:
    """The largest difference in each row of a real token."""
    return (theirs - ours).abs().amax(dim=3).transpose(1, 2)[batch.segments.real]


def _logits_with(vlm: VLM, batch: Batch, replace: Callable[[Attention, Tensor], Tensor]) -> Tensor:
    with visiting(vlm, replace):
        return forward(vlm, batch, logits_to_keep=0).logits[batch.segments.real].float()


def _rebuilt(attention: Attention, output: Tensor) -> Tensor:
    """The layer's output from the observed probabilities and the values."""
    return _apply(_probabilities(attention), attention, output)


def _to_itself(attention: Attention, output: Tensor) -> Tensor:
    """The layer's output if every token attended to itself alone."""
    identity = torch.eye(attention.query.shape[2], attention.key.shape[2], device=output.device)
    return _apply(identity.expand(*attention.query.shape[:2], -1, -1), attention, output)


def _apply(probabilities: Float[Tensor, "batch head query key"], attention: Attention, output: Tensor) -> Tensor:
    groups = probabilities.shape[1] // attention.value.shape[1]
    values = attention.value.float().repeat_interleave(groups, dim=1)
    return (probabilities @ values).transpose(1, 2).to(output.dtype).contiguous()


def _padding(vlm: VLM) -> float:
    both = observe(vlm, _probe(vlm))
    alone = [observe(vlm, _probe(vlm, slice(index, index + 1))) for index in range(len(QUESTIONS))]
    return max(_difference(both, one, index) for index, one in enumerate(alone))


def _difference(both: Observed, one: Observed, index: int) -> float:
    """The largest difference of an example's statistics, each relative to the statistic's largest value."""
    pairs = [(both.scalars[name][index], one.scalars[name][0]) for name in one.scalars]
    pairs += [(both.maps[name][index], one.maps[name][0]) for name in MAPS]
    return max(float(np.abs(a - b).max(initial=0) / max(float(np.abs(b).max(initial=0)), 1e-6)) for a, b in pairs)
