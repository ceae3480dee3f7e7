"""SAM 2: masks of boxes, many boxes per image and many images at once (Ravi et al. 2024, arXiv 2408.00714)."""

import pickle
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import interpolate
from yaml import YAMLError

from headwise.checkpoints import quiet, require_safetensors, torch_device, torch_dtype
from headwise.masks.annotation import Pictured
from headwise.masks.florence2 import Box
from headwise.masks.quality import Bounds
from headwise.masks.rle import bounds, encode_columns
from headwise.masks.settings import Segmentation

STRIDES, LEVELS = (4, 8, 16, 32), 3
"""Of the levels of features, and how many of them the mask decoder looks at."""
BOXES_AT_ONCE = 64
PIXELS_AT_ONCE = 1 << 26
"""How many logits are held at the image's own size, if that is not a single mask's already: a quarter of a gigabyte."""
OFFSET = 1.0
"""How far from the threshold the logits are for the stability, as in SAM's own generator of masks."""
Logits = Float[Tensor, "box row column"]


@dataclass(frozen=True)
class Segmented:
    """A mask at the image's size as COCO counts, its share of the image, the box around it, SAM 2's estimate of its IoU with the truth, and
    the IoU of the masks at logits of OFFSET and of -OFFSET.
    """

    rle: str
    area: float
    bounds: Bounds
    predicted_iou: float
    stability: float


@runtime_checkable
class Segmenter(Protocol):
    """A SAM 2 behind either library."""

    def embed(self, images: Sequence[Image.Image]) -> object:
        """The images' embeddings."""
        ...

    def logits(self, embedded: Any, index: int, boxes: Float[Tensor, "box 4"]) -> tuple[Logits, Float[Tensor, "box"]]:
        """The logits of the masks of one embedded image's boxes (fractions of its sides), and the estimates of their IoU."""
        ...


def segment(
    segmenter: Segmenter, window: Sequence[Pictured], boxes: Sequence[Sequence[Box]], batch_size: int
) -> list[dict[Box, Segmented]]:
    """The masks of each image's boxes; an image is embedded once, and one without boxes not at all."""
    found: list[dict[Box, Segmented]] = [{} for _ in window]
    asked = [place for place, own in enumerate(boxes) if own]
    with torch.inference_mode():
        for first in range(0, len(asked), batch_size):
            batch = asked[first : first + batch_size]
            masks = _segment_batch(segmenter, [window[place] for place in batch], [boxes[place] for place in batch])
            for place, own in zip(batch, masks, strict=True):
                found[place] = own
    return found


def _segment_batch(segmenter: Segmenter, batch: Sequence[Pictured], boxes: Sequence[Sequence[Box]]) -> list[dict[Box, Segmented]]:
    embedded = segmenter.embed([pictured.image for pictured in batch])
    found: list[dict[Box, Segmented]] = [{} for _ in batch]
    for index, own in enumerate(boxes):
        for start in range(0, len(own), BOXES_AT_ONCE):
            part = own[start : start + BOXES_AT_ONCE]
            logits, ious = segmenter.logits(embedded, index, torch.tensor(part))
            found[index] |= dict(zip(part, _masks(logits.float(), ious.float(), batch[index]), strict=True))
    return found


def _masks(logits: Logits, predicted_ious: Float[Tensor, "box"], pictured: Pictured) -> list[Segmented]:
    height, width = pictured.height, pictured.width
    sure, possible = ((logits > offset).sum(dim=(1, 2)) for offset in (OFFSET, -OFFSET))
    stabilities = torch.where(possible > 0, sure / possible, 0.0).tolist()
    rles: list[str] = []
    for part in logits.split(max(1, PIXELS_AT_ONCE // (height * width))):
        full = interpolate(part[:, None], (height, width), mode="bilinear", align_corners=False)[:, 0]
        columns = (full > 0).mT.contiguous()  # turned where it was computed: COCO's runs go down the columns
        rles += [encode_columns(mask) for mask in columns.cpu().numpy()]
    figures = zip(rles, predicted_ious.tolist(), stabilities, strict=True)
    return [Segmented(rle, *bounds(rle, height, width), iou, stability) for rle, iou, stability in figures]


class Sam2Package:
    """SAM 2 by Meta's package."""

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        """dtype: what the model computes in; its weights stay fp32."""
        from sam2.sam2_image_predictor import SAM2ImagePredictor

        with quiet():
            self.predictor: Any = SAM2ImagePredictor(model)  # what is needed of it is private: it takes one image at a time
        self.dtype = dtype
        sides = {stride: model.image_size // stride for stride in STRIDES}
        self.predictor._bb_feat_sizes = [(side, side) for side in list(sides.values())[:LEVELS]]  # it takes 1,024 px for granted
        for side in sides.values():  # positions are kept for good: those of one image, not of the whole first batch (85 MB each)
            model.image_encoder.neck.position_encoding._pe(1, self.predictor.device, side, side)

    def embed(self, images: Sequence[Image.Image]) -> object:
        """A predictor of these images, on the same model: one keeps what it embedded until it is gone."""
        predictor = copy(self.predictor)
        with _computing(predictor.device, self.dtype):
            predictor.set_image_batch([np.array(image) for image in images])
        predictor._orig_hw = [(1, 1)] * len(images)  # what it would enlarge the masks to, which is done elsewhere
        return predictor

    def logits(self, embedded: Any, index: int, boxes: Float[Tensor, "box 4"]) -> tuple[Logits, Float[Tensor, "box"]]:
        """As the package's own generator of masks asks: with `normalize_coords` off it takes fractions."""
        _, _, _, prompts = embedded._prep_prompts(None, None, boxes, None, normalize_coords=False, img_idx=index)
        with _computing(embedded.device, self.dtype):
            _, ious, logits = embedded._predict(None, None, prompts, multimask_output=False, return_logits=True, img_idx=index)
        return logits[:, 0], ious[:, 0]


class Sam2Transformers:
    """SAM 2 by transformers."""

    def __init__(self, model: Any, image_processor: Any, dtype: torch.dtype) -> None:
        """dtype: what the model computes in; its weights stay fp32."""
        self.model, self.image_processor, self.dtype = model, image_processor, dtype

    def embed(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """A tensor per level of features."""
        pixels = self.image_processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.model.device)
        with _computing(self.model.device, self.dtype):
            return self.model.get_image_embeddings(pixels)

    def logits(self, embedded: Any, index: int, boxes: Float[Tensor, "box 4"]) -> tuple[Logits, Float[Tensor, "box"]]:
        """All boxes of one image in one call: those of several cannot be padded to one length."""
        prompts = boxes.to(self.model.device) * self.image_processor.size["height"]
        features = [level[index : index + 1] for level in embedded]
        with _computing(self.model.device, self.dtype):
            found = self.model(image_embeddings=features, input_boxes=prompts[None], multimask_output=False)
        return found.pred_masks[0, :, 0], found.iou_scores[0, :, 0]


def _computing(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def load_sam2(folder: Path, settings: Segmentation) -> Segmenter:
    """Load SAM 2 from a folder, by the backend that the settings name.

    Raises ValueError if a file is missing or broken, or the weights are not those of the model.
    """
    device = torch_device()
    dtype = torch_dtype(settings.dtype, device)
    if settings.backend == "sam2":
        return Sam2Package(_load_package(folder).to(device).eval(), dtype)
    from transformers import Sam2ImageProcessor, Sam2Model

    loader: Any = Sam2Model
    require_safetensors(folder)
    try:
        with quiet():
            model, loaded = loader.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
        image_processor = Sam2ImageProcessor.from_pretrained(folder)
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{settings.model}: not a whole SAM 2 of transformers in {folder} ({reason})") from error
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"{settings.model}: the weights lack {len(missing)} tensors of SAM 2, the first is {missing[0]}")
    return Sam2Transformers(model.to(device).eval(), image_processor, dtype)


def _load_package(folder: Path) -> Any:
    """The package's model with the weights of the one *.pt, read without running what a pickle may hold."""
    weights = _single(folder, "*.pt")
    config = _single(folder, "*.yaml") if any(folder.glob("*.yaml")) else package_config(weights.name)
    model = build(config)
    try:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["model"])
    except (OSError, EOFError, RuntimeError, LookupError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{weights}: not the weights of this SAM 2 ({' '.join(str(error).split())[:300]})") from error
    return model


def build(config: Path) -> Any:
    """A model of the package, from its configuration, with the weights that it begins with. Raises ValueError if it is none of a SAM 2."""
    from hydra.errors import HydraException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content = OmegaConf.load(config)
        _check_targets(OmegaConf.to_container(content, resolve=True), config)
        decoder = {f"dynamic_multimask_{name}": value for name, value in DECODER.items()}
        OmegaConf.update(content, "model.sam_mask_decoder_extra_args", decoder, force_add=True)
        model = instantiate(content.model, _recursive_=True)
    except (OSError, YAMLError, OmegaConfBaseException, HydraException) as error:
        raise ValueError(f"{config}: not the configuration of a SAM 2 ({' '.join(str(error).split())[:300]})") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{config}: not the configuration of a SAM 2 (no `model` with a `_target_`)")
    return model


DECODER = {"via_stability": True, "stability_delta": 0.05, "stability_thresh": 0.98}
"""Where the one mask is not stable the best of three is taken, as the package builds its models by default."""


def package_config(weights: str) -> Path:
    """The package's configuration of a file of weights that Meta published. Raises ValueError on any other."""
    import sam2
    from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES

    known = {file: config for config, file in HF_MODEL_ID_TO_FILENAMES.values()}
    if weights not in known:
        raise ValueError(f"no *.yaml with the configuration of {weights}; the package has those of {', '.join(sorted(known))}")
    return Path(sam2.__path__[0]) / known[weights]


def _single(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise ValueError(f"{folder}: {len(found)} files {pattern}, one is needed; for transformers' weights set segmentation.backend")
    return found[0]


def _check_targets(content: Any, config: Path) -> None:
    """A configuration names what to call: only the package's own classes of models. Raises ValueError on anything else."""
    if isinstance(content, Mapping):
        if (name := content.get("_target_")) is not None and not _is_model(str(name)):
            raise ValueError(f"{config}: it would call {str(name)!r}, which is no model class of the sam2 package")
        content = list(content.values())
    for part in content if isinstance(content, list) else ():
        _check_targets(part, config)


def _is_model(name: str) -> bool:
    """Whether this is a class that the package's models are made of, and not what can be reached through one of its modules."""
    module, _, attribute = name.rpartition(".")
    if not module.startswith("sam2.modeling."):
        return False
    try:
        found = getattr(import_module(module), attribute, None)
    except ImportError:
        return False
    return isinstance(found, type) and found.__module__ == module
