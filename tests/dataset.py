"""A small data set on disk: per image a caption, a colour and a count, in as many splits as are asked for."""

from pathlib import Path

from headwise.examples import Example, write_examples
from headwise.files import sha256_file
from tests import tiny

COLOURS = ("red", "blue", "green")


def write_dataset(folder: Path, **images: int) -> list[Example]:
    """`write_dataset(folder, calibration=4, evaluation=3)`: three examples for each of so many images of each split."""
    (folder / "images").mkdir(parents=True)
    examples = []
    for split, number in images.items():
        for index in range(number):
            seed = len(examples)
            path = f"images/{split}-{index}.png"
            tiny.image(seed).save(folder / path)
            colour, count = COLOURS[index % 3], str(1 + index % 2)
            for task, question, answer in (
                ("caption", "Describe the image.", f"A {colour} circle above {count} stars."),
                ("colour", "What colour is the large circle?", colour),
                ("count", "How many stars are in the picture?", count),
            ):
                digest = sha256_file(folder / path)
                examples.append(Example(f"{split}-{index}-{task}", path, digest, question, (answer,), "circle", task, split))
    write_examples(examples, folder)
    return examples
