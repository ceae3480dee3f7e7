"""The proof that what is observed is what the model attends to, run on a small batch before any score counts."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from headwise.attention.entries import MASKED
from headwise.attention.layer import Attention, Places
from headwise.attention.observe import Observed, forward, observe
from headwise.attention.schema import MAPS
from headwise.attention.seam import set_implementation, visiting
from headwise.files import cache_folder, new_file, sha256_file
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
    "row_sums": Bound(1e-5, 5e-4, "the largest distance of a row's sum from 1"),
    "looking_ahead": Bound(0.0, 0.0, "the largest attention of an answer's row to a later token"),
    "layer_eager": Bound(1e-5, 5e-4, "the largest difference from eager attention on the same layer's queries and keys, in fp32"),
    "compiled_sums": Bound(1e-5, 1e-5, "the largest difference of a mean over all rows, compiled, from that of the entries (on a CPU)"),
    "model_eager": Bound(1e-5, 2e-2, "the mean over rows of the largest difference from the model's own eager attention"),
    "observed_logits": Bound(1e-5, 1e-1, "what observing changes in the logits, per largest logit; 0 where a kernel of torch serves"),
    "rebuilt_logits": Bound(1e-4, 1e-1, "what changes in the logits, per largest logit, if outputs are rebuilt from what was observed"),
    "replaced_logits": Bound(
        1e-3, 1e-3, "what changes in the logits, per largest logit, if every token attends to itself alone", least=True
    ),
    "padding": Bound(1e-4, 1e-1, "how far a padded batch of 2 is from two batches of 1, per largest value of the statistic"),
}
"""In bfloat16 the kernels' rounding adds up over the layers; there `layer_eager` is the strict comparison, but for the rounding in the
log-sum-exp that the kernel itself gives."""


def proved(vlm: VLM, revision: str) -> dict[str, float]:
    """`prove`, once for each revision of a model: its figures are kept in the cache folder, also by type and kind of device, the code that
    reads attention and prompts, and the versions of the libraries under it, any of which may change what is computed.
    """
    here = Path(__file__).parent
    code = [sha256_file(module) for folder in (here, here.parent / "vlm", here.parent) for module in sorted(folder.glob("*.py"))]
    device = torch.cuda.get_device_name(vlm.device) if vlm.device.type == "cuda" else vlm.device.type
    parts = (revision, vlm.dtype, device, code, torch.__version__, transformers.__version__, version("numba"))
    path = cache_folder() / "proofs" / f"{sha256(repr(parts).encode()).hexdigest()[:16]}.json"
    if not path.is_file():
        figures = prove(vlm)
        with new_file(path) as temporary:
            temporary.write_text(json.dumps(figures))
    return json.loads(path.read_text())


def prove(vlm: VLM) -> dict[str, float]:
    """Measure each figure of `BOUNDS` on two seeded examples and return them.

    Of a whole matrix of attention one layer's is held at a time. Raises ValueError naming the figure that is out of its bounds: the
    statistics of this model would not mean what they say.
    """
    batch = _probe(vlm)
    plain: Tensor = forward(vlm, batch, logits_to_keep=0).logits[batch.segments.real].float()
    layers, observed_logits = _layers(vlm, batch)
    scale = float(plain.abs().max())
    figures = {
        **_layer_figures(layers, batch),
        "model_eager": _model_eager(vlm, batch, layers),
        "observed_logits": float((observed_logits - plain).abs().max()) / scale,
        "rebuilt_logits": float((_logits_with(vlm, batch, _rebuilt) - plain).abs().max()) / scale,
        "replaced_logits": float((_logits_with(vlm, batch, _to_itself) - plain).abs().max()) / scale,
        "padding": _padding(vlm),
    }
    _check(figures, str(vlm.dtype).removeprefix("torch."), vlm.base.config.model_type)
    return figures


def _check(figures: dict[str, float], dtype: str, model_type: str) -> None:
    for name, figure in figures.items():
        bound = BOUNDS[name]
        limit: float = bound.bfloat16 if dtype in ("bfloat16", "float16") else bound.float32
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


def _layers(vlm: VLM, batch: Batch) -> tuple[list[Attention], Tensor]:
    """What each layer computes its attention from, and the logits under observation."""
    seen = list[Attention]()

    def visit(attention: Attention, output: Tensor) -> None:
        seen.append(attention)

    with visiting(vlm, visit):
        logits = forward(vlm, batch, logits_to_keep=0).logits
    return seen, logits[batch.segments.real].float()


def _layer_figures(layers: Sequence[Attention], batch: Batch) -> dict[str, float]:
    """The figures that one layer's queries and keys decide; the largest over the layers."""
    later = torch.ones(batch.segments.real.shape[1], batch.segments.real.shape[1], dtype=torch.bool, device=layers[0].query.device).triu(1)
    found: dict[str, float] = {"row_sums": 0.0, "looking_ahead": 0.0, "layer_eager": 0.0, "compiled_sums": 0.0}
    for attention in layers:
        ours = _probabilities(attention)
        of_answers = (ours * later).transpose(1, 2)[batch.segments.answer]
        figures = {
            "row_sums": (ours.sum(-1) - 1).abs().transpose(1, 2)[batch.segments.real],
            "looking_ahead": of_answers,
            "layer_eager": _row_distances(_eager(attention), ours, batch),
            "compiled_sums": _compiled_distance(attention, ours, batch),
        }
        found = {name: _larger(found[name], float(values.max())) for name, values in figures.items()}
    return found


def _compiled_distance(attention: Attention, ours: Float[Tensor, "batch head query key"], batch: Batch) -> Tensor:
    """Over the rows of real tokens: the compiled kernels are the same for any number of them."""
    if not attention.is_plain:
        return torch.zeros(1)
    from headwise.attention import fused

    rows, distances = Places.of(batch.segments.real), list[Tensor]()
    for example, (real, visual) in enumerate(zip(batch.segments.real, batch.segments.visual, strict=True)):
        part, A = attention.part(example, rows), ours[example, :, real]
        outside = A * ~visual
        share = outside.sum(-1, keepdim=True).clamp_min(torch.finfo(A.dtype).tiny)
        expected = (A.sum(1), (outside / share).sum(1), (A * visual).amax(-1).sum(1))
        for found, sums in zip((*fused.row_sums(part, visual), fused.column_sums(part)), (*expected, expected[0]), strict=True):
            distances.append((found - sums).abs().flatten() / real.sum())
    return torch.cat(distances)


def _larger(one: float, other: float) -> float:
    """The larger figure; what is no number stays none, so that the check finds it."""
    return float(np.maximum(one, other))


def _probabilities(attention: Attention) -> Float[Tensor, "batch head query key"]:
    return attention.probabilities(attention.every_row())


def _eager(attention: Attention) -> Float[Tensor, "batch head query key"]:
    """Attention the slow way: keys repeated for every query head, the whole mask at once."""
    groups, queries, keys = attention.query.shape[1] // attention.key.shape[1], attention.query.shape[2], attention.key.shape[2]
    mask = attention.mask
    if mask is None:
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=attention.query.device)
        mask = allowed.tril() if attention.causal else allowed
    scores = torch.einsum("bhqd,bhkd->bhqk", attention.query.float(), attention.key.float().repeat_interleave(groups, dim=1))
    scores = scores * attention.scaling
    if attention.softcap is not None:
        scores = torch.tanh(scores / attention.softcap) * attention.softcap
    return (scores + torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, MASKED)).softmax(-1)


def _model_eager(vlm: VLM, batch: Batch, layers: Sequence[Attention]) -> float:
    """The model's own eager attention, which its layers return, compared layer by layer and let go."""
    distances = list[Tensor]()

    def compare(module: nn.Module, arguments: object, returned: tuple[Tensor, Tensor]) -> None:
        ours = _probabilities(layers[len(distances)])
        distances.append(_row_distances(returned[1].float(), ours, batch).mean())

    before = vlm.text_config._attn_implementation  # pyright: ignore[reportPrivateUsage] - there is no public one
    assert before is not None
    hooks = [layer.self_attn.register_forward_hook(compare) for layer in _decoder_layers(vlm)]
    set_implementation(vlm, "eager")
    try:
        forward(vlm, batch)
    finally:
        set_implementation(vlm, before)
        for hook in hooks:
            hook.remove()
    return float(torch.stack(distances).mean())


def _decoder_layers(vlm: VLM) -> Any:
    return getattr(vlm.decoder, "layers")  # noqa: B009 - every decoder of `FAMILIES` has them


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
    return float(np.max([_difference(both, one, index) for index, one in enumerate(alone)]))


def _difference(both: Observed, one: Observed, index: int) -> float:
    """The largest difference of an example's statistics, each relative to the statistic's largest value."""
    pairs = [(both.scalars[name][index], one.scalars[name][0]) for name in one.scalars]
    pairs += [(both.maps[name][index], one.maps[name][0]) for name in MAPS]
    return float(np.max([np.abs(a - b).max(initial=0) / np.maximum(np.abs(b).max(initial=0), 1e-6) for a, b in pairs]))
