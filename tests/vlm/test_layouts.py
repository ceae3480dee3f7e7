"""Each layout against the family's own image processor, on a picture whose colours are its coordinates."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InstructBlipConfig,
    InstructBlipProcessor,
    InternVLConfig,
    InternVLProcessor,
    LlavaConfig,
    LlavaImageProcessor,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    PreTrainedConfig,
    ProcessorMixin,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    SiglipImageProcessor,
    SiglipImageProcessorPil,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)
from transformers.image_utils import SizeDict
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMConnector

from headwise.layout import Layout, View
from headwise.vlm.layouts import (
    Placement,
    any_resolution,
    canvas_tiles,
    merged_grid,
    patch_grid,
    pooled_grid,
    queries,
    split_tiles,
    tower_grid,
)

PLAIN = {"do_rescale": False, "do_normalize": False, "image_mean": [0.0] * 3, "image_std": [1.0] * 3, "resample": 2}
"""Pixels stay what they are, padding is black; bilinear, so that a ramp stays a ramp."""
SIZES = [(40, 120), (120, 40), (61, 47), (47, 61), (64, 64), (9, 7), (300, 211), (211, 300), (33, 330), (97, 98)]
MARK = -1.0


def picture(size: tuple[int, int], image_processor: Any) -> Any:
    """Red is the column's share of the width, green the row's share of the height, blue 1: where blue is less there is padding."""
    down, right = (torch.arange(length) + 0.5 for length in size)
    ramps = torch.stack([(right / size[1]).expand(size), (down[:, None] / size[0]).expand(size), torch.ones(size)])
    return ramps if image_processor.backend == "torchvision" else (ramps * 255).round().to(torch.uint8).numpy()


def processed(image_processor: Any, size: tuple[int, int], **settings: Any) -> dict[str, Any]:
    found = image_processor(picture(size, image_processor), return_tensors="pt", **settings)
    scale = 1.0 if image_processor.backend == "torchvision" else 255.0
    return {name: value / scale if name == "pixel_values" else value for name, value in found.items()}


def made(kind: type[ProcessorMixin], image_processor: Any, **fields: Any) -> Any:
    """A processor without its tokenizer, which has no part in where tokens lie."""
    processor = kind.__new__(kind)
    for name, value in {"image_processor": image_processor, "image_token": "<image>", **fields}.items():
        setattr(processor, name, value)
    return processor


def num_image_tokens(processor: Any, inputs: dict[str, Any]) -> int:
    return processor.replace_image_token(inputs, 0).count("<image>")


def patches(pixels: Tensor, stride: int) -> Tensor:
    """Mean colour of each square of stride x stride pixels in reading order, as a convolution without padding sees them."""
    rows, columns = pixels.shape[1] // stride, pixels.shape[2] // stride
    squares = [
        pixels[:, row * stride : (row + 1) * stride, column * stride : (column + 1) * stride].mean(dim=(1, 2))
        for row in range(rows)
        for column in range(columns)
    ]
    return torch.stack(squares).double()


def expected(layout: Layout) -> Tensor:
    """Per cell: centre of the part on the image (column, row), and that part's share of the cell."""
    found = []
    for view in layout:
        high, wide = (view.bottom - view.top) / view.rows, (view.right - view.left) / view.columns
        for row in range(view.rows):
            for column in range(view.columns):
                top, left = view.top + row * high, view.left + column * wide
                down, right = (max(top, 0.0), min(top + high, 1.0)), (max(left, 0.0), min(left + wide, 1.0))
                share = max(down[1] - down[0], 0.0) * max(right[1] - right[0], 0.0) / (high * wide)
                found.append((sum(right) / 2, sum(down) / 2, share))
    return torch.tensor(found, dtype=torch.float64)


def cell_sides(layout: Layout) -> Tensor:
    """Width and height of each cell as shares of the image."""
    sides = [((view.right - view.left) / view.columns, (view.bottom - view.top) / view.rows) for view in layout for _ in range(view.cells)]
    return torch.tensor(sides, dtype=torch.float64)


def check(found: Placement, tokens: Tensor, size: tuple[float, float], tolerance: float = 0.1) -> None:
    """The tokens' colours say where they lie, within a share of a cell.

    size: of the coarsest picture that the image processor made; half a pixel of it is allowed, the border where resampling is flat.
    """
    assert tuple((tokens[:, 0] != MARK).tolist()) == found.is_cell
    seen, meant, sides = tokens[tokens[:, 0] != MARK], expected(found.layout), cell_sides(found.layout)
    blue = seen[:, 2]
    assert (blue - meant[:, 2]).abs().max() < tolerance + 0.01, "padding"
    on_image = (meant[:, 2] > 0.3) & (blue > 0.3)
    places = seen[:, :2] / blue[:, None].clamp(min=0.3)
    pixel = torch.tensor([1 / size[1], 1 / size[0]], dtype=torch.float64)
    rest = ((places - meant[:, :2]).abs() - 0.5 * pixel).clamp(min=0) / sides
    assert rest[on_image].max() < tolerance, "place"


def llava(image_processor: Any, size: tuple[int, int], marks: int = 0) -> tuple[Placement, Tensor]:
    inputs = processed(image_processor, size)
    strategy = "full" if marks else "default"
    processor = made(LlavaProcessor, image_processor, patch_size=8, num_additional_image_tokens=1, vision_feature_select_strategy=strategy)
    found = patch_grid(processor, LlavaConfig(), size, inputs)
    assert len(found.is_cell) == num_image_tokens(processor, inputs)
    return found, torch.cat([torch.full((marks, 3), MARK, dtype=torch.float64), patches(inputs["pixel_values"][0], 8)])


LLAVA_SETTINGS = [
    {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}},
    {"size": {"shortest_edge": 49}, "crop_size": {"height": 40, "width": 64}},
    {"size": {"shortest_edge": 30}, "crop_size": {"height": 45, "width": 64}},  # larger than the image: it pads; 45 leaves 5 pixels over
    {"size": {"height": 48, "width": 80}, "do_center_crop": False},
    {"size": {"height": 48, "width": 48}, "crop_size": {"height": 32, "width": 48}},
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", LLAVA_SETTINGS)
@pytest.mark.parametrize("kind", [LlavaImageProcessor, LlavaImageProcessorPil, CLIPImageProcessor, CLIPImageProcessorPil])
def test_one_grid_of_an_image_that_is_resized_and_cropped(kind: type, settings: dict[str, Any], size: tuple[int, int]) -> None:
    check(*llava(kind(**PLAIN, **settings), size), size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [LlavaImageProcessor, LlavaImageProcessorPil])
def test_one_grid_of_an_image_that_is_padded_to_a_square(kind: type, size: tuple[int, int]) -> None:
    found, tokens = llava(kind(**PLAIN, do_pad=True, size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}), size)
    (view,) = found.layout
    assert (view.bottom - view.top) * size[0] == pytest.approx(max(size)) == pytest.approx((view.right - view.left) * size[1])
    check(found, tokens, size)


def test_a_class_token_is_a_mark() -> None:
    found, tokens = llava(LlavaImageProcessor(**PLAIN, size={"height": 48, "width": 48}, do_center_crop=False), (64, 50), marks=1)
    assert found.layout == (View(6, 6),)
    check(found, tokens, (64, 50))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [SiglipImageProcessor, SiglipImageProcessorPil])
@pytest.mark.parametrize("side", [56, 60])  # 60: a stride of 14 leaves 4 pixels over
def test_paligemma_shows_the_whole_image(kind: type, side: int, size: tuple[int, int]) -> None:
    image_processor = kind(**PLAIN, size={"height": side, "width": side})
    inputs = processed(image_processor, size)
    config = PaliGemmaConfig(vision_config={"model_type": "siglip_vision_model", "image_size": side, "patch_size": 14})
    processor = made(PaliGemmaProcessor, image_processor, image_seq_length=config.text_config.num_image_tokens)
    found = tower_grid(processor, config, size, inputs)
    assert len(found.is_cell) == num_image_tokens(processor, inputs)
    check(found, patches(inputs["pixel_values"][0], 14), size)


def gemma_3(kind: type, tokens: int = 16) -> tuple[Any, Gemma3Config]:
    image_processor = kind(**PLAIN, size={"height": 64, "width": 64})
    config = Gemma3Config(vision_config={"image_size": 64, "patch_size": 4}, mm_tokens_per_image=tokens)
    return made(Gemma3Processor, image_processor, full_image_sequence="\n" + "<image>" * tokens), config


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [Gemma3ImageProcessor, Gemma3ImageProcessorPil])
def test_gemma_3_shows_the_whole_image_in_averages_over_patches(kind: type, size: tuple[int, int]) -> None:
    processor, config = gemma_3(kind)
    inputs = processed(processor.image_processor, size)
    found = pooled_grid(processor, config, size, inputs)
    features = patches(inputs["pixel_values"][0], 4).T.reshape(1, 3, 16, 16)
    tokens = torch.nn.AvgPool2d(kernel_size=4, stride=4)(features).flatten(2)[0].T
    assert found == Placement((View(4, 4),), (True,) * num_image_tokens(processor, inputs))
    check(found, tokens, size)


@pytest.mark.parametrize("kind", [Gemma3ImageProcessor, Gemma3ImageProcessorPil])
def test_gemma_3_with_pan_and_scan_is_refused_where_it_cuts(kind: type) -> None:
    processor, config = gemma_3(kind)
    on = {
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 8,
        "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2,
    }
    with pytest.raises(ValueError, match=r"pan and scan cut the image into 3 further ones.*do_pan_and_scan=False"):
        pooled_grid(processor, config, (40, 120), processed(processor.image_processor, (40, 120), **on))
    assert pooled_grid(processor, config, (64, 64), processed(processor.image_processor, (64, 64), **on)).layout == (View(4, 4),)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pixels", [(8 * 8, 40 * 40), (64 * 64, 96 * 96)])
@pytest.mark.parametrize("kind", [Qwen2VLImageProcessor, Qwen2VLImageProcessorPil])
def test_qwen_grids_follow_the_image_in_blocks_of_patches(kind: type, pixels: tuple[int, int], size: tuple[int, int]) -> None:
    image_processor = kind(**PLAIN, patch_size=4, merge_size=2, size={"shortest_edge": pixels[0], "longest_edge": pixels[1]})
    inputs = processed(image_processor, size)
    tokens = inputs["pixel_values"].reshape(-1, 4, 3, 2 * 4 * 4).double().mean(dim=(1, 3))
    cases: list[tuple[Any, PreTrainedConfig]] = [(Qwen2VLProcessor, Qwen2VLConfig()), (Qwen3VLProcessor, Qwen3VLConfig())]
    for processor_kind, config in cases:
        processor = made(processor_kind, image_processor)
        found = merged_grid(processor, config, size, inputs)
        assert len(found.is_cell) == num_image_tokens(processor, inputs)
        check(found, tokens, size)


SPLITS = [
    (Idefics3ImageProcessor, Idefics3Processor, Idefics3Config, Idefics3Connector),
    (Idefics3ImageProcessorPil, Idefics3Processor, Idefics3Config, Idefics3Connector),
    (SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMConfig, SmolVLMConnector),
    (SmolVLMImageProcessorPil, SmolVLMProcessor, SmolVLMConfig, SmolVLMConnector),
]
SPLIT_SETTINGS = [
    {"size": {"longest_edge": 144}, "max_image_size": {"longest_edge": 48}},
    {"size": {"longest_edge": 130}, "max_image_size": {"longest_edge": 48}},  # no multiple of the tile
    {"size": {"longest_edge": 150}, "max_image_size": {"longest_edge": 51}},  # a stride of 8 leaves 3 pixels over
    {"size": {"longest_edge": 40}, "max_image_size": {"longest_edge": 48}},
    {"size": {"longest_edge": 144}, "max_image_size": {"longest_edge": 48}, "do_image_splitting": False},
    {"size": {"height": 96, "width": 150}, "max_image_size": {"longest_edge": 48}},
    {"do_resize": False, "size": {"longest_edge": 144}, "max_image_size": {"longest_edge": 48}},
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", SPLIT_SETTINGS)
@pytest.mark.parametrize(("kind", "processor_kind", "config_kind", "connector"), SPLITS)
def test_idefics_tiles_and_then_the_whole_image(
    kind: type, processor_kind: type, config_kind: Any, connector: Any, settings: dict[str, Any], size: tuple[int, int]
) -> None:
    image_processor, tile = kind(**PLAIN, **settings), settings["max_image_size"]["longest_edge"]
    inputs = processed(image_processor, size, return_row_col_info=True)
    config = config_kind(vision_config={"image_size": tile, "patch_size": 4}, scale_factor=2)
    names = {"fake_image_token": "#", "global_image_tag": "$", "global_image_token": "$", "image_seq_len": (tile // 8) ** 2}
    processor = made(processor_kind, image_processor, **names)
    found = split_tiles(processor, config, size, inputs)
    assert len(found.is_cell) == num_image_tokens(processor, inputs)
    features = torch.stack([patches(picture, 4) for picture in inputs["pixel_values"][0]])
    tokens = connector.pixel_shuffle(None, features, 2).reshape(-1, 4, 3).mean(1)
    shrink = min(1.0, settings["size"].get("longest_edge", 150) / max(size)) if settings.get("do_resize", True) else 1.0
    check(found, tokens, (size[0] * shrink, size[1] * shrink))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("settings", [{}, {"max_patches": 4}, {"max_patches": 1}, {"min_patches": 3, "max_patches": 7}])
@pytest.mark.parametrize("tile", [32, 34])  # 34: a stride of 8 leaves 2 pixels over
@pytest.mark.parametrize("kind", [GotOcr2ImageProcessor, GotOcr2ImageProcessorPil])
def test_internvl_tiles_and_then_the_whole_image(kind: type, tile: int, settings: dict[str, int], size: tuple[int, int]) -> None:
    image_processor = kind(**PLAIN, size={"height": tile, "width": tile}, crop_to_patches=True, **settings)
    inputs = processed(image_processor, size)
    config = InternVLConfig(vision_config={"image_size": [tile, tile], "patch_size": [4, 4]}, downsample_ratio=0.5)
    processor = made(InternVLProcessor, image_processor, image_seq_length=16, start_image_token="", end_image_token="")
    found = canvas_tiles(processor, config, size, inputs)
    assert len(found.is_cell) == num_image_tokens(processor, inputs)
    features = torch.stack([patches(picture, 4).reshape(8, 8, 3) for picture in inputs["pixel_values"]])
    shuffled: Any = InternVLModel.pixel_shuffle
    check(found, shuffled(None, features, 0.5).reshape(-1, 4, 3).mean(1), size)


PINPOINTS = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3], [3, 3], [4, 1], [1, 6]]


def any_resolution_tokens(
    kind: type, size: tuple[int, int], tile: int, onevision: str | None, settings: dict[str, Any]
) -> tuple[Placement, Tensor, dict[str, Any]]:
    """The placement and what the model's own packing makes of the patches' colours, with MARK for its newline."""
    pinpoints = [[tile * rows, tile * columns] for rows, columns in PINPOINTS]
    image_processor = kind(**PLAIN, image_grid_pinpoints=pinpoints, **settings)
    inputs = processed(image_processor, size)
    vision = {"model_type": "siglip_vision_model", "image_size": tile, "patch_size": 8}
    fields = {"patch_size": 8, "num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"}
    features = [torch.stack([patches(picture, 8) for picture in inputs["pixel_values"][0]])]
    newline = torch.full((3,), MARK, dtype=torch.float64)
    if onevision:
        config: Any = LlavaOnevisionConfig(vision_config=vision, image_grid_pinpoints=pinpoints)
        fields |= {"num_image_tokens": (tile // 8) ** 2, "vision_aspect_ratio": onevision}
        processor, onevision_pack = made(LlavaOnevisionProcessor, image_processor, **fields), LlavaOnevisionModel.pack_image_features
        packed = onevision_pack(SimpleNamespace(config=config), features, inputs["image_sizes"], newline, onevision)  # type: ignore[arg-type]
    else:
        config = LlavaNextConfig(vision_config=vision, image_grid_pinpoints=pinpoints)
        processor, next_pack = made(LlavaNextProcessor, image_processor, **fields), LlavaNextModel.pack_image_features
        packed = next_pack(SimpleNamespace(config=config), features, inputs["image_sizes"], "full", newline)  # type: ignore[arg-type]
    found = any_resolution(processor, config, size, inputs)
    assert len(found.is_cell) == num_image_tokens(processor, inputs)
    return found, packed[0][0], inputs


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "settings",
    [{"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}, {"size": {"height": 32, "width": 32}, "crop_size": None}],
)
@pytest.mark.parametrize("kind", [LlavaNextImageProcessor, LlavaNextImageProcessorPil])
def test_llava_next_packs_as_the_model_does(kind: type, settings: dict[str, Any], size: tuple[int, int]) -> None:
    settings = settings | {"do_center_crop": settings["crop_size"] is not None}
    found, tokens, _ = any_resolution_tokens(kind, size, 32, None, settings)
    check(found, tokens, size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("at_most", ["anyres_max_9", "anyres_max_5", "anyres_max_2"])  # 5: 1.095 times too fine, 2: interpolated down
@pytest.mark.parametrize(("tile", "tolerance"), [(32, 0.1), (33, 0.2)])  # 33: 1 pixel is left over, an eighth of a cell
@pytest.mark.parametrize("kind", [LlavaOnevisionImageProcessor, LlavaOnevisionImageProcessorPil])
def test_llava_onevision_packs_as_the_model_does(kind: type, tile: int, tolerance: float, at_most: str, size: tuple[int, int]) -> None:
    found, tokens, _ = any_resolution_tokens(kind, size, tile, at_most, {"size": {"height": tile, "width": tile}})
    check(found, tokens, size, tolerance)


def test_queries_are_cells_of_an_empty_layout() -> None:
    processor = made(InstructBlipProcessor, None, num_query_tokens=32)
    assert queries(processor, InstructBlipConfig(num_query_tokens=32), (40, 50), {}) == Placement((), (True,) * 32)


def test_idefics_own_count_of_tiles_is_not_what_it_makes() -> None:
    """Why the rows are not taken from get_number_of_image_patches: it forgets that the shorter side is stretched with the longer one."""
    image_processor = Idefics3ImageProcessor(**PLAIN, **SPLIT_SETTINGS[1])
    size = next(
        size for size in [(height, 130) for height in range(40, 130)] if _rows(image_processor, size) != _counted(image_processor, size)
    )
    assert _rows(image_processor, size) == _counted(image_processor, size) + 1


def _rows(image_processor: Any, size: tuple[int, int]) -> int:
    return processed(image_processor, size, return_row_col_info=True)["rows"][0][0]


def _counted(image_processor: Any, size: tuple[int, int]) -> int:
    return image_processor.get_number_of_image_patches(*size)[1]


def test_what_cannot_be_placed_is_refused_with_the_setting() -> None:
    fields = {"patch_size": 8, "num_additional_image_tokens": 0, "vision_feature_select_strategy": "full"}
    size = (40, 120)

    def llava_of(**settings: Any) -> Placement:
        image_processor = CLIPImageProcessor(**PLAIN, **settings)
        return patch_grid(made(LlavaProcessor, image_processor, **fields), LlavaConfig(), size, processed(image_processor, size))

    with pytest.raises(ValueError, match=r"resizes to size=.*longest_edge.*shortest_edge alone"):
        llava_of(size={"shortest_edge": 40, "longest_edge": 64})
    with pytest.raises(ValueError, match=r"gave 64 x 64 pixels.*pad_size"):
        llava_of(size={"height": 48, "width": 48}, do_center_crop=False, do_pad=True, pad_size={"height": 64, "width": 64})
    with pytest.raises(ValueError, match="set num_additional_image_tokens to 1"):
        fields["vision_feature_select_strategy"] = "default"
        llava_of(size={"height": 48, "width": 48}, do_center_crop=False)
    with pytest.raises(ValueError, match=r"tiles of 24 x 24 pixels.*takes 3 of 32 x 32.*crop_size"):
        next_processor = LlavaNextImageProcessor(
            **PLAIN, image_grid_pinpoints=[[32, 64]], size={"shortest_edge": 32}, crop_size={"height": 24, "width": 24}
        )
        config = LlavaNextConfig(vision_config={"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8})
        any_resolution(made(LlavaNextProcessor, next_processor, **fields), config, size, processed(next_processor, size))
    with pytest.raises(ValueError, match=r"4 tiles in pixel_values.*make 2 x 6"):
        split = Idefics3ImageProcessor(**PLAIN, **SPLIT_SETTINGS[0])
        inputs = processed(split, size)
        split.size = SizeDict(longest_edge=288)
        config = Idefics3Config(vision_config={"image_size": 48, "patch_size": 4}, scale_factor=2)
        split_tiles(made(Idefics3Processor, split), config, size, inputs)


@pytest.mark.parametrize(("size", "tolerance"), [((300, 300), 0.05), ((768, 384), 0.25), ((700, 1100), 0.35)])
def test_published_llava_onevision(size: tuple[int, int], tolerance: float) -> None:
    """384 pixels in 27 patches of 14: exact in one tile; beside the patches by at most 6 (n - 1) / n of 14 pixels in n tiles."""
    image_processor = LlavaOnevisionImageProcessor(**PLAIN)
    inputs, config = processed(image_processor, size), LlavaOnevisionConfig()
    config.vision_config.patch_size, config.vision_config.image_size = 14, 384
    fields = {"num_image_tokens": 729, "vision_aspect_ratio": "anyres_max_9", "vision_feature_select_strategy": "full"}
    processor, pack = made(LlavaOnevisionProcessor, image_processor, **fields), LlavaOnevisionModel.pack_image_features
    found = any_resolution(processor, config, size, inputs)
    assert len(found.is_cell) == num_image_tokens(processor, inputs)
    features = [torch.stack([patches(tile, 14) for tile in inputs["pixel_values"][0]])]
    newline = torch.full((3,), MARK, dtype=torch.float64)
    packed: Any = pack(SimpleNamespace(config=config), features, inputs["image_sizes"], newline)  # type: ignore[arg-type]
    check(found, packed[0][0], size, tolerance)
