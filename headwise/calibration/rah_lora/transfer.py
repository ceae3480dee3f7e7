"""What a target head takes over from its anchors: the trimmed mean of their weights, kept to a low rank."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import trim_mean
from torch import Tensor
from torch.nn.functional import cosine_similarity

from headwise.calibration.rah_lora.moments import Moments
from headwise.calibration.rah_lora.projections import SHARED, Projection, Projections
from headwise.calibration.rah_lora.settings import RahLora
from headwise.calibration.rah_lora.targets import Head
from headwise.calibration.rah_lora.updates import Factors, Update, stacked

UNREAD = 1e-5
"""Directions of the values with less than this share of the strongest one's energy are left out: sums in fp32 do not know them."""


@dataclass(frozen=True)
class Anchor:
    """A head that a target learns from, how alike the two are, and in what: their maps, value and output projections, each a cosine."""

    head: Head
    similarity: float
    maps: float
    values: float
    outputs: float


@dataclass(frozen=True)
class Transfer:
    """What calibrating one target would change at step size 1; where a group shares its values, one target is the whole group.

    singular_values: of the heads' changes of the output projection, in full, before the rank was cut. damping: the cosine of that change
    with less of the same, `-W`: 1 where the head is only turned down, 0.71 where it becomes another as strong that has nothing of it.
    """

    heads: tuple[Head, ...]
    singular_values: Mapping[Head, Float[np.ndarray, " rank"]]
    damping: Mapping[Head, float]
    update: Update

    @property
    def layer(self) -> int:
        """The layer that it changes."""
        return self.heads[0][0]


def similarities(
    projections: Projections, target: Head, anchors: Sequence[Head], cosines: Float[np.ndarray, "own other"], settings: RahLora
) -> list[Anchor]:
    """`rho cos(maps) + (1 - rho) (w_V cos(W_V) + (1 - w_V) cos(W_O))` with every anchor (RAH-LoRA eq. 10 to 12), the most alike first.

    cosines: of the maps, all heads by all heads. Of equal ones the lower head is first.
    """
    place = projections.vlm.num_heads

    def alike(anchor: Head) -> Anchor:
        maps = float(cosines[target[0] * place + target[1], anchor[0] * place + anchor[1]])
        values, outputs = (_cosine(projections, target, anchor, name) for name in ("v_proj", "o_proj"))
        weights = settings.w_v * values + (1 - settings.w_v) * outputs
        return Anchor(anchor, settings.rho * maps + (1 - settings.rho) * weights, maps, values, outputs)

    return sorted(map(alike, anchors), key=lambda anchor: (-anchor.similarity, anchor.head))


def _cosine(projections: Projections, one: Head, other: Head, name: Projection) -> float:
    first, second = (projections.weight(head, name).flatten().double() for head in (one, other))
    return float(cosine_similarity(first, second, dim=0))


def transfers(projections: Projections, found: Mapping[Head, Sequence[Anchor]], moments: Moments, settings: RahLora) -> list[Transfer]:
    """Every target with its anchors as a change of weights. found: the targets that have anchors, with the k most alike. moments: of what
    the values of their layers read.

    Values and keys belong to a whole group of query heads, so they change only where all of it is targets, and then these are one.
    """
    groups = defaultdict[Head, list[Head]](list)
    for layer, head in sorted(found):
        groups[layer, head // projections.group].append((layer, head))
    units = [
        unit for heads in groups.values() for unit in ([tuple(heads)] if len(heads) == projections.group else [(head,) for head in heads])
    ]
    return [_transfer(projections, unit, {head: tuple(found[head]) for head in unit}, moments, settings) for unit in units]


def _transfer(
    projections: Projections, heads: tuple[Head, ...], anchors: Mapping[Head, tuple[Anchor, ...]], moments: Moments, settings: RahLora
) -> Transfer:
    parts, values, damping = list[Update](), dict[Head, np.ndarray](), dict[Head, float]()
    for head, name, change in _changes(projections, heads, anchors, moments, settings):
        factors, singular = low_rank(change, settings.rank)
        parts.append({projections.path(head[0], name): projections.placed(head, name, factors)})
        if name == "o_proj":
            values[head] = singular
            damping[head] = float(cosine_similarity(change.flatten(), -projections.weight(head, name).flatten(), dim=0))
    return Transfer(heads, values, damping, stacked(parts))


def _changes(
    projections: Projections, heads: tuple[Head, ...], anchors: Mapping[Head, tuple[Anchor, ...]], moments: Moments, settings: RahLora
) -> Iterator[tuple[Head, Projection, Float[Tensor, "out in"]]]:
    """`W_RAH - W` of every projection that changes; of a part of a group only the outputs do."""
    if len(heads) < projections.group:
        for head in heads:
            learned = _outputs(projections, head, [anchor.head for anchor in anchors[head]], moments, settings)
            yield head, "o_proj", _mean(learned, settings) - projections.weight(head, "o_proj")
        return
    names: tuple[Projection, ...] = ("q_proj", "k_proj", "v_proj", "o_proj") if settings.queries_and_keys else ("v_proj", "o_proj")
    for name in names:
        for head in heads[:1] if name in SHARED else heads:
            whose = heads if name in SHARED else (head,)
            models = {_owner(projections, a.head, name): a.head for h in whose for a in anchors[h]}  # taken over as they are
            learned = [projections.weight(model, name) for model in models.values()]
            yield head, name, _mean(learned, settings) - projections.weight(head, name)


def _owner(projections: Projections, head: Head, name: Projection) -> Head:
    """The head whose part of the projection this is: heads of a group share values and keys."""
    return (head[0], head[1] // projections.group) if name in SHARED else head


def _outputs(
    projections: Projections, head: Head, models: Sequence[Head], moments: Moments, settings: RahLora
) -> list[Float[Tensor, "out in"]]:
    """The anchors' output projections for a head that keeps its values: written in their basis, unless `grouped` says not to."""
    if settings.grouped == "output_only":
        return [projections.weight(model, "o_proj") for model in models]
    own = projections.values(head)
    read = moments.of(head[0]) if settings.grouped == "aligned" else torch.eye(own.shape[1], device=own.device)
    return [aligned(projections.weight(model, "o_proj"), projections.values(model), own, read) for model in models]


def aligned(
    output: Float[Tensor, "model width"],
    value: Float[Tensor, "width in"],
    own_value: Float[Tensor, "width in"],
    read: Float[Tensor, "in in"],
) -> Float[Tensor, "model width"]:
    """The output projection X that makes of the target's own values what the anchor makes of its: least squares of `(X V_own - O V) x`
    over the inputs x whose second moments `read` are; of all inputs alike where that is the identity.

    An output projection alone is written in the basis of the head's own values and means nothing on those of another head.
    """
    if torch.equal(value, own_value):
        return output
    own, read = own_value.double(), read.double()
    basis = value.double() @ read @ own.T @ torch.linalg.pinv(own @ read @ own.T, rtol=UNREAD, hermitian=True)
    return (output.double() @ basis).float()


def _mean(weights: Sequence[Float[Tensor, "out in"]], settings: RahLora) -> Float[Tensor, "out in"]:
    """Entry by entry, without floor(tau k) of the k at each end: with three anchors and tau = 0.1 nothing is dropped. 0 for the control
    that learns nothing.
    """
    found = torch.from_numpy(np.asarray(trim_mean(torch.stack(list(weights)).cpu().numpy(), settings.tau, axis=0))).to(weights[0])
    return found if settings.learned == "anchors" else torch.zeros_like(found)


def low_rank(change: Float[Tensor, "out in"], rank: int) -> tuple[Factors, Float[np.ndarray, " value"]]:
    """The best approximation of this rank (0: exact) as factors, and all singular values."""
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    kept = min(rank or len(values), len(values))
    return Factors(left[:, :kept] * values[:kept], right[:kept]), values.cpu().numpy()


def effective_rank(values: Float[np.ndarray, " value"]) -> float:
    """The exponential of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007); 0 without any."""
    total = values.sum()
    if not total:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))
