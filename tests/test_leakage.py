"""Copies of an image across splits are found, and images that only look alike are not."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from headwise.data import DataSource, write_data
from headwise.examples import Example, read_examples, write_examples
from headwise.leakage import BITS, MIN_DISTANCE, Leak, check_leaks, fingerprint, fingerprints, leaks, split_leaks
from tasks.images import run


def random_prints(number: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"{seed}-{k}": rng.integers(0, 2**64, BITS // 64, dtype=np.uint64) for k in range(number)}


def bits(first: np.ndarray, second: np.ndarray) -> int:
    return sum((int(a) ^ int(b)).bit_count() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("rows", "columns"), [(3, 5), (300, 40), (1, 1), (0, 3), (3, 0)])
def test_pairs_are_those_of_two_loops(rows: int, columns: int) -> None:
    first, second = random_prints(rows, 1), random_prints(columns, 2)
    expected = {(a, b, bits(x, y)) for a, x in first.items() for b, y in second.items() if bits(x, y) < 120}
    found = leaks(first, second, 120)
    assert {(leak.calibration, leak.judged, leak.bits) for leak in found} == expected and len(found) == len(expected)
    assert [leak.bits for leak in found] == sorted(leak.bits for leak in found)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "images"
    write_data(DataSource(calibration=40, evaluation=30, forgetting=30), folder, lambda _done, _all: None)
    return folder


def changes(image: Image.Image) -> dict[str, Image.Image]:
    jpeg = BytesIO()
    image.save(jpeg, "JPEG", quality=50)
    brighter = Image.fromarray(np.clip(np.asarray(image) * 1.2, 0, 255).astype(np.uint8))
    return {
        "jpeg": Image.open(jpeg),
        "half": image.resize((image.width // 2, image.height // 2)),
        "brighter": brighter,
        "grey": image.convert("L").convert("RGB"),
        "soft": image.filter(ImageFilter.GaussianBlur(1)),
    }


def test_copies_are_near_and_other_scenes_are_not(scenes: Path) -> None:
    examples = read_examples(scenes)
    assert split_leaks(scenes, examples, MIN_DISTANCE) == []
    for path in sorted((scenes / "images").iterdir())[:10]:
        image = Image.open(path).convert("RGB")
        for name, changed in changes(image).items():
            assert bits(fingerprint(image), fingerprint(changed)) < MIN_DISTANCE, (path.name, name)


def folder_with_a_copy(scenes: Path, folder: Path) -> Path:
    """A folder of the user's: scenes, and a calibration image's JPEG among those to judge by."""
    (folder / "images").mkdir(parents=True)
    examples = [replace(example, sha256=None) for example in read_examples(scenes)]
    for example in examples:
        assert example.image
        (folder / example.image).write_bytes((scenes / example.image).read_bytes())
    copied = next(example for example in examples if example.split == "calibration")
    assert copied.image
    Image.open(folder / copied.image).save(folder / "images/copy.jpg", quality=60)
    write_examples([*examples, replace(copied, id="copy", image="images/copy.jpg", split="evaluation")], folder)
    return folder


def test_a_run_on_a_copy_refuses_and_names_the_pair(scenes: Path, tmp_path: Path) -> None:
    source = DataSource(kind="folder", path=str(folder_with_a_copy(scenes, tmp_path / "own")))
    with pytest.raises(
        ValueError, match=r"1 images to calibrate with are, or look like, images to judge by: images/\S+ and images/copy-\S+ \("
    ):
        run(source, tmp_path / "images")
    assert not (tmp_path / "images").exists()
    run(replace(source, min_distance=0), tmp_path / "images")


def test_many_pairs_are_counted() -> None:
    found = [Leak(f"{k}.jpg", f"{k}b.jpg", k) for k in range(7)]
    with pytest.raises(ValueError, match=r"^7 images .* of pope: 0\.jpg and 0b\.jpg \(0 of 256 bits differ\); .*; and 2 more$"):
        check_leaks(found, "of pope")


def test_what_cannot_be_opened_has_no_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    broken = Example("a", "broken.jpg", None, "?", ("x",), None, "t", "calibration")
    assert fingerprints(tmp_path, [broken, replace(broken, image=None), replace(broken, image="none.jpg")]) == {}
