"""The masks step, one shard of it: data/images -> data/masks/shard=NN. Run it with `python -m tasks.masks --shard N`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from headwise.examples import INDEX, OBJECTS_FILE, Example, causes, check_bad_share, read_examples, write_bad
from headwise.files import new_folder, read_table, write_manifest
from headwise.masks.annotation import NO_OBJECT, Annotator, annotate, by_image
from headwise.masks.exact import ExactMasks
from headwise.masks.settings import Masks, weights_folders
from headwise.masks.table import MASKS, MASKS_FILE, masks_writer
from tasks.command import plain_errors, read_settings, read_shard
from tasks.progress import progress_bar

IMAGES, MASKS_FOLDER = Path("data/images"), Path("data/masks")
SPLIT = "calibration"
EXACT_AT_ONCE = 16


def write_masks(images: Path, output: Path, settings: Masks, shard: int, num_shards: int) -> None:
    """Write masks.parquet, bad.parquet and manifest.json for one shard of the calibration split: every `num_shards`-th of its images.

    Raises ValueError if the masks' source is missing or broken, more than `max_bad_share` of the examples is bad, or models found nothing
    at all.
    """
    examples = shard_examples(read_examples(images, SPLIT), shard, num_shards)
    annotator, at_once, sources = open_annotator(images, settings)
    bad: dict[str, str] = {}
    with new_folder(output) as folder:
        with masks_writer(folder / MASKS_FILE) as writer, progress_bar(f"masks, shard {shard}") as show:
            for table in annotate(annotator, images, examples, at_once, bad, show):
                writer.write_table(table)
        check_bad_share(bad, len(examples), settings.max_bad_share)
        counts = count(folder / MASKS_FILE)
        if settings.source == "generated" and not counts["objects"] and set(counts["without_object"]) - {NO_OBJECT}:
            raise ValueError(
                f"Florence-2 found no object for any of {len(examples)} examples: most likely its weights are newly initialised, or not "
                f"those of its processor (masks.grounding.model = {settings.grounding.model})"
            )
        write_bad(bad, folder)
        extra = {"shard": shard, "shards": num_shards, "examples": len(examples), "bad": len(bad), **counts}
        write_manifest(folder, stage="masks", settings=settings, inputs={INDEX: images / INDEX, **sources}, extra=extra)


def shard_examples(examples: Sequence[Example], shard: int, num_shards: int) -> list[Example]:
    """The examples of every `num_shards`-th image; those without an image are in the first shard, which says that they are bad."""
    bad: dict[str, str] = {}
    chosen = [example for own in by_image(examples, bad)[shard::num_shards] for example in own]
    return chosen + [example for example in examples if example.id in bad and shard == 0]


def open_annotator(images: Path, settings: Masks) -> tuple[Annotator, int, Mapping[str, Path]]:
    """Who makes the masks, of how many images at once, and what from."""
    if settings.source == "exact":
        return ExactMasks(images, settings.quality), EXACT_AT_ONCE, {OBJECTS_FILE: images / OBJECTS_FILE}
    from headwise.masks.florence2 import load_florence2
    from headwise.masks.generated import GeneratedMasks
    from headwise.masks.sam2 import load_sam2

    folders = weights_folders(settings)
    for part, folder in folders.items():
        print(f"{part}: {folder}", flush=True)
    florence2, sam2 = load_florence2(folders["grounding"], settings.grounding), load_sam2(folders["segmentation"], settings.segmentation)
    at_once = max(settings.grounding.batch_size, settings.segmentation.batch_size)
    return GeneratedMasks(florence2, sam2, settings), at_once, folders


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
