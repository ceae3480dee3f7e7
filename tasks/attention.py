"""The attention step, one shard of it: data/images -> data/attention/shard=NN. Run it with `python -m tasks.attention --shard N`."""

from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import polars as pl
from PIL import Image

from headwise.attention.observe import observe
from headwise.attention.proof import proved
from headwise.attention.schema import ATTENTION, PART
from headwise.attention.table import merge, part_writer, to_table
from headwise.examples import INDEX, BadExample, Example, check_bad_share, open_image, read_examples, write_bad
from headwise.files import new_folder, write_manifest
from headwise.observation import Observation
from headwise.vlm import VLM, encode, load_observed, revision
from tasks.command import plain_errors, read_settings, read_shard
from tasks.progress import progress_bar

IMAGES, ATTENTION_FOLDER = Path("data/images"), Path("data/attention")
SPLIT = "calibration"
BATCHES_IN_MEMORY = 8
"""Examples of this many batches are opened, sorted by length and written as one row group."""

T = TypeVar("T")
Opened = tuple[Example, Image.Image | None]


def write_attention(images: Path, output: Path, observation: Observation, shard: int, num_shards: int) -> None:
    """Write part.parquet, bad.parquet and manifest.json for one shard of the `sample`: every `num_shards`-th of its examples.

    The attention is read with the first reference answer teacher-forced, once the model has been `proved`. Raises ValueError if no image
    fits into `max_examples`, the model cannot be loaded or proved, or more than `max_bad_share` of the examples is bad.
    """
    examples = sample(read_examples(images, SPLIT), observation.max_examples)[shard::num_shards]
    vlm, model_revision = load_observed(observation), revision(observation.model)
    figures = proved(vlm, model_revision)
    print("proved:", ", ".join(f"{name} {figure:.1e}" for name, figure in figures.items()), flush=True)
    bad: dict[str, str] = {}
    with new_folder(output) as folder:
        with part_writer(folder / PART) as writer, progress_bar(f"attention, shard {shard}") as show:
            for done, window in _chunks(examples, BATCHES_IN_MEMORY * observation.batch_size):
                show(done, len(examples))
                if parts := _observe_window(vlm, images, window, observation.batch_size, bad):
                    writer.write_table(merge(parts).to_arrow().cast(ATTENTION))
            show(len(examples), len(examples))
        check_bad_share(bad, len(examples), observation.max_bad_share)
        write_bad(bad, folder)
        extra = {"shard": shard, "shards": num_shards, "examples": len(examples), "bad": len(bad), "model": model_revision}
        write_manifest(folder, stage="attention", settings=observation, inputs={INDEX: images / INDEX}, extra=extra)


def sample(examples: Sequence[Example], max_examples: int) -> list[Example]:
    """All examples of as many images as fit into `max_examples`, sorted by id.

    Images are taken in the order of the SHA-256 of their name (a text's is its id), so that names in the order of their classes give every
    class its share, and a larger sample holds a smaller one. Raises ValueError if not even the first image fits.
    """

    def place(example: Example) -> str:
        return sha256((example.image or example.id).encode()).hexdigest()

    ordered = sorted(examples, key=place)
    taken = ordered[:max_examples]
    if len(taken) < len(ordered):  # the image that the cut goes through is left out
        taken = [example for example in taken if place(example) != place(ordered[max_examples])]
    if not taken:
        own = sum(place(example) == place(ordered[0]) for example in ordered)
        raise ValueError(f"max_examples = {max_examples}, and {ordered[0].image} alone has {own} examples: raise it")
    return sorted(taken, key=lambda example: example.id)


def _observe_window(vlm: VLM, images: Path, window: Sequence[Example], batch_size: int, bad: dict[str, str]) -> list[pl.DataFrame]:
    """Tables of the window's batches, of examples of like length; bad examples are noted with their reason."""
    opened: list[Opened] = []
    for example in window:
        try:
            if not example.answers:
                raise BadExample("no reference answer")
            opened.append((example, None if example.image is None else open_image(images, example)))
        except BadExample as error:
            bad[example.id] = str(error)
    opened.sort(key=lambda pair: len(pair[0].question) + len(pair[0].answers[0]))
    return [part for _, batch in _chunks(opened, batch_size) for part in _observe_batch(vlm, batch, bad)]


def _observe_batch(vlm: VLM, batch: Sequence[Opened], bad: dict[str, str]) -> list[pl.DataFrame]:
    examples, pictures = zip(*batch, strict=True)
    try:
        encoded = encode(vlm, pictures, [example.question for example in examples], [example.answers[0] for example in examples])
    except BadExample as error:
        if len(batch) > 1:  # one of them is bad: the others go on alone
            return [part for one in batch for part in _observe_batch(vlm, [one], bad)]
        bad[examples[0].id] = str(error)
        return []
    table = pl.from_arrow(to_table(observe(vlm, encoded), [example.id for example in examples]))
    assert isinstance(table, pl.DataFrame)
    return [table]


def _chunks(items: Sequence[T], size: int) -> Iterator[tuple[int, Sequence[T]]]:
    """Slices of the items, each with how many came before it."""
    return ((start, items[start : start + size]) for start in range(0, len(items), size))


def main(arguments: Sequence[str] | None = None) -> None:
    """Observe the shard that the command line names, one of params.yaml's `shards`."""
    shard, place, number = read_shard("python -m tasks.attention", __doc__, arguments)
    write_attention(IMAGES, ATTENTION_FOLDER / f"shard={shard:02d}", read_settings("attention", Observation), place, number)


if __name__ == "__main__":
    with plain_errors():
        main()
