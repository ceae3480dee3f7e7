"""Where the masks of the key objects come from, and which are good enough: apart from the models, so that reading it loads none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from headwise.hub import TRANSFORMERS_FILES, weights_folder

FORBID = ConfigDict(extra="forbid")
SAM2_FILES = {"sam2": ("*.pt", "*.yaml"), "transformers": TRANSFORMERS_FILES}
"""What either backend reads of a model; a *.yaml is needed beside weights that Meta did not publish."""
Revision = Annotated[str, Field(description="commit of a model on the Hub; empty: the latest when the run starts")]
Share = Annotated[float, Field(ge=0, le=1)]
Precision = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], Field(description="auto: bfloat16 where the hardware has it, else float32")
]


@dataclass(frozen=True, config=FORBID, kw_only=True)
class Grounding:
    """How Florence-2 finds the boxes of the objects that a text names."""

    model: Annotated[str, Field(min_length=1, description="Florence-2: a transformers folder, or a model of the Hugging Face Hub")] = (
        "florence-community/Florence-2-base"
    )
    revision: Revision = ""
    task: Annotated[
        Literal["phrases", "vocabulary", "detection"],
        Field(description="phrases: every phrase of the text; vocabulary: what the text as a whole names; detection: whatever is there"),
    ] = "phrases"
    batch_size: Annotated[int, Field(ge=1, le=512, description="prompts answered together")] = 8
    num_beams: Annotated[int, Field(ge=1, le=16, description="beams of the search")] = 3
    max_new_tokens: Annotated[int, Field(ge=8, le=1000, description="longest answer: a box takes four tokens, its phrase a few")] = 512
    dtype: Precision = "auto"


@dataclass(frozen=True, config=FORBID, kw_only=True)
class Segmentation:
    """How SAM 2 turns boxes into masks."""

    model: Annotated[str, Field(min_length=1, description="SAM 2 or 2.1: a folder, or a model of the Hugging Face Hub")] = (
        "facebook/sam2.1-hiera-tiny"
    )
    revision: Revision = ""
    backend: Annotated[
        Literal["sam2", "transformers"],
        Field(description="sam2: Meta's package, weights *.pt; transformers: its own Sam2, weights *.safetensors"),
    ] = "sam2"
    batch_size: Annotated[int, Field(ge=1, le=256, description="images encoded together")] = 8
    dtype: Precision = "auto"


@dataclass(frozen=True, config=FORBID, kw_only=True)
class MaskQuality:
    """The gates that an object's mask has to pass; an exact mask has an area alone."""

    min_area: Annotated[Share, Field(description="smallest share of the image that an object may cover")] = 0.001
    max_area: Annotated[Share, Field(description="largest share of the image that an object may cover")] = 0.95
    min_predicted_iou: Annotated[Share, Field(description="SAM 2's own estimate of the mask's IoU with the truth")] = 0.7
    min_stability: Annotated[Share, Field(description="IoU of the masks whose logits are above +1 and above -1")] = 0.8
    min_box_iou: Annotated[Share, Field(description="IoU of the box around the mask with the box that Florence-2 gave")] = 0.5
    max_overlap: Annotated[Share, Field(description="IoU with a better mask of the same phrase above which a mask is its duplicate")] = 0.7

    def __post_init__(self) -> None:
        """Raises ValueError if no area passes."""
        if self.min_area > self.max_area:
            raise ValueError(f"min_area = {self.min_area:g} is more than max_area = {self.max_area:g}, so no mask would do")


@dataclass(frozen=True, config=FORBID, kw_only=True)
class Masks:
    """The masks of the objects that the answers are about."""

    source: Annotated[
        Literal["auto", "exact", "generated"],
        Field(description="exact: the data's own; generated: by Florence-2 and SAM 2; auto: generated where the data have none"),
    ] = "auto"
    grounding: Annotated[Grounding, Field(description="Florence-2: from a text to boxes")] = Grounding()
    segmentation: Annotated[Segmentation, Field(description="SAM 2: from boxes to masks")] = Segmentation()
    quality: Annotated[MaskQuality, Field(description="which masks are good enough")] = MaskQuality()
    max_bad_share: Annotated[
        Share, Field(description="share of examples without a usable image or mask file above which the step fails")
    ] = 0.05


def files_of(masks: Masks) -> dict[str, Sequence[str]]:
    """What either model is read from."""
    return {"grounding": TRANSFORMERS_FILES, "segmentation": SAM2_FILES[masks.segmentation.backend]}


def weights_folders(masks: Masks) -> dict[str, Path]:
    """Where the weights of both models lie, downloaded if need be. Raises ValueError if one is neither a folder nor to be had."""
    folders: dict[str, Path] = {}
    wrong: list[str] = []
    for part, files in files_of(masks).items():
        chosen: Grounding | Segmentation = getattr(masks, part)
        try:
            folders[part] = weights_folder(chosen.model, files, chosen.revision)
        except ValueError as error:
            wrong.append(f"masks.{part}.model: {error}")
    if wrong:
        raise ValueError("; ".join(wrong))
    return folders
