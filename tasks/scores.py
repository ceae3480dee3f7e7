"""The scores step: data/masks, data/attention -> data/scores. Run it with `python -m tasks.scores`."""

from collections.abc import Sequence
from pathlib import Path

from headwise.attention.schema import PART
from headwise.examples import causes, write_bad
from headwise.files import new_folder, write_json, write_manifest, write_table
from headwise.masks.table import MASKS_FILE, read_masks
from headwise.scores.head_impact import HeadImpact
from headwise.scores.schema import EXAMPLES_FILE, HEADS, HEADS_FILE, IMPACTS, TESTS_FILE
from headwise.scores.scoring import score_heads
from headwise.scores.token_masks import NO_PLACE
from tasks.command import plain_errors, read_settings

MASKS_FOLDER, ATTENTION, SCORES = Path("data/masks"), Path("data/attention"), Path("data/scores")


def write_scores(masks: Sequence[Path], attention: Sequence[Path], output: Path, settings: HeadImpact) -> None:
    """Write heads.parquet, examples.parquet, tests.json, bad.parquet (examples without a score) and manifest.json, from the folders of all
    shards.

    Examples with nothing to look at are left out with a warning. Raises ValueError if a shard is missing or broken, more than
    `max_bad_share` of the examples have no readable mask, or fewer than `min_images` images can be scored; where visual tokens
    have no place in the image, there are only the means of the attention's scalars.
    """
    parts = {shard.name: shard / PART for shard in attention}
    missing = [name for name, part in parts.items() if not part.is_file()]
    if missing:
        raise ValueError(f"no attention of {missing}: run the attention step for each shard of params.yaml")
    with new_folder(output) as folder:
        scores = score_heads(list(parts.values()), read_masks(masks), settings, folder / EXAMPLES_FILE)
        for cause, count in causes({**scores.left_out, **scores.bad}.values()).items():
            print(f"warning: {count} examples have no score, {cause}", flush=True)
        if NO_PLACE in scores.left_out.values():
            print(f"warning: {HEADS_FILE} holds no {', '.join(IMPACTS)}, {NO_PLACE}", flush=True)
        write_table(scores.heads, folder / HEADS_FILE, HEADS)
        write_json(scores.tests, folder / TESTS_FILE)
        write_bad({**scores.left_out, **scores.bad}, folder)
        inputs = {f"masks/{shard.name}": shard / MASKS_FILE for shard in masks} | {
            f"attention/{name}": part for name, part in parts.items()
        }
        write_manifest(folder, stage="scores", settings=settings, inputs=inputs)


if __name__ == "__main__":
    with plain_errors():
        names = [f"shard={shard:02d}" for shard in read_settings("shards", list[int])]
        masks, attention = ([folder / name for name in names] for folder in (MASKS_FOLDER, ATTENTION))
        write_scores(masks, attention, SCORES, read_settings("scores", HeadImpact))
