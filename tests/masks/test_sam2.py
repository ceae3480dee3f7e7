from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import interpolate

from headwise.checkpoints import quiet
from headwise.masks import sam2
from headwise.masks.annotation import Pictured
from headwise.masks.florence2 import Box
from headwise.masks.rle import decode
from headwise.masks.sam2 import Sam2Package, Sam2Transformers, Segmented, Segmenter, load_sam2, segment
from headwise.masks.settings import Segmentation
from tests.mask_models import SAM_PIXELS, save_sam2, save_sam2_transformers

SAVE: dict[str, Callable[[Path], Path]] = {"sam2": save_sam2, "transformers": save_sam2_transformers}
BOXES: list[list[Box]] = [
    [(0.1, 0.1, 0.5, 0.6)],
    [],
    [(0.0, 0.0, 1.0, 1.0), (0.3, 0.2, 0.35, 0.9), (0.5, 0.5, 0.99, 0.8)],
    [(0.2, 0.7, 0.9, 0.9), (0.25, 0.1, 0.75, 0.35)],
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sam2")
    return {backend: save(root / backend) for backend, save in SAVE.items()}


def settings(backend: str, **changes: object) -> Segmentation:
    return Segmentation(**({"model": "tiny", "backend": backend, "dtype": "float32"} | changes))


@pytest.fixture(scope="module", params=list(SAVE))
def segmenter(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Segmenter:
    return load_sam2(folders[request.param], settings(request.param))


def pictured(height: int, width: int, seed: int = 0) -> Pictured:
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    return Pictured(image, height, width, ())


def window() -> list[Pictured]:
    return [pictured(40, 64, 1), pictured(33, 20, 2), pictured(90, 71, 3), pictured(50, 50, 4)]


def logits_of(segmenter: Segmenter, shown: Pictured, boxes: list[Box]) -> np.ndarray:
    """The slow way: one image, one box at a time, the logits enlarged to the image's size."""
    with torch.inference_mode():
        found = [segmenter.logits(segmenter.embed([shown.image]), 0, torch.tensor([box]))[0] for box in boxes]
        return interpolate(torch.stack(found), (shown.height, shown.width), mode="bilinear", align_corners=False)[:, 0].numpy()


def mask_of(found: Segmented, shown: Pictured) -> np.ndarray:
    return decode(found.rle, shown.height, shown.width)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batched_is_one_by_one(segmenter: Segmenter, batch_size: int) -> None:
    """Masks may differ only where the logit is within 1e-4 of the threshold."""
    found = segment(segmenter, window(), BOXES, batch_size)
    assert [list(own) for own in found] == BOXES
    for own, shown, boxes in zip(found, window(), BOXES, strict=True):
        if not boxes:
            continue
        logits = logits_of(segmenter, shown, boxes)
        masks = np.stack([mask_of(own[box], shown) for box in boxes])
        assert np.abs(logits[masks != (logits > 0)]).max(initial=0) < 1e-4
        assert 0.02 < masks.mean() < 0.98 and np.abs(logits).mean() > 0.01, "the weights draw nothing, so this test shows nothing"


def test_nothing_of_a_batch_is_kept(folders: dict[str, Path]) -> None:
    """The package keeps the positions of the first images that it sees; they are to be those of one."""
    segmenter = load_sam2(folders["sam2"], settings("sam2"))
    assert isinstance(segmenter, Sam2Package)
    segment(segmenter, window(), BOXES, 3)
    kept = segmenter.predictor.model.image_encoder.neck.position_encoding.cache
    assert {side: SAM_PIXELS // side for side, _ in kept} == {SAM_PIXELS // stride: stride for stride in sam2.STRIDES}
    assert all(positions.untyped_storage().nbytes() == positions.numel() * 4 for positions in kept.values())
    assert segmenter.predictor._features is None


def test_boxes_beyond_one_call_are_asked_in_the_next(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = segment(segmenter, window()[2:], BOXES[2:], 2)
    monkeypatch.setattr(sam2, "BOXES_AT_ONCE", 2)
    monkeypatch.setattr(sam2, "PIXELS_AT_ONCE", 1)
    parts = segment(segmenter, window()[2:], BOXES[2:], 2)
    for one, two, shown in zip(whole, parts, window()[2:], strict=True):
        assert one.keys() == two.keys()
        assert all((mask_of(one[box], shown) == mask_of(two[box], shown)).mean() > 0.999 for box in one)


def test_the_package_draws_what_its_own_predictor_draws(folders: dict[str, Path]) -> None:
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    ours = load_sam2(folders["sam2"], settings("sam2"))
    assert isinstance(ours, Sam2Package)
    with quiet():
        predictor = SAM2ImagePredictor(ours.predictor.model)
    predictor._bb_feat_sizes = [(SAM_PIXELS // stride,) * 2 for stride in (4, 8, 16)]
    shown, (box,) = window()[0], BOXES[0]
    predictor.set_image(np.array(shown.image))
    logits, ious, _ = predictor.predict(
        box=np.array(box) * np.array([shown.width, shown.height] * 2),
        multimask_output=False,
        return_logits=True,
    )
    (found,) = segment(ours, [shown], [[box]], 1)[0].values()
    mask = mask_of(found, shown)
    assert np.abs(logits[0][mask != (logits[0] > 0)]).max(initial=0) < 1e-4
    assert found.predicted_iou == pytest.approx(float(ious[0]), abs=1e-5)


def test_transformers_draws_what_its_own_processor_asks_for(folders: dict[str, Path]) -> None:
    from transformers import Sam2Processor

    ours = load_sam2(folders["transformers"], settings("transformers"))
    assert isinstance(ours, Sam2Transformers)
    shown, boxes = window()[2], BOXES[2]
    processor = Sam2Processor(ours.image_processor)
    pixels = [[side * size for side, size in zip(box, (shown.width, shown.height) * 2, strict=True)] for box in boxes]
    inputs = processor(images=shown.image, input_boxes=[pixels], return_tensors="pt")
    with torch.inference_mode():
        outputs = ours.model(pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"], multimask_output=False)
    logits = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"], binarize=False)[0][:, 0].numpy()
    found = list(segment(ours, [shown], [boxes], 1)[0].values())
    masks = np.stack([mask_of(own, shown) for own in found])
    assert np.abs(logits[masks != (logits > 0)]).max(initial=0) < 1e-4
    assert [own.predicted_iou for own in found] == pytest.approx(outputs.iou_scores[0, :, 0].tolist(), abs=1e-5)


class Fixed:
    """A segmenter of given logits."""

    def __init__(self, logits: torch.Tensor, ious: list[float]) -> None:
        self._logits, self._ious = logits, torch.tensor(ious)

    def embed(self, images: object) -> None:
        return None

    def logits(self, embedded: object, index: int, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._logits, self._ious


def test_stability_area_and_bounds_are_those_of_the_mask() -> None:
    logits = torch.full((2, 4, 4), -5.0)
    logits[0, 1:3, 1:3] = 5.0
    logits[0, 0, 1:3] = 0.5  # between the two thresholds
    found = list(segment(Fixed(logits, [0.9, float("nan")]), [pictured(4, 4)], [[(0, 0, 1, 1), (0, 0, 0.5, 1)]], 1)[0].values())
    assert (found[0].area, found[0].bounds) == (6 / 16, (1, 0, 3, 3))
    assert found[0].stability == pytest.approx(4 / 6)
    assert found[0].predicted_iou == pytest.approx(0.9)
    assert (found[1].stability, found[1].area, found[1].bounds) == (0, 0, (0, 0, 0, 0)) and np.isnan(found[1].predicted_iou)


def test_logits_that_are_no_numbers_are_an_empty_mask() -> None:
    (found,) = segment(Fixed(torch.full((1, 4, 4), torch.nan), [0.5]), [pictured(8, 6)], [[(0, 0, 1, 1)]], 1)[0].values()
    assert (found.area, found.stability) == (0, 0) and not decode(found.rle, 8, 6).any()


def test_an_image_of_one_pixel_has_masks_of_one_pixel(segmenter: Segmenter) -> None:
    (found,) = segment(segmenter, [pictured(1, 1)], [[(0.1, 0.1, 0.9, 0.9)]], 1)[0].values()
    assert decode(found.rle, 1, 1).shape == (1, 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_draws_nearly_the_same(folders: dict[str, Path], dtype: str) -> None:
    for backend in SAVE:
        exact, rough = (load_sam2(folders[backend], settings(backend, dtype=name)) for name in ("float32", dtype))
        one, two = (next(iter(segment(own, window()[:1], BOXES[:1], 1)[0].values())) for own in (exact, rough))
        first, second = mask_of(one, window()[0]), mask_of(two, window()[0])
        assert (first & second).sum() / (first | second).sum() > 0.9 and 0.02 < first.mean() < 0.98


def linked(folder: Path, target: Path, *without: str) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        if file.name not in without:
            (target / file.name).symlink_to(file)
    return target


def test_a_folder_that_lacks_a_file_or_has_two_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    package, own = folders["sam2"], settings("sam2")
    with pytest.raises(ValueError, match=r"0 files \*\.pt, one is needed"):
        load_sam2(linked(package, tmp_path / "a", "own.pt"), own)
    with pytest.raises(
        ValueError, match=r"no \*\.yaml with the configuration of own\.pt; the package has those of .*sam2\.1_hiera_tiny\.pt"
    ):
        load_sam2(linked(package, tmp_path / "b", "own.yaml"), own)
    both = linked(package, tmp_path / "c")
    (both / "other.pt").symlink_to(package / "own.pt")
    with pytest.raises(ValueError, match=r"2 files \*\.pt"):
        load_sam2(both, own)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert (folders["transformers"] / name).is_file()
        with pytest.raises(ValueError, match=r"tiny: not a whole SAM 2 of transformers|no weights as \*\.safetensors"):
            load_sam2(linked(folders["transformers"], tmp_path / name, name), settings("transformers"))


def test_broken_or_foreign_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    package = folders["sam2"]
    cut = linked(package, tmp_path / "cut", "own.pt")
    (cut / "own.pt").write_bytes((package / "own.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"own\.pt: not the weights of this SAM 2"):
        load_sam2(cut, settings("sam2"))
    lacking = linked(package, tmp_path / "lacking", "own.pt")
    state = torch.load(package / "own.pt", weights_only=True)["model"]
    del state["no_mem_embed"]
    torch.save({"model": state}, lacking / "own.pt")
    with pytest.raises(ValueError, match="no_mem_embed"):
        load_sam2(lacking, settings("sam2"))
    torch.save(torch.zeros(3), lacking / "own.pt")
    with pytest.raises(ValueError, match=r"own\.pt: not the weights of this SAM 2"):
        load_sam2(lacking, settings("sam2"))
    other = linked(folders["transformers"], tmp_path / "other", "model.safetensors")
    weights = load_file(folders["transformers"] / "model.safetensors")
    del weights["mask_decoder.iou_token.weight"]
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors of SAM 2, the first is mask_decoder\.iou_token"):
        load_sam2(other, settings("transformers"))


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "sam2.build_sam.torch.hub.load",
        "sam2.modeling.sam2_base.torch.load",
        "sam2.modeling.memory_encoder.nn.Linear",
        "sam2.modeling.memory_encoder.nothing",
        "sam2.modeling.nowhere.CXBlock",
        "sam2.build_sam.build_sam2",
        "5",
    ],
)
def test_a_configuration_can_name_nothing_but_the_package_s_models(folders: dict[str, Path], tmp_path: Path, target: str) -> None:
    foreign = linked(folders["sam2"], tmp_path / "foreign", "own.yaml")
    text = (folders["sam2"] / "own.yaml").read_text().replace("sam2.modeling.memory_encoder.CXBlock", target)
    (foreign / "own.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"would call '{target}'"):
        load_sam2(foreign, settings("sam2"))


@pytest.mark.parametrize(
    "text", ["model: [", "weights: 3", "model:\n  _target_: sam2.modeling.sam2_base.SAM2Base", "", "model: ${nothing}"]
)
def test_a_configuration_that_is_none_is_named(folders: dict[str, Path], tmp_path: Path, text: str) -> None:
    broken = linked(folders["sam2"], tmp_path / "broken", "own.yaml")
    (broken / "own.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"own\.yaml: not the configuration of a SAM 2"):
        load_sam2(broken, settings("sam2"))


def test_the_weights_are_fp32_whatever_they_were_saved_in(folders: dict[str, Path], tmp_path: Path) -> None:
    other = linked(folders["transformers"], tmp_path / "other", "model.safetensors")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folders["transformers"] / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    loaded = load_sam2(other, settings("transformers"))
    assert isinstance(loaded, Sam2Transformers) and loaded.model.dtype == torch.float32


def test_meta_s_own_weights_need_no_configuration(tmp_path: Path) -> None:
    """The configuration of SAM 2.1 tiny comes from the package; weights of that name but another model's are refused tensor by tensor."""
    (tmp_path / "a").mkdir()
    torch.save({"model": {}}, tmp_path / "a" / "sam2.1_hiera_tiny.pt")
    with pytest.raises(ValueError, match=r"sam2\.1_hiera_tiny\.pt: not the weights of this SAM 2 .*Missing key"):
        load_sam2(tmp_path / "a", replace(settings("sam2"), model="a"))
