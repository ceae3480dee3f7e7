"""Where the visual tokens of each model family lie on the image, from the formulas of its image processor and its vision tower.

Every geometry takes the processor, the model's configuration, the image's (height, width) in pixels and what the processor returned for
this one image. A cell is the pixels that a token's features are first made of: what the tower's stride leaves over at the right and the
bottom is in none. All raise ValueError where the processor's settings put the tokens in another way. As in transformers 5.23.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, ProcessorMixin
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension, SizeDict
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.idefics3.image_processing_idefics3 import get_resize_output_image_size
from transformers.models.llava_next.modeling_llava_next import unpad_image

from headwise.layout import Layout, View

Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class Placement:
    """The layout of one image, and what each image token of the prompt is, in order.

    is_cell: a cell of the layout, in the layout's order, or a mark that shows no place (the end of a row, a class token). The queries of a
    Q-Former are all cells, and their layout is empty.
    """

    layout: Layout
    is_cell: tuple[bool, ...]


Geometry = Callable[[ProcessorMixin, PreTrainedConfig, Size, Mapping[str, Tensor]], Placement]
"""From the processor, the configuration, the image's size and the processor's output to where the image tokens lie."""


def patch_grid(processor: ProcessorMixin, config: PreTrainedConfig, size: Size, inputs: Mapping[str, Tensor]) -> Placement:
    """LLaVA 1.5, FastVLM: one grid of the processor's patches, over what padding and cropping leave of the image."""
    marks = _setting(processor, "num_additional_image_tokens") - (_setting(processor, "vision_feature_select_strategy") == "default")
    if marks < 0:
        raise ValueError("vision_feature_select_strategy is 'default' without a class token to drop: set num_additional_image_tokens to 1")
    return _grid(processor, size, inputs, _setting(processor, "patch_size"), marks)


def tower_grid(processor: ProcessorMixin, config: PreTrainedConfig, size: Size, inputs: Mapping[str, Tensor]) -> Placement:
    """PaliGemma 1 and 2: one grid of the vision tower's patches."""
    return _grid(processor, size, inputs, config.vision_config.patch_size)


def pooled_grid(processor: ProcessorMixin, config: PreTrainedConfig, size: Size, inputs: Mapping[str, Tensor]) -> Placement:
    """Gemma 3: one square grid of `mm_tokens_per_image` averages over blocks of patches."""
    if (images := len(inputs["pixel_values"])) != 1:
        raise ValueError(f"pan and scan cut the image into {images - 1} further ones: save the image processor with do_pan_and_scan=False")
    patches = config.vision_config.image_size // config.vision_config.patch_size
    return _grid(processor, size, inputs, patches // math.isqrt(config.mm_tokens_per_image) * config.vision_config.patch_size)


def merged_grid(processor: ProcessorMixin, config: PreTrainedConfig, size: Size, inputs: Mapping[str, Tensor]) -> Placement:
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL: one grid of blocks of merge_size x merge_size patches, as many as the image's shape asks for."""
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    merge = config.vision_config.spatial_merge_size
    return _cells((View(rows // merge, columns // merge),))


def split_tiles(processor: ProcessorMixin, config: PreTrainedConfig, size: Size, inputs: Mapping[str, Tensor]) -> Placement:
    """Idefics3, SmolVLM: tiles in reading order, then the whole image; without splitting, the whole image."""
    pixels = inputs["pixel_values"]
    stride = config.vision_config.patch_size * config.scale_factor
    tiles = _splits(processor, size) if pixels.shape[1] > 1 else (0, 0)
    return _tiled(tiles, pixels.shape[1], pixels.shape[-1], stride)


def canvas_tiles(processor: ProcessorMixin, config: PreTrainedConfig, size: Size, inputs: Mapping[str, Tensor]) -> Placement:
    """InternVL: the tiles of the canvas nearest in aspect ratio in reading order, then the whole image; or the whole image alone."""
    pixels, images = inputs["pixel_values"], processor.image_processor
    patch, _ = config.vision_config.patch_size
    tile = (images.size.height, images.size.width)
    columns, rows = get_optimal_tiled_canvas(size, tile, images.min_patches, images.max_patches) if len(pixels) > 1 else (0, 0)
    return _tiled((rows, columns), len(pixels), pixels.shape[-1], int(patch / config.downsample_ratio))


def any_resolution(processor: ProcessorMixin, config: PreTrainedConfig, size: Size, inputs: Mapping[str, Tensor]) -> Placement:
    """LLaVA-NeXT, LLaVA-OneVision: the whole image, then one grid over all tiles without their padding, with a mark at each row's end."""
    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    best = select_best_resolution(size, processor.image_processor.image_grid_pinpoints)
    _check_any_resolution(processor, tile, best, inputs["pixel_values"])
    (base,), fine = _tiles(1, 1, tile, patch), _unpadded(size, best, tile, patch)
    rows, columns = _at_most(processor, base.rows, fine.rows, fine.columns)
    is_cell = (*[True] * base.cells, *([True] * columns + [False]) * rows)
    return Placement((base, replace(fine, rows=rows, columns=columns)), is_cell)


def queries(processor: ProcessorMixin, config: PreTrainedConfig, size: Size, inputs: Mapping[str, Tensor]) -> Placement:
    """InstructBLIP: the Q-Former's queries, which look at the whole image and have no place on it."""
    return Placement((), (True,) * config.num_query_tokens)


def _setting(processor: ProcessorMixin, name: str) -> Any:
    """A setting that only some processors have."""
    return getattr(processor, name)


def _cells(layout: Layout) -> Placement:
    """Cells alone, without marks."""
    return Placement(layout, (True,) * sum(view.cells for view in layout))


def _grid(processor: ProcessorMixin, size: Size, inputs: Mapping[str, Tensor], stride: int, marks: int = 0) -> Placement:
    """One grid of squares of stride pixels, after the marks, over an image that is padded to a square, resized and cropped, or not."""
    images, shown = processor.image_processor, inputs["pixel_values"].shape[-2:]
    padded = (max(size), max(size)) if images.do_pad and hasattr(images, "pad_to_square") else size
    resized = _resized(images.size, padded) if images.do_resize else padded
    crop = (images.crop_size.height, images.crop_size.width) if images.do_center_crop else resized
    if crop != tuple(shown):
        raise ValueError(
            f"the image processor gave {shown[0]} x {shown[1]} pixels for size={dict(images.size or {})}, do_center_crop="
            f"{images.do_center_crop}, crop_size={dict(images.crop_size or {})}: save it without steps beside these (do_pad, pad_size)"
        )
    cells = (shown[0] // stride, shown[1] // stride)
    edges: list[list[float]] = []
    for axis in (0, 1):
        # where the crop is larger than the image, an odd pixel more of padding is before the image in PIL, after it in torchvision
        extra = resized[axis] - crop[axis]
        cut = extra // 2 if images.backend == "pil" else int(extra / 2)
        pad = (padded[axis] - size[axis]) // 2
        edges.append([((cut + at) * padded[axis] / resized[axis] - pad) / size[axis] for at in (0, cells[axis] * stride)])
    (top, bottom), (left, right) = edges
    view = View(*cells, top, left, bottom, right)
    return Placement((view,), (False,) * marks + (True,) * view.cells)


def _resized(wanted: SizeDict, size: Size) -> Size:
    """The image's size after the image processor's resize."""
    if wanted.height and wanted.width:
        return wanted.height, wanted.width
    if wanted.shortest_edge and not wanted.longest_edge:
        return int(wanted.shortest_edge * size[0] / min(size)), int(wanted.shortest_edge * size[1] / min(size))
    raise ValueError(
        f"the image processor resizes to size={dict(wanted)}: save it with a height and a width, or with a shortest_edge alone"
    )


def _tiles(rows: int, columns: int, tile: int, stride: int) -> Layout:
    """Squares of tile pixels in reading order over the whole image, each a grid of tokens of stride pixels."""
    side = tile // stride
    seen = side * stride / tile
    return tuple(
        View(side, side, row / rows, column / columns, (row + seen) / rows, (column + seen) / columns)
        for row in range(rows)
        for column in range(columns)
    )


def _tiled(tiles: Size, num_images: int, tile: int, stride: int) -> Placement:
    """Rows and columns of tiles, if any, then the whole image in one more."""
    if num_images != tiles[0] * tiles[1] + 1:
        raise ValueError(
            f"{num_images} tiles in pixel_values, the image processor's settings make {tiles[0]} x {tiles[1]} and one of the whole image: "
            "give the processor one image, and no settings beside the saved ones"
        )
    return _cells((*_tiles(*tiles, tile, stride), *_tiles(1, 1, tile, stride)))


def _splits(processor: ProcessorMixin, size: Size) -> Size:
    """Rows and columns of tiles, as Idefics3's `resize` and `resize_for_vision_encoder` make them.

    Its own get_number_of_image_patches rounds the shorter side up before it is stretched, so for some shapes it counts a row too few.
    """
    images = processor.image_processor
    height, width = size
    if images.do_resize and images.size.longest_edge:
        height, width = get_resize_output_image_size(torch.empty(1, *size, device="meta"), images.size.longest_edge)
    elif images.do_resize:
        height, width = _resized(images.size, size)
    tile, ratio = images.max_image_size["longest_edge"], width / height
    if width >= height:
        columns = math.ceil(width / tile)
        return math.ceil(int(columns * tile / ratio) / tile), columns
    rows = math.ceil(height / tile)
    return rows, math.ceil(int(rows * tile * ratio) / tile)


def _check_any_resolution(processor: ProcessorMixin, tile: int, best: Size, pixels: Tensor) -> None:
    """Tiles are what the vision tower takes, neither resized nor cropped, and their tokens all patches."""
    images = processor.image_processor
    settings = {**dict(images.size or {}), **{f"crop {name}": value for name, value in dict(images.crop_size or {}).items()}}
    num_images = best[0] // tile * (best[1] // tile) + 1
    if {*settings.values(), *pixels.shape[-2:]} != {tile} or pixels.shape[1] != num_images:
        raise ValueError(
            f"the image processor made {pixels.shape[1]} tiles of {pixels.shape[-2]} x {pixels.shape[-1]} pixels with {settings}, the "
            f"vision tower takes {num_images} of {tile} x {tile}: save it with size, crop_size and image_grid_pinpoints of that side"
        )


def _unpadded(size: Size, best: Size, tile: int, patch: int) -> View:
    """The grid over all tiles of the best resolution, without the rows or columns that the model cuts off as padding.

    Exact where the stride divides the tile. Else (OneVision: 384 pixels, 27 patches of 14) the patches have gaps between tiles; the grid's
    borders are theirs but its cells are even, so inside they lie less than one gap (6 pixels, 0.43 of a cell) beside the patches.
    """
    side = tile // patch
    grid = (best[0] // tile * side, best[1] // tile * side)
    rows, columns = unpad_image(torch.empty(1, *grid, device="meta"), size).shape[1:]
    inner = get_patch_output_size(torch.empty(1, *size, device="meta"), best, ChannelDimension.FIRST)
    edges: list[list[float]] = []
    for axis, kept in enumerate((rows, columns)):
        cut, pad = (grid[axis] - kept) // 2, (best[axis] - inner[axis]) // 2
        first, last = (cell // side * tile + cell % side * patch for cell in (cut, grid[axis] - cut - 1))
        edges.append([(first - pad) / inner[axis], (last + patch - pad) / inner[axis]])
    (top, bottom), (left, right) = edges
    return View(rows, columns, top, left, bottom, right)


def _at_most(processor: ProcessorMixin, side: int, rows: int, columns: int) -> Size:
    """The grid after LLaVA-OneVision's interpolation, which shrinks one of many more cells than its `anyres_max_` tiles have."""
    if not hasattr(processor, "vision_aspect_ratio"):
        return rows, columns
    tiles = int(_setting(processor, "vision_aspect_ratio").removeprefix("anyres_max_"))
    ratio = math.sqrt(rows * columns / (tiles * side**2))
    return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)
