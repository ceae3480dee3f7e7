"""Images as people have them, and indices with mistakes."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headwise.examples import (
    BadExample,
    Example,
    causes,
    check_bad_share,
    decode_image,
    image_path,
    open_image,
    read_examples,
    write_examples,
)


def encoded(image: Image.Image, format_: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=format_, **options)
    return buffer.getvalue()


def example(**changes: object) -> Example:
    fields = {"id": "a", "image": "images/a.png", "sha256": None, "question": "What?", "answers": ("x",), "phrase": None, "task": "vqa"}
    return Example(**{**fields, "split": "evaluation", **changes})


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
GREY = np.linspace(0, 255, 256, dtype=np.uint8).reshape(16, 16)


def test_sixteen_bit_images_are_scaled_and_not_clipped() -> None:
    image = decode_image(encoded(Image.fromarray(GREY.astype(np.uint16) * 257)), "x")
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image)[..., 0].astype(int) - GREY).max() <= 1


@pytest.mark.parametrize(("mode", "format_"), [("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("LA", "PNG"), ("RGBA", "PNG")])
def test_every_mode_becomes_rgb(mode: str, format_: str) -> None:
    image = decode_image(encoded(Image.fromarray(GREY).convert(mode), format_), "x")
    assert (image.mode, image.size) == ("RGB", (16, 16))


def test_transparent_pixels_are_white() -> None:
    assert decode_image(encoded(Image.new("RGBA", (2, 2), (10, 20, 30, 0))), "x").getpixel((0, 0)) == (255, 255, 255)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[274] = 6
    assert decode_image(encoded(Image.new("RGB", (30, 10)), "JPEG", exif=exif.tobytes()), "x").size == (10, 30)


def test_of_a_phones_two_pictures_in_one_file_the_first_is_taken() -> None:
    content = encoded(NOISE, "MPO", save_all=True, append_images=[NOISE.transpose(Image.Transpose.ROTATE_90)], quality=100)
    assert getattr(Image.open(BytesIO(content)), "n_frames") == 2  # noqa: B009
    difference = np.asarray(decode_image(content, "x")).astype(int) - np.asarray(decode_image(encoded(NOISE, "JPEG", quality=100), "x"))
    assert np.abs(difference).max() == 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"no image at all", r"not a readable image \(of no format that is known\)"),
        (encoded(NOISE)[:900], "not a readable image"),
        (encoded(NOISE, "JPEG")[:900], "not a readable image"),
        (encoded(NOISE, "GIF", save_all=True, append_images=[NOISE.transpose(Image.Transpose.ROTATE_90)]), "an animation of 2 frames"),
    ],
    ids=["empty", "text", "cut-off-png", "cut-off-jpeg", "animation"],
)
def test_bad_files_say_why(content: bytes, reason: str) -> None:
    with pytest.raises(BadExample, match=rf"bad\.png: {reason}"):
        decode_image(content, "bad.png")


@pytest.mark.parametrize("image", ["../outside.png", "/etc/passwd", "images/../../x.png"])
def test_paths_stay_in_the_folder(tmp_path: Path, image: str) -> None:
    with pytest.raises(BadExample, match="leaves the data folder"):
        image_path(tmp_path, image)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(BadExample, match="leaves the data folder"):
        image_path(tmp_path / "data", "x.png")


def test_a_missing_image_and_a_changed_one(tmp_path: Path) -> None:
    with pytest.raises(BadExample, match=r"images/a\.png: cannot be read \(No such file"):
        open_image(tmp_path, example())
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(encoded(Image.fromarray(GREY)))
    assert open_image(tmp_path, example()).size == (16, 16)
    with pytest.raises(BadExample, match="differ from the sha256"):
        open_image(tmp_path, example(sha256="0" * 64))


def test_the_index_comes_back_as_written(tmp_path: Path) -> None:
    written = [example(), example(id="b", image=None, phrase="red star", answers=("1", "2"), split="forgetting")]
    write_examples(written, tmp_path)
    assert read_examples(tmp_path) == written
    assert read_examples(tmp_path, "forgetting") == written[1:]


def test_duplicate_ids_and_absent_splits_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 ids occur more than once, the first is 'a'"):
        write_examples([example(), example()], tmp_path)
    with pytest.raises(ValueError, match=r"no index\.parquet here"):
        read_examples(tmp_path)
    write_examples([example()], tmp_path)
    with pytest.raises(ValueError, match=r"no example in split 'nowhere'; the splits here are \['evaluation'\]"):
        read_examples(tmp_path, "nowhere")


def test_the_share_of_bad_examples_decides() -> None:
    bad = {str(i): "broken" for i in range(5)}
    check_bad_share(bad, 100, 0.05)
    with pytest.raises(ValueError, match=r"5 of 99 examples are bad, more than max_bad_share = 0\.05 allows; the first is 0: broken"):
        check_bad_share(bad, 99, 0.05)
    with pytest.raises(ValueError, match="5 of 5"):
        check_bad_share(bad, 5, 1.0)


def test_reasons_are_counted_by_their_causes() -> None:
    assert causes(["b: 1", "a: 2", "b: 3: 4"]) == {"b": 2, "a": 1}
    assert list(causes(["a: 1", "b: 2", "b: 3"])) == ["b", "a"]
