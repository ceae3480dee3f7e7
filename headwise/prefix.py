"""Images read once for all their questions: what the decoder makes of a prompt up to the image's last token serves each of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from headwise.vlm import VLM, Batch, decode_new, encode, stop_ids

PROBE = "What is it?"


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the beginning of some images' prompts, a row per image, and its tokens, which are the same for all of them."""

    cache: DynamicCache
    ids: Int[Tensor, " token"]

    def fits(self, batch: Batch) -> bool:
        """Whether all prompts begin so: they do not where a chat template puts the question before the image."""
        own = batch.inputs["input_ids"][:, : len(self.ids)]
        return own.shape[1] == len(self.ids) and bool((own == self.ids).all())

    def rows(self, images: Sequence[int]) -> DynamicCache:
        """A cache with a row for each of these images, to go on from; the prefix's own stays as it is."""
        cache, chosen = DynamicCache(), torch.tensor(images, device=self.ids.device)
        for index, layer in enumerate(self.cache.layers):
            assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
            cache.update(layer.keys[chosen], layer.values[chosen], index)
        return cache


def read_prefix(vlm: VLM, images: Sequence[Image.Image]) -> Prefix | None:
    """Read each image once. None where nothing can be shared: in families whose image tokens read the question or whose positions cannot be
    told from a cache, where keys slide out of a window, and where the images have unlike numbers of tokens.
    """
    if not vlm.family.shares_image or vlm.visual_id is None or getattr(vlm.text_config, "sliding_window", None):
        return None
    batch = encode(vlm, images, [PROBE] * len(images))
    ids = batch.inputs["input_ids"]
    length = int((batch.segments.system | batch.segments.visual)[0].nonzero().max()) + 1
    prefix = Prefix(DynamicCache(), ids[0, :length])
    if not prefix.fits(batch):
        return None
    cut = {name: tensor[:, :length] for name, tensor in batch.inputs.items() if tensor.shape[:2] == ids.shape}
    vlm.model(**{**batch.inputs, **cut}, logits_to_keep=1, use_cache=True, past_key_values=prefix.cache)
    return prefix


def continued_logits(
    vlm: VLM, prefix: Prefix, images: Sequence[int], batch: Batch, rows: Int[Tensor, " row"]
) -> tuple[Float[Tensor, "batch row vocabulary"], DynamicCache]:
    """The logits at some places after the prefix of prompts about its images, padded on the right, and the cache with all of them."""
    cache, start = prefix.rows(images), len(prefix.ids)
    ids, mask = batch.inputs["input_ids"][:, start:], batch.inputs["attention_mask"]
    return vlm.model(input_ids=ids, attention_mask=mask, past_key_values=cache, logits_to_keep=rows, use_cache=True).logits, cache


def generate_continued(vlm: VLM, prefix: Prefix, images: Sequence[int], batch: Batch, max_new_tokens: int) -> list[str]:
    """As `generate`, of prompts about the prefix's images, padded on the right; what fills them up stays in the cache, unseen."""
    mask, start = batch.inputs["attention_mask"], len(prefix.ids)
    lengths = mask.sum(1)
    rows, place = (lengths - 1 - start).unique(return_inverse=True)
    logits, cache = continued_logits(vlm, prefix, images, batch, rows)
    ends = torch.tensor(sorted(stop_ids(vlm)), device=mask.device)
    new = logits[torch.arange(len(place), device=place.device), place].argmax(-1, keepdim=True)
    done = torch.isin(new[:, 0], ends)
    for step in range(max_new_tokens - 1):
        if bool(done.all()):
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = (lengths + step)[:, None]
        logits = vlm.model(input_ids=new[:, -1:], attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True).logits
        token = torch.where(done, vlm.end_id, logits[:, -1].argmax(-1))
        new, done = torch.cat([new, token[:, None]], dim=1), done | torch.isin(token, ends)
    return decode_new(vlm, new)
