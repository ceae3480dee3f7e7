"""The masks step: data/images -> data/masks. Run it with `python -m tasks.masks`."""

from pathlib import Path

from headwise.examples import INDEX, OBJECTS_FILE, read_examples, write_bad
from headwise.files import new_folder, write_manifest, write_table
from headwise.masks.exact import exact_masks
from headwise.masks.quality import MaskQuality
from headwise.masks.table import MASKS, MASKS_FILE
from tasks.command import plain_errors, read_settings

IMAGES, MASKS_FOLDER = Path("data/images"), Path("data/masks")
SPLIT = "calibration"


def write_masks(images: Path, output: Path, quality: MaskQuality) -> None:
    """Write masks.parquet, bad.parquet and manifest.json for the calibration split of a data set with exact masks.

    Raises ValueError if the data set has no objects.parquet, or more than `max_bad_share` of the examples is bad.
    """
    examples = read_examples(images, SPLIT)
    masks, bad = exact_masks(images, examples, quality)
    with new_folder(output) as folder:
        write_table(masks, folder / MASKS_FILE, MASKS)
        write_bad(bad, folder)
        inputs = {name: images / name for name in (INDEX, OBJECTS_FILE)}
        write_manifest(folder, stage="masks", settings=quality, inputs=inputs, extra={"examples": len(examples), "bad": len(bad)})


if __name__ == "__main__":
    with plain_errors():
        write_masks(IMAGES, MASKS_FOLDER, read_settings("masks", MaskQuality))
