"""The masks step, one shard of it: data/images -> data/masks/shard=NN. Run it with `python -m tasks.masks --shard N`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from headwise.examples import INDEX, OBJECTS_FILE, causes, check_bad_share, read_examples, write_bad
from headwise.files import new_folder, read_table, write_manifest
from headwise.hub import weights_digest
from headwise.masks.annotation import Annotator, annotate, shard_examples
from headwise.masks.exact import ExactMasks
from headwise.masks.settings import Masks, files_of, weights_folders
from headwise.masks.table import MASKS, MASKS_FILE, masks_writer
from tasks.command import plain_errors, read_settings, read_shard
from tasks.progress import progress_bar

IMAGES, MASKS_FOLDER = Path("data/images"), Path("data/masks")
SPLIT = "calibration"
EXACT_AT_ONCE = 16


def write_masks(images: Path, output: Path, settings: Masks, shard: int, num_shards: int) -> None:
    """Write masks.parquet, bad.parquet and manifest.json for one shard of the calibration split: every `num_shards`-th of its images.

    Raises ValueError if the masks' source is missing or broken, or more than `max_bad_share` of the examples is bad.
    """
    examples = shard_examples(read_examples(images, SPLIT), shard, num_shards)
    annotator, at_once, sources = open_annotator(images, settings)
    bad: dict[str, str] = {}
    with new_folder(output) as folder:
        with masks_writer(folder / MASKS_FILE) as writer, progress_bar(f"masks, shard {shard}") as show:
            for table in annotate(annotator, images, examples, at_once, bad, show):
                writer.write_table(table)
        check_bad_share(bad, len(examples), settings.max_bad_share)
        write_bad(bad, folder)
        extra = {"shard": shard, "shards": num_shards, "examples": len(examples), "bad": len(bad), **count(folder / MASKS_FILE)}
        write_manifest(folder, stage="masks", settings=settings, inputs={INDEX: images / INDEX, **sources}, extra=extra)


def open_annotator(images: Path, settings: Masks) -> tuple[Annotator, int, Mapping[str, Path | str]]:
    """Who makes the masks, of how many images at once, and what from; `auto` is exact where the data have masks."""
    if settings.source == "exact" or (settings.source == "auto" and (images / OBJECTS_FILE).is_file()):
        return ExactMasks(images, settings.quality), EXACT_AT_ONCE, {OBJECTS_FILE: images / OBJECTS_FILE}
    from headwise.masks.florence2 import load_florence2
    from headwise.masks.generated import GeneratedMasks
    from headwise.masks.sam2 import load_sam2

    folders = weights_folders(settings)
    for part, folder in folders.items():
        print(f"{part}: {folder}", flush=True)
    florence2, sam2 = load_florence2(folders["grounding"], settings.grounding), load_sam2(folders["segmentation"], settings.segmentation)
    at_once = max(settings.grounding.batch_size, settings.segmentation.batch_size)
    digests = {part: weights_digest(folders[part], files) for part, files in files_of(settings).items()}
    return GeneratedMasks(florence2, sam2, settings), at_once, digests


def count(path: Path) -> dict[str, Any]:
    """Of a shard: the objects, those whose masks are usable, and the examples without a key object by the causes of that."""
    masks = read_table(path, MASKS)
    found, without = masks.filter(pl.col("object").is_not_null()), masks.filter(pl.col("object").is_null())
    return {"objects": len(found), "usable": found["reason"].null_count(), "without_object": causes(without["reason"])}


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the masks of the shard that the command line names, one of params.yaml's `shards`."""
    shard, place, number = read_shard("python -m tasks.masks", __doc__, arguments)
    write_masks(IMAGES, MASKS_FOLDER / f"shard={shard:02d}", read_settings("masks", Masks), place, number)


if __name__ == "__main__":
    with plain_errors():
        main()
