"""Images read once for all their questions: what the decoder makes of a prompt up to the image's last token serves each of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
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


@dataclass(frozen=True)
class Continued:
    """Prompts about a prefix's images, read on from it, with their answers or without, padded on the right.

    start: the prefix's tokens. rows: the places after them from which a prompt's first new token, or a token of its answer, is predicted.
    """

    batch: Batch
    start: int
    cache: DynamicCache
    rows: Int[Tensor, " row"]
    logits: Float[Tensor, "batch row vocabulary"]


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


def read_on(vlm: VLM, prefix: Prefix, images: Sequence[int], batch: Batch) -> Continued:
    """Read prompts about these of the prefix's images, which stays as it is."""
    start, real = len(prefix.ids), batch.inputs["attention_mask"].bool()
    prompt = prompt_tokens(batch)
    predicting = (real & ~prompt).roll(-1, dims=1)
    predicting[torch.arange(len(prompt), device=prompt.device), prompt.sum(1) - 1] = True
    rows, cache = predicting.any(0).nonzero()[:, 0] - start, _rows_of(prefix.cache, images)
    given = {"input_ids": batch.inputs["input_ids"][:, start:], "attention_mask": batch.inputs["attention_mask"]}
    logits = vlm.model(**given, past_key_values=cache, logits_to_keep=rows, use_cache=True).logits
    return Continued(batch, start, cache, rows, logits)


def generate_continued(vlm: VLM, continued: Continued, examples: Sequence[int], max_new_tokens: int) -> list[str]:
    """As `generate`, of these of the prompts; their answers and what fills them up stay in the cache, unseen."""
    chosen = torch.tensor(examples, device=continued.rows.device)
    mask = prompt_tokens(continued.batch)[chosen].long()
    lengths, cache = mask.sum(1), _rows_of(continued.cache, examples)
    place = torch.searchsorted(continued.rows, lengths - 1 - continued.start)
    ends = torch.tensor(sorted(stop_ids(vlm)), device=mask.device)
    new = continued.logits[chosen, place].argmax(-1, keepdim=True)
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


def prompt_tokens(batch: Batch) -> Bool[Tensor, "batch token"]:
    """The tokens of the prompts: neither answers, nor ends of turn after them, nor padding."""
    return batch.segments.system | batch.segments.visual | batch.segments.question


def _rows_of(cache: DynamicCache, rows: Sequence[int]) -> DynamicCache:
    """A cache of its own with these rows of another."""
    found = DynamicCache()
    for index, layer in enumerate(cache.layers):
        assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None
        chosen = torch.tensor(rows, device=layer.keys.device)
        found.update(layer.keys[chosen], layer.values[chosen], index)
    return found
