"""The scores step: data/masks, data/attention -> data/scores. Run it with `python -m tasks.scores`."""

from collections.abc import Mapping
from pathlib import Path

from headwise.attention.schema import PART
from headwise.examples import write_bad
from headwise.files import new_folder, read_table, write_json, write_manifest, write_table
from headwise.masks.table import MASKS, MASKS_FILE
from headwise.scores.head_impact import HeadImpact
from headwise.scores.schema import EXAMPLES_FILE, HEADS, HEADS_FILE, IMPACTS, TESTS_FILE
from headwise.scores.scoring import score_heads
from headwise.scores.token_masks import NO_PLACE, causes
from tasks.command import plain_errors, read_settings

MASKS_FOLDER, ATTENTION, SCORES = Path("data/masks"), Path("data/attention"), Path("data/scores")


def write_scores(masks: Path, shards: Mapping[str, Path], output: Path, settings: HeadImpact) -> None:
    """Write heads.parquet, examples.parquet, tests.json, bad.parquet (examples without a score) and manifest.json.

    Examples with nothing to look at are left out with a warning. Raises ValueError if a shard is missing or broken, more than
    `max_bad_share` of the examples have no readable mask, or fewer than `min_images` images can be scored; where visual tokens
    have no place in the image, there are only the means of the attention's scalars.
    """
    parts = {name: folder / PART for name, folder in shards.items()}
    missing = [name for name, part in parts.items() if not part.is_file()]
    if missing:
        raise ValueError(f"no attention of {missing}: run the attention step for each shard of params.yaml")
    with new_folder(output) as folder:
        scores = score_heads(list(parts.values()), read_table(masks / MASKS_FILE, MASKS), settings, folder / EXAMPLES_FILE)
        for cause, count in causes({**scores.left_out, **scores.bad}.values()).items():
            print(f"warning: {count} examples have no score, {cause}", flush=True)
        if NO_PLACE in scores.left_out.values():
            print(f"warning: {HEADS_FILE} holds no {', '.join(IMPACTS)}, {NO_PLACE}", flush=True)
        write_table(scores.heads, folder / HEADS_FILE, HEADS)
        write_json(scores.tests, folder / TESTS_FILE)
        write_bad({**scores.left_out, **scores.bad}, folder)
        write_manifest(folder, stage="scores", settings=settings, inputs={"masks": masks / MASKS_FILE, **parts})


if __name__ == "__main__":
    with plain_errors():
        folders = {f"shard={shard:02d}": ATTENTION / f"shard={shard:02d}" for shard in read_settings("shards", list[int])}
        write_scores(MASKS_FOLDER, folders, SCORES, read_settings("scores", HeadImpact))
