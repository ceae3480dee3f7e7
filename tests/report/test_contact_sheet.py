import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from headwise.examples import Example, write_examples
from headwise.files import write_table
from headwise.masks.table import MASKS
from headwise.report.contact_sheet import COLOURS, SIDE, masks_section
from headwise.report.page import write_report
from tests.masks.dataset import left, right, write_dataset
from tests.report.artefacts import Size, write_workspace
from tests.synthetic import mask_row


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three images with two masks each, generated, of which the second is dropped, and one in which nothing was found; the truth is known,
    and the first masks are it.
    """
    write_dataset(tmp_path / "images", 4)
    rows = []
    for number in range(3):
        own = {"image": f"images/{number:03d}.png", "source": "florence2+sam2", "predicted_iou": 0.9}
        rows.append(mask_row(f"{number:03d}-q", left(), phrase="cat", **own))
        rows.append(mask_row(f"{number:03d}-q", right(), phrase="<dog>", object=1, key=False, reason="too small", **own))
    nothing = dict.fromkeys(MASKS.names) | {
        "example_id": "003-q",
        "image": "images/003.png",
        "source": "florence2+sam2",
        "reason": "nothing found: x",
        "height": 40,
        "width": 60,
    }
    (tmp_path / "masks/shard=00").mkdir(parents=True)
    write_table(pa.Table.from_pylist([*rows, nothing], schema=MASKS), tmp_path / "masks/shard=00/masks.parquet", MASKS)
    (tmp_path / "sheets").mkdir()
    return tmp_path


def test_every_object_is_drawn_and_named_with_what_became_of_it(data: Path) -> None:
    section = masks_section(data, data / "sheets")
    assert section is not None and len(section.sheets) == 4
    assert (
        "4 examples about 4 images have 6 objects, counted example by example (masks: florence2+sam2); 3 are usable, and 1 examples"
        in section.sentence
    )
    for sheet in (sheet for sheet in section.sheets if len(sheet.entries) == 2):
        assert [(entry.phrase, entry.key, entry.reason) for entry in sheet.entries] == [("cat", True, None), ("<dog>", False, "too small")]
        assert sheet.entries[1].colour == "#808080" != sheet.entries[0].colour
        picture = np.asarray(Image.open(data / sheet.picture))
        assert max(picture.shape[:2]) == SIDE
        scale = SIDE / 60
        inside, outside = picture[int(15 * scale), int(15 * scale)], picture[int(15 * scale), int(40 * scale)]
        assert np.abs(inside.astype(int) - (127 + np.array(COLOURS[0]) // 2)).max() < 12 and outside.min() > 240


def test_what_was_not_found_is_shown_too(data: Path) -> None:
    section = masks_section(data, data / "sheets")
    assert section is not None
    assert [("no object", "nothing found: x")] in [[(entry.phrase, entry.reason) for entry in sheet.entries] for sheet in section.sheets]


def test_the_agreement_with_the_data_s_own_masks_is_shown(data: Path) -> None:
    section = masks_section(data, data / "sheets")
    assert section is not None and section.agreement is not None
    cells = dict(section.agreement.rows)
    assert (cells["examples"], cells["objects"], cells["masks"], cells["mean iou"]) == ("4", "4", "3", "0.75")


def test_the_page_has_the_sheet_and_no_markup_of_the_user(tmp_path: Path) -> None:
    workspace = write_workspace(tmp_path, Size(examples=3))
    page = write_report(workspace, tmp_path / "page", {}).read_text()
    section = page[page.index('id="masks"') : page.index('id="overlays"')]
    assert len(re.findall(r'<img src="masks/\d\d\.jpg"', section)) == 3 and "(key)" in section and "smaller than min_area" in section


def test_without_masks_there_is_a_plain_sentence(tmp_path: Path) -> None:
    assert masks_section(tmp_path, tmp_path) is None
    examples = [Example("a", None, None, "?", ("x",), None, "vqa", "calibration")]
    (tmp_path / "data/images").mkdir(parents=True)
    write_examples(examples, tmp_path / "data/images")
    assert "No mask has been made: not yet, or" in write_report(tmp_path, tmp_path / "page", {}).read_text()
