"""A workspace as a night leaves it: drawn scenes with exact masks, random attention in which two heads look at the object, and the rest."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from headwise.attention.schema import ATTENTION
from headwise.calibration.rah_lora.schema import CURVE, TARGETS
from headwise.calibration.rah_lora.settings import RahLora
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.table import ANSWERS
from headwise.examples import Example, write_bad, write_examples
from headwise.files import frame_of, sha256_file, write_json, write_manifest, write_table
from headwise.layout import View
from headwise.masks.rle import encode
from headwise.masks.table import MASKS
from headwise.scenes import compose_scene
from headwise.scores.schema import HEADS
from headwise.segments import coverage
from headwise.selection import Criterion, LayerArm, Selection, write_selection

GRID = (10, 10)
LAYOUT = (View(*GRID),)
TASKS = ("caption", "colour", "count", "exists")


@dataclass(frozen=True)
class Size:
    """How large the workspace is; `planted` are the (layer, head) that look at the object."""

    examples: int = 12
    layers: int = 6
    heads: int = 3
    images: int = 40
    planted: tuple[tuple[int, int], ...] = ((2, 1), (3, 0))


def write_workspace(root: Path, size: Size, arms: tuple[LayerArm, ...] = ("top", "bottom"), question: str | None = None) -> Path:
    """Write every stage's folder under `root/data`; `question` replaces the first example's."""
    data, rng = root / "data", np.random.default_rng(7)
    for folder in ("images/images", "masks/shard=00", "attention/shard=00", "attention/shard=01", "scores"):
        (data / folder).mkdir(parents=True)
    masks = write_images(data, size, rng, question)
    maps = write_attention(data, size, masks, rng)
    write_scores(data, size, maps, masks)
    for arm in arms:
        write_arm(data, arm, size, rng)
    write_head_arm(data, size, rng)
    for arm, skill in zip(("base", *arms), (0.0, 0.35, 0.02, 0.1, 0.3), strict=False):
        write_answers(data, arm, size, skill)
    (root / "params.yaml").write_text("statistics: {bootstrap: 1000, sign_flips: 1000}\n", encoding="utf-8")
    return root


def write_images(data: Path, size: Size, rng: np.random.Generator, question: str | None) -> dict[str, np.ndarray]:
    """Scenes with one question each; returns the key mask of each example, by its id."""
    examples, rows, masks = [], [], {}
    for n in range(size.examples):
        scene = compose_scene(rng, "evaluation", drift=True)
        path = data / "images" / f"images/{n:04}.png"
        scene.image.save(path)
        asked = next(q for q in scene.questions[1:] if q.phrase is not None)
        example = Example(
            id=f"scene-{n:04}",
            image=f"images/{n:04}.png",
            sha256=sha256_file(path),
            question=question if question and not n else asked.question,
            answers=(asked.answer,),
            phrase=asked.phrase,
            task=asked.task,
            split="calibration",
        )
        examples.append(example)
        for number, thing in enumerate(scene.things):
            key = thing.phrase == asked.phrase
            rows.append(mask_row(example.id, number, thing.phrase, key, thing.mask))
            if key:
                masks[example.id] = masks.get(example.id, False) | thing.mask
    rows.append({**rows[-1], "object": 99, "rle": None, "reason": "smaller than min_area"})
    write_examples(examples, data / "images")
    write_table(pa.Table.from_pylist(rows, schema=MASKS), data / "masks/shard=00/masks.parquet", MASKS)
    write_manifest(data / "images", stage="images", settings=Evaluation(), inputs={})
    return masks


def mask_row(example_id: str, number: int, phrase: str, key: bool, mask: np.ndarray) -> dict[str, object]:
    ys, xs = np.nonzero(mask)
    return {
        "example_id": example_id,
        "image": f"images/{example_id[-4:]}.png",
        "object": number,
        "phrase": phrase,
        "key": key,
        "height": mask.shape[0],
        "width": mask.shape[1],
        "box": [float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)],
        "rle": encode(mask),
        "predicted_iou": None,
        "area": float(mask.mean()),
        "source": "exact",
        "reason": None,
    }


def write_attention(data: Path, size: Size, masks: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Noise for every head, with the object on top for the planted ones; returns maps (layer, head, visual) by example id."""
    maps = {}
    for example_id, mask in masks.items():
        noise = rng.gamma(1.0, size=(size.layers, size.heads, GRID[0] * GRID[1])) * 1e-3
        for layer, head in size.planted:
            noise[layer, head] = 0.2 * noise[layer, head] + 0.02 * coverage(mask, LAYOUT)
        maps[example_id] = noise
    for shard in range(2):
        folder = data / "attention" / f"shard={shard:02}"
        rows = [row for example_id in sorted(maps)[shard::2] for row in attention_rows(example_id, maps[example_id])]
        write_table(pa.Table.from_pylist(rows, schema=ATTENTION), folder / "part.parquet", ATTENTION)
        write_bad({"scene-9999": "images/9999.png: the file is <empty>"} if shard else {}, folder)
        write_manifest(folder, stage="attention", settings=Evaluation(), inputs={"images": data / "images"})
    return maps


def attention_rows(example_id: str, maps: np.ndarray) -> list[dict[str, object]]:
    names = [name for name in ATTENTION.names if ATTENTION.field(name).type == pa.float32() and not name.endswith("_max")]
    rows = []
    for layer, head in np.ndindex(*maps.shape[:2]):
        map_ = maps[layer, head]
        scaled = {"map": (map_ / map_.max()).astype(np.float16), "map_max": float(map_.max())}
        place = {"example_id": example_id, "layer": layer, "head": head, "views": [asdict(LAYOUT[0])]}
        rows.append({**place, **scaled, "text_image_map": scaled["map"], "text_image_map_max": 0.1, **dict.fromkeys(names, 0.5)})
    return rows


def write_scores(data: Path, size: Size, maps: dict[str, np.ndarray], masks: dict[str, np.ndarray]) -> None:
    """The Head Impact of the maps, computed plainly."""
    meant = np.stack([coverage(masks[i], LAYOUT) >= 0.5 for i in sorted(maps)])[:, None, None, :]
    stacked = np.stack([maps[i] for i in sorted(maps)])
    looked = stacked > stacked.mean(axis=-1, keepdims=True)
    impact = (looked & meant).sum(-1) / np.maximum((looked | meant).sum(-1), 1)
    rows = []
    for layer, head in np.ndindex(size.layers, size.heads):
        values = impact[:, layer, head]
        error = 1.96 * values.std() / np.sqrt(len(values))
        interval = {"low": float(values.mean() - error), "high": float(values.mean() + error)}
        rows.append({"layer": layer, "head": head, "statistic": "head_impact", "value": float(values.mean()), "n": len(values), **interval})
        rows.append({"layer": layer, "head": head, "statistic": "visual_mass", "value": 0.5, "n": len(values), "low": None, "high": None})
    write_table(pa.Table.from_pylist(rows, schema=HEADS), data / "scores" / "heads.parquet", HEADS)
    tests = {
        "examples": {"observed": len(maps), "scored": len(maps), "images": len(maps), "left_out": {"no object is meant": 2}, "bad": {}},
        "across_layers": {"kruskal": 41.25, "kruskal_p": 3.2e-7, "layers": size.layers, "heads": size.heads},
        "within_layers": [
            {"layer": n, "kruskal": 1.5 + n, "kruskal_p": 0.4, "friedman": None, "friedman_p": None} for n in range(size.layers)
        ],
        "layer_ranking_over_images": {"tau": 0.91, "low": 0.85, "high": 0.96},
        "sink_tokens": {"10 x 10": [0, 9, 90]},
    }
    write_json(tests, data / "scores" / "tests.json")
    write_manifest(data / "scores", stage="scores", settings=Evaluation(), inputs={"masks": data / "masks"})


def write_arm(data: Path, arm: LayerArm, size: Size, rng: np.random.Generator) -> None:
    layers = {"top": [2, 3], "bottom": [0, 1], "random": [1, 4]}.get(arm, list(range(size.layers)))
    folder = data / "selections" / arm
    folder.mkdir(parents=True)
    selection = Selection(arm=arm, criterion=Criterion(k=2), layers=tuple(layers), num_layers=size.layers)
    write_selection(selection, data / "scores" / "heads.parquet", folder / "selection.json")
    adapter = data / "adapters" / arm
    adapter.mkdir(parents=True)
    steps = np.arange(60)
    losses = pl.DataFrame({"step": steps.astype(np.int32), "loss": 2.5 * np.exp(-steps / 20) + 1 + rng.normal(0, 0.15, 60)})
    losses.write_parquet(adapter / "losses.parquet")


def write_head_arm(data: Path, size: Size, rng: np.random.Generator) -> None:
    """A profile, and an adapter of RAH-LoRA with a head accepted, one rolled back, and one without an anchor."""
    profile, adapter = data / "profile", data / "adapters" / "rah"
    profile.mkdir(parents=True)
    adapter.mkdir(parents=True)
    rows = [
        {"layer": layer, "head": head, "statistic": name, "value": float(rng.random()), "n": 9, "low": None, "high": None}
        for layer, head in np.ndindex(size.layers, size.heads)
        for name in ("isal", "caf")
    ]
    write_table(pa.Table.from_pylist(rows, schema=HEADS), profile / "heads.parquet", HEADS)
    write_json(
        {"questions": 9, "isal_caf_rank_correlation": {"absolute": -0.25, "signed": None}, "caf_signed_overlap": 0.5},
        profile / "profile.json",
    )
    anchor = {"layer": 1, "head": 0, "similarity": 0.875, "maps": 1.0, "values": 0.5, "outputs": 0.5}
    same = {"isal": -1.5, "caf": 0.25, "gap": 2.0, "anchors": [anchor]}
    tried = {**same, "singular_values": [2.0, 1.0], "effective_rank": 1.89, "projections": ["o_proj"], "kl_before": 0.01}
    targets = [
        {**tried, "layer": 0, "head": 1, "outcome": "accepted", "alpha": 0.15, "kl_after": 0.02},
        {**tried, "layer": 1, "head": 2, "outcome": "rolled back", "reason": "too <far>", "alpha": 0.0, "kl_after": 0.01},
        {**same, "layer": 2, "head": 0, "anchors": [], "outcome": "skipped", "reason": "no anchor"},
    ]
    write_table(frame_of(targets, TARGETS), adapter / "targets.parquet", TARGETS)
    curve = [{"scale": scale, "kl": 0.02 * scale**2} for scale in (0.01, 0.25, 0.5, 1.0, 2.0, 4.0)]
    write_table(frame_of(curve, CURVE), adapter / "curve.parquet", CURVE)
    counts = {"targets": 3, "accepted": 1, "rolled_back": 1, "skipped": 1, "damping": 0.8, "parameters": 96, "kl": 0.02}
    write_json({**counts, "forward_equivalents": {"profile": 2.0, "trust_region": 3.5}}, adapter / "calibration.json")
    write_manifest(adapter, stage="rah_lora", settings=RahLora(), inputs={"profile": profile})


def write_answers(data: Path, arm: str, size: Size, skill: float) -> None:
    """Answers to every task on two splits; a larger `skill` is right more often and less surprised by the captions."""
    rng, noise, rows = np.random.default_rng(3), np.random.default_rng(len(arm)), []
    for split in ("evaluation", "forgetting"):
        gain = skill if split == "evaluation" else 0.0
        for n in range(size.images):
            for task in TASKS:
                draw, surprise = rng.random(), rng.normal(2.2, 0.3) + noise.normal(0, 0.2)
                closed = task != "caption"
                rows.append(
                    {
                        "example_id": f"{split}-{n:04}-{task}",
                        "image": f"images/{split}-{n:04}.png",
                        "split": split,
                        "task": task,
                        "answer": "red" if closed else "",
                        "right": float(draw < 0.5 + gain + noise.normal(0, 0.05)) if closed else None,
                        "valid": True,
                        "nats": 10 * (surprise - gain),
                        "tokens": 10,
                    }
                )
    folder = data / "evaluations" / arm
    folder.mkdir(parents=True)
    write_table(pa.Table.from_pylist(rows, schema=ANSWERS), folder / "answers.parquet", ANSWERS)
    write_manifest(folder, stage="evaluation", settings=Evaluation(), inputs={})
