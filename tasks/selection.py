"""The selection step: data/scores -> data/selections/ARM. Run it with `python -m tasks.selection --arm top`."""

from argparse import ArgumentParser
from pathlib import Path
from typing import get_args

from headwise.files import new_folder, read_table, write_manifest
from headwise.scores.schema import HEADS, HEADS_FILE
from headwise.selection import SELECTION_FILE, Criterion, LayerArm, select, write_selection
from tasks.command import plain_errors, read_settings

SCORES, SELECTIONS = Path("data/scores"), Path("data/selections")


def choose_layers(scores: Path, output: Path, criterion: Criterion, arm: LayerArm) -> None:
    """Write selection.json and manifest.json. Raises ValueError if k exceeds the number of layers, or a score is missing."""
    heads = scores / HEADS_FILE
    selection = select(read_table(heads, HEADS), criterion, arm)
    with new_folder(output) as folder:
        write_selection(selection, heads, folder / SELECTION_FILE)
        write_manifest(folder, stage="selection", settings=criterion, inputs={"scores": heads}, extra={"arm": arm})


if __name__ == "__main__":
    with plain_errors():
        parser = ArgumentParser(description=__doc__)
        parser.add_argument("--arm", choices=get_args(LayerArm), required=True, help="which layers to take, by their scores")
        given = parser.parse_args().arm
        choose_layers(SCORES, SELECTIONS / given, read_settings("selection", Criterion), given)
