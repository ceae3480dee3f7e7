import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from pydantic import TypeAdapter
from scipy.ndimage import binary_dilation

from headwise.data import DataSource, write_data
from headwise.examples import BAD, OBJECTS, Example, open_image, read_examples
from headwise.files import MANIFEST, read_json, read_table, sha256_file, sha256_tree
from headwise.hub import weights_digest
from headwise.masks import florence2
from headwise.masks.agreement import MATCH, agreement, read_agreement
from headwise.masks.exact import exact_masks
from headwise.masks.florence2 import BINS, Florence2, load_florence2
from headwise.masks.quality import bounding_box
from headwise.masks.rle import decode, encode
from headwise.masks.settings import Grounding, MaskQuality, Masks, Segmentation, files_of
from headwise.masks.table import MASKS, MASKS_FILE, check_found, read_masks, written_shards
from headwise.observation import Observation
from headwise.scores.head_impact import HeadImpact
from tasks.attention import write_attention
from tasks.masks import write_masks
from tasks.scores import write_scores
from tests import tiny
from tests.mask_models import Recorded, digest, save_florence, save_sam2
from tests.masks.dataset import write_dataset

EXACT = Masks(source="exact")
LENIENT = MaskQuality(min_area=0, max_area=1, min_predicted_iou=0, min_stability=0, min_box_iou=0, max_overlap=1)


def write_all(images: Path, output: Path, settings: Masks, num_shards: int) -> list[Path]:
    for shard in range(num_shards):
        write_masks(images, output / f"shard={shard:02d}", settings, shard, num_shards)
    return written_shards(output)


def test_the_step_writes_the_calibration_split_alone(tmp_path: Path) -> None:
    write_dataset(tmp_path / "images", 21, {"images/003.png": []})
    write_masks(tmp_path / "images", tmp_path / "masks", EXACT, 0, 1)
    masks = read_table(tmp_path / "masks/masks.parquet", MASKS)
    bad = read_table(tmp_path / "masks/bad.parquet", BAD)
    assert set(masks["example_id"]) == {f"{i:03d}-{kind}" for i in range(21) if i != 3 for kind in "qc"}
    assert bad["example_id"].to_list() == ["003-c", "003-q"]
    manifest = read_json(tmp_path / "masks/manifest.json")
    assert manifest["inputs"] == {name: sha256_file(tmp_path / "images" / name) for name in ("index.parquet", "objects.parquet")}
    assert (manifest["examples"], manifest["bad"], manifest["objects"], manifest["usable"]) == (42, 2, 80, 80)


@pytest.mark.parametrize("num_shards", [1, 3, 9])
def test_shards_share_out_the_images_and_hold_the_same_masks(tmp_path: Path, num_shards: int) -> None:
    write_dataset(tmp_path / "images", 7)
    whole = read_masks(write_all(tmp_path / "images", tmp_path / "whole", EXACT, 1))
    shards = write_all(tmp_path / "images", tmp_path / "parts", EXACT, num_shards)
    images = [set(read_masks([shard])["image"]) for shard in shards]
    assert sum(map(len, images)) == 7 and max(map(len, images)) - min(map(len, images)) <= 1
    order = ["image", "example_id", "object"]
    assert read_masks(shards).sort(order).equals(whole.sort(order))


def test_an_example_without_an_image_is_bad_once(tmp_path: Path) -> None:
    from headwise.examples import write_examples

    examples = write_dataset(tmp_path / "images", 20)
    write_examples([*examples, replace(examples[0], id="text", image=None)], tmp_path / "images")
    shards = write_all(tmp_path / "images", tmp_path / "masks", EXACT, 2)
    assert [read_table(shard / "bad.parquet", BAD)["example_id"].to_list() for shard in shards] == [["text"], []]


def test_a_second_run_gives_the_same_bytes(tmp_path: Path) -> None:
    write_dataset(tmp_path / "images", 3)
    for name in ("first", "second"):
        write_masks(tmp_path / "images", tmp_path / name, EXACT, 0, 1)
    files = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert files == ["bad.parquet", "manifest.json", "masks.parquet"]
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_a_failed_run_leaves_the_old_folder_alone(tmp_path: Path) -> None:
    write_dataset(tmp_path / "images", 3)
    write_masks(tmp_path / "images", tmp_path / "masks", EXACT, 0, 1)
    before = (tmp_path / "masks/manifest.json").read_bytes()
    write_dataset(tmp_path / "images", 3, {"images/001.png": []})
    with pytest.raises(ValueError, match="2 of 6 examples are bad"):
        write_masks(tmp_path / "images", tmp_path / "masks", EXACT, 0, 1)
    assert (tmp_path / "masks/manifest.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "masks"]


def test_a_missing_or_cut_shard_is_named(tmp_path: Path) -> None:
    write_dataset(tmp_path / "images", 4)
    shards = write_all(tmp_path / "images", tmp_path / "masks", EXACT, 2)
    with pytest.raises(ValueError, match=r"no masks in .*shard=07.masks\.parquet"):
        read_masks([*shards, tmp_path / "masks/shard=07"])
    path = shards[1] / MASKS_FILE
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"shard=01.masks\.parquet: not a readable Parquet file"):
        read_masks(shards)


def test_the_module_runs_in_a_clone(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data/images", 2)
    params = {"shards": [0, 4], "masks": {"source": "exact", "quality": {"min_area": 0.06}}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "tasks.masks", "--shard", "4"], cwd=tmp_path, check=True)
    masks = read_table(tmp_path / "data/masks/shard=04/masks.parquet", MASKS)
    assert masks["reason"].is_null().to_list() == [True, False] * 2
    failed = subprocess.run(
        [sys.executable, "-m", "tasks.masks", "--shard", "1"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert failed.returncode and failed.stderr.strip().endswith("shard 1 is none of params.yaml's shards [0, 4]")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Masks:
    """The settings of real models with random weights, in folders."""
    root = tmp_path_factory.mktemp("models")
    grounding = Grounding(
        model=str(save_florence(root / "florence", places=True)), max_new_tokens=16, num_beams=1, batch_size=4, dtype="float32"
    )
    segmentation = Segmentation(model=str(save_sam2(root / "sam2")), batch_size=3, dtype="float32")
    return Masks(source="generated", grounding=grounding, segmentation=segmentation, quality=LENIENT)


@pytest.fixture(scope="module", params=["drawn", pytest.param("photographs", marks=pytest.mark.slow)])
def composed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set composed from cut-outs on photographs, drawn ones or those of the packages, with the exact masks."""
    from tests.test_cutouts import write_photographs

    root = tmp_path_factory.mktemp("pictures")
    source = DataSource(kind="photos", calibration=6, evaluation=2, forgetting=2)
    if request.param == "drawn":
        write_photographs(root)
        source = replace(source, cutouts=str(root / "cutouts"), backgrounds=str(root / "backgrounds"))
    write_data(source, root / "images", lambda _done, _total: None)
    return root / "images"


def record(folder: Path) -> Mapping[tuple[str, str], str]:
    """What a Florence-2 that saw every object would write: each phrase with the true boxes of its objects."""
    objects = read_table(folder / "objects.parquet", OBJECTS)
    written: dict[tuple[str, str], str] = {}
    for example in read_examples(folder, "calibration"):
        image = digest(open_image(folder, example))
        own = objects.filter(pl.col("image") == example.image)
        whole = " ".join(own["phrase"])
        asked = asked_prompt(example)
        wanted = own.filter(pl.col("phrase") == example.phrase) if example.phrase else own
        if asked and whole:
            written[image, asked] = "".join(row["phrase"] + marks(row) for row in wanted.iter_rows(named=True))
    return written


def asked_prompt(example: Example) -> str | None:
    from headwise.masks.generated import asked_text

    text = asked_text(example)
    return None if text is None else f"<CAPTION_TO_PHRASE_GROUNDING>{text}"


def marks(row: Mapping[str, object]) -> str:
    height, width = int(str(row["height"])), int(str(row["width"]))
    box = bounding_box(decode(str(row["rle"]), height, width))
    bins = [min(int(side / size * BINS), BINS - 1) for side, size in zip(box, (width, height) * 2, strict=True)]
    return "".join(f"<loc_{place}>" for place in bins)


@pytest.fixture
def recorded(composed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step's Florence-2 writes what was recorded; its model, processor and parser are the real ones."""
    written = record(composed)

    def load(folder: Path, settings: Grounding) -> Florence2:
        real = load_florence2(folder, settings)
        return Recorded(real.model, real.processor, real.settings, written)

    monkeypatch.setattr(florence2, "load_florence2", load)


@pytest.mark.usefixtures("recorded")
def test_true_boxes_give_masks_in_every_image_and_heads_are_scored_by_them(composed: Path, models: Masks, tmp_path: Path) -> None:
    shards = write_all(composed, tmp_path / "masks", models, 2)
    masks = read_masks(shards)
    examples = read_examples(composed, "calibration")
    assert set(masks["example_id"]) == {example.id for example in examples}
    drawn = masks.filter(pl.col("reason").is_null() & (pl.col("area") > 0))
    assert set(drawn["image"]) == {example.image for example in examples}, "every image has a mask that is not empty"
    truth = read_table(composed / "objects.parquet", OBJECTS)
    for row in drawn.iter_rows(named=True):
        boxes = [
            bounding_box(decode(own["rle"], own["height"], own["width"])) for own in truth.filter(image=row["image"]).iter_rows(named=True)
        ]
        assert min(max(abs(a - b) for a, b in zip(row["box"], box, strict=True)) for box in boxes) <= 0.6, "the box is a true one"
    manifest = read_json(shards[0] / MANIFEST)
    assert manifest["inputs"] == {
        "index.parquet": sha256_file(composed / "index.parquet"),
        **{part: weights_digest(Path(getattr(models, part).model), files) for part, files in files_of(models).items()},
    }
    model = tiny.save(tiny.new_tiny_vlm(), tmp_path / "vlm")
    for shard in range(2):
        write_attention(composed, tmp_path / f"attention/shard={shard:02d}", Observation(model=str(model), dtype="float32"), shard, 2)
    attention = [tmp_path / "attention" / shard.name for shard in shards]
    write_scores(shards, attention, tmp_path / "scores", HeadImpact(mask_threshold=0, min_images=5, bootstrap=20))
    counts = read_json(tmp_path / "scores/tests.json")["examples"]
    assert isinstance(counts, dict) and counts["images"] >= 5 and counts["bad"] == {}


@pytest.mark.usefixtures("recorded")
def test_generated_masks_are_compared_with_the_exact_ones_where_those_are_known(composed: Path, models: Masks, tmp_path: Path) -> None:
    (tmp_path / "images").symlink_to(composed)
    write_all(composed, tmp_path / "masks", models, 2)
    found = read_agreement(tmp_path)
    assert found is not None and found.objects > 6 and found.masks == found.objects and found.mean_iou and found.mean_iou < 1
    write_all(composed, tmp_path / "exact/masks", EXACT, 1)
    (tmp_path / "exact/images").symlink_to(composed)
    assert read_agreement(tmp_path / "exact") is None


def test_exact_masks_of_photographs_agree_wholly_and_changed_ones_as_much_as_their_pixels_say(composed: Path) -> None:
    examples = [example for example in read_examples(composed, "calibration") if example.phrase]
    truth, _ = exact_masks(composed, examples, MaskQuality())
    truth = truth.filter("key")
    assert agreement(truth, truth).mean_iou == agreement(truth, truth).union_iou == 1
    for change in (lambda mask: binary_dilation(mask, iterations=3), lambda mask: np.roll(mask, (5, -7), (0, 1))):
        rles, ious = [], []
        for row in truth.iter_rows(named=True):
            mask = decode(row["rle"], row["height"], row["width"])
            changed = change(mask)
            rles.append(encode(changed))
            ious.append((mask & changed).sum() / (mask | changed).sum())
        found = agreement(truth.with_columns(rle=pl.Series(rles)), truth)
        assert found.mean_iou == pytest.approx(np.mean(ious)) and 0.3 < np.mean(ious) < 0.97
        assert found.recall == found.precision == pytest.approx(np.mean([iou >= MATCH for iou in ious]))


def test_a_shard_in_which_nothing_is_found_is_a_counted_result_and_a_run_of_them_is_not(
    composed: Path, models: Masks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(folder: Path, settings: Grounding) -> Florence2:
        real = load_florence2(folder, settings)
        return Recorded(real.model, real.processor, real.settings, {})

    monkeypatch.setattr(florence2, "load_florence2", load)
    shards = write_all(composed, tmp_path / "masks", models, 2)
    manifest = read_json(shards[0] / MANIFEST)
    assert (manifest["objects"], manifest["usable"]) == (0, 0)
    assert set(manifest["without_object"]) <= {"nothing found", "no object is meant"} and "nothing found" in manifest["without_object"]
    with pytest.raises(ValueError, match=r"no usable mask among \d+ rows \(nothing found: \d+\): .*weights are newly initialised"):
        check_found(read_masks(shards))


def test_random_weights_of_sam2_and_gates_are_named_as_the_cause(composed: Path, models: Masks, tmp_path: Path) -> None:
    shards = write_all(composed, tmp_path / "masks", replace(models, quality=replace(LENIENT, min_predicted_iou=1)), 1)
    check_found(read_masks(write_all(composed, tmp_path / "exact", EXACT, 1)))
    with pytest.raises(ValueError, match=r"no usable mask among .*(predicted_iou is …, less than min_predicted_iou|no area)"):
        check_found(read_masks(shards))


def test_auto_is_exact_where_the_data_have_masks(tmp_path: Path) -> None:
    write_dataset(tmp_path / "images", 2)
    write_masks(tmp_path / "images", tmp_path / "masks", Masks(), 0, 1)
    assert set(read_table(tmp_path / "masks/masks.parquet", MASKS)["source"]) == {"exact"}


def test_models_that_are_nowhere_are_named_before_any_work(composed: Path, models: Masks, tmp_path: Path) -> None:
    for part, field in (("grounding", models.grounding), ("segmentation", models.segmentation)):
        settings = replace(models, **{part: replace(field, model="nobody/nothing")})
        with pytest.raises(ValueError, match="model 'nobody/nothing': not a folder, and not to be had from the Hugging Face Hub"):
            write_masks(composed, tmp_path / "masks", settings, 0, 1)
    with pytest.raises(ValueError, match=r"model '.*empty': none of \*\.pt"):
        (tmp_path / "empty").mkdir()
        write_masks(
            composed, tmp_path / "masks", replace(models, segmentation=replace(models.segmentation, model=str(tmp_path / "empty"))), 0, 1
        )


def test_a_killed_shard_leaves_nothing_and_the_next_run_gives_the_same_bytes(composed: Path, models: Masks, tmp_path: Path) -> None:
    """Killed again and again, each time later, until it comes to its end by itself."""
    clones = [tmp_path / "whole", tmp_path / "killed"]
    for clone in clones:
        (clone / "data").mkdir(parents=True)
        (clone / "data/images").symlink_to(composed)
        params = {"shards": [0, 1], "masks": TypeAdapter(Masks).dump_python(models, mode="json")}
        (clone / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    run_shard(clones[0], 0), run_shard(clones[0], 1)
    run_shard(clones[1], 0)
    for line in ("grounding:", "segmentation:", "masks, shard 1: 0", "masks, shard 1: 3"):
        run_shard(clones[1], 1, kill_at=line)
        assert not (clones[1] / "data/masks/shard=01").exists()
    run_shard(clones[1], 1)
    assert sha256_tree(clones[0] / "data/masks") == sha256_tree(clones[1] / "data/masks")


def run_shard(clone: Path, shard: int, kill_at: str | None = None) -> None:
    """Run the step; with `kill_at` kill it, with its group, at the first line that begins so."""
    command = [sys.executable, "-u", "-m", "tasks.masks", "--shard", str(shard)]
    with subprocess.Popen(command, cwd=clone, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if kill_at and line.startswith(kill_at):
                os.killpg(process.pid, signal.SIGKILL)
                break
    assert process.returncode == (-signal.SIGKILL if kill_at else 0)
