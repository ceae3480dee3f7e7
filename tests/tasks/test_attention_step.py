import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from headwise.attention.schema import ATTENTION, PART
from headwise.examples import BAD, Example, read_examples, write_examples
from headwise.files import read_json, read_table
from headwise.observation import Observation
from tasks import attention
from tasks.attention import main, sample, write_attention
from tests.tiny import GRID, NUM_HEADS, NUM_LAYERS, image, save, tiny_lm, tiny_vlm

NUM_EXAMPLES = 7
QUESTIONS = ["What colour is it?", "How many squares are in the picture?", "Where?"]
ANSWERS = ["red", "There are three squares.", "on the left"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_vlm(), tmp_path_factory.mktemp("models") / "vlm")


def data_set(folder: Path, broken: tuple[int, ...] = ()) -> Path:
    """Seven questions about seven pictures, with ids in another order than the rows, and two examples of another split."""
    (folder / "images").mkdir(parents=True)
    examples = []
    for index in range(NUM_EXAMPLES):
        path = f"images/{index}.png"
        image(index).save(folder / path)
        digest = hashlib.sha256((folder / path).read_bytes()).hexdigest()
        if index in broken:
            (folder / path).write_bytes(b"no picture")
        text = (QUESTIONS[index % 3], (ANSWERS[index % 3],))
        examples.append(Example(f"e{(index * 3) % NUM_EXAMPLES}", path, digest, *text, None, "colour", "calibration"))
    examples += [replace(examples[0], id=f"x{index}", split="evaluation") for index in range(2)]
    write_examples(examples, folder)
    return folder


def observation(model: Path, **changes: object) -> Observation:
    return Observation(**({"model": str(model), "batch_size": 2, "dtype": "float32"} | changes))


def part(folder: Path) -> pl.DataFrame:
    return read_table(folder / PART, ATTENTION)


def assert_same_rows(found: pl.DataFrame, expected: pl.DataFrame) -> None:
    """Batches differ between shards, so that figures differ in their last digits."""
    keys = ["example_id", "layer", "head", "views"]
    assert found.select(keys).equals(expected.select(keys))
    for name in set(found.columns) - set(keys):
        ours, theirs = (np.concatenate([np.ravel(list(np.atleast_1d(v))) for v in frame[name]]) for frame in (found, expected))
        np.testing.assert_allclose(ours.astype(float), theirs.astype(float), atol=1e-3, err_msg=name)


def test_one_shard_holds_every_calibration_example_in_order(model: Path, tmp_path: Path) -> None:
    images = data_set(tmp_path / "images")
    write_attention(images, tmp_path / "out", observation(model), 0, 1)
    rows = part(tmp_path / "out")
    assert rows["example_id"].unique(maintain_order=True).to_list() == [f"e{i}" for i in range(NUM_EXAMPLES)]
    assert rows.height == NUM_EXAMPLES * NUM_LAYERS * NUM_HEADS
    assert rows.equals(rows.sort("example_id", "layer", "head"))
    assert rows["map"].list.len().unique().to_list() == [GRID[0] * GRID[1]]
    assert read_table(tmp_path / "out" / "bad.parquet", BAD).is_empty()
    manifest = read_json(tmp_path / "out" / "manifest.json")
    assert (manifest["examples"], manifest["bad"], manifest["shards"]) == (NUM_EXAMPLES, 0, 1)


def test_two_shards_give_the_rows_of_one(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BATCHES_IN_MEMORY", 2)
    images = data_set(tmp_path / "images")
    write_attention(images, tmp_path / "one", observation(model), 0, 1)
    for shard in range(2):
        write_attention(images, tmp_path / f"shard={shard}", observation(model), shard, 2)
    both = pl.concat([part(tmp_path / f"shard={shard}") for shard in range(2)])
    assert_same_rows(both.sort("example_id", "layer", "head"), part(tmp_path / "one"))


def test_a_rerun_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    images = data_set(tmp_path / "images")
    for _ in range(2):
        write_attention(images, tmp_path / "out", observation(model, max_examples=3), 0, 1)
        files = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
        first = files if "first" not in locals() else first
    assert files == first
    chosen = [example.id for example in sample(read_examples(images, "calibration"), 3)]
    assert part(tmp_path / "out")["example_id"].unique(maintain_order=True).to_list() == chosen != ["e0", "e1", "e2"]


def test_bad_examples_become_rows_with_their_reason(model: Path, tmp_path: Path) -> None:
    images = data_set(tmp_path / "images", broken=(2,))
    write_attention(images, tmp_path / "out", observation(model, max_bad_share=0.2), 0, 1)
    (bad,) = read_table(tmp_path / "out" / "bad.parquet", BAD).rows()
    assert bad[0] == "e6"
    assert "the bytes differ from the sha256" in bad[1]
    assert part(tmp_path / "out")["example_id"].n_unique() == NUM_EXAMPLES - 1


def test_too_many_bad_examples_fail_and_leave_nothing(model: Path, tmp_path: Path) -> None:
    images = data_set(tmp_path / "images", broken=(1, 2))
    with pytest.raises(ValueError, match=r"2 of 7 examples are bad, more than max_bad_share = 0\.2"):
        write_attention(images, tmp_path / "out", observation(model, max_bad_share=0.2), 0, 1)
    assert not (tmp_path / "out").exists()


def test_an_answer_that_does_not_fit_spoils_only_its_own_example(model: Path, tmp_path: Path) -> None:
    images = data_set(tmp_path / "images")
    long, empty, none = (
        Example(f"f{i}", "images/0.png", None, "What?", answers, None, "colour", "calibration")
        for i, answers in enumerate([("red " * 300,), ("",), ()])
    )
    good = Example("g", "images/0.png", None, "What?", ("red",), None, "colour", "calibration")
    write_examples([long, empty, none, good], images)
    write_attention(images, tmp_path / "out", observation(model, batch_size=4, max_bad_share=0.8), 0, 1)
    reasons = dict(read_table(tmp_path / "out" / "bad.parquet", BAD).rows())
    assert "the model takes 256" in reasons["f0"]
    assert "has no tokens" in reasons["f1"]
    assert reasons["f2"] == "no reference answer"
    assert part(tmp_path / "out")["example_id"].unique().to_list() == ["g"]


def test_text_only(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    write_examples([Example(f"t{i}", None, None, QUESTIONS[i], (ANSWERS[i],), None, "caption", "calibration") for i in range(3)], images)
    write_attention(images, tmp_path / "out", observation(save(tiny_lm(), tmp_path / "lm")), 0, 1)
    assert part(tmp_path / "out")["map"].list.len().unique().to_list() == [0]


def test_the_command_line_reads_params_yaml(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data_set(tmp_path / "data" / "images")
    monkeypatch.chdir(tmp_path)
    params = {"shards": [0, 1], "attention": {"model": str(model), "batch_size": 4, "dtype": "float32"}}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    main(["--shard", "1"])
    assert part(Path("data/attention/shard=01"))["example_id"].unique(maintain_order=True).to_list() == ["e1", "e3", "e5"]
    assert not Path("data/attention/shard=00").exists()
    with pytest.raises(ValueError, match=r"shard 2 is none of params\.yaml's shards \[0, 1\]"):
        main(["--shard", "2"])


def asked(image: str | None, question: int) -> Example:
    return Example(f"{image}-{question}", image, None, "q", ("a",), None, "colour", "calibration")


PETS = [asked(f"images/{kind}-{n:03d}.png", question) for kind in ("cat", "dog") for n in range(100) for question in range(3)]


def test_a_sample_has_every_class_and_all_questions_of_an_image() -> None:
    chosen = sample(PETS, 121)
    images = {example.image for example in chosen}
    assert len(chosen) == 120 == 3 * len(images)
    assert 10 <= sum("cat" in str(image) for image in images) <= 30
    assert [example.id for example in chosen] == sorted(example.id for example in chosen)


def test_a_sample_depends_on_the_names_alone_and_a_larger_one_holds_it() -> None:
    assert sample(PETS[::-1], 60) == sample(PETS, 60)
    assert set(sample(PETS, 60)) < set(sample(PETS, 90))
    assert sample(PETS, 10_000) == sorted(PETS, key=lambda example: example.id)


def test_texts_are_sampled_one_by_one() -> None:
    texts = [replace(asked(None, n), id=f"t{n}") for n in range(30)]
    assert len(sample(texts, 10)) == 10


def test_a_sample_that_no_image_fits_into_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match=r"max_examples = 2, and images/.*png alone has 3 examples"):
        sample(PETS, 2)
