from pathlib import Path
from typing import get_args

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from headwise.files import read_json, sha256_file, write_json
from headwise.selection import Criterion, LayerArm, Selection, layer_scores, read_selection, select, write_selection

SCORES = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75]), min_size=1, max_size=12)


def heads_frame(scores: list[list[float | None]], statistic: str = "head_impact") -> pl.DataFrame:
    """One row per layer and head, and as many of another statistic that ranks the layers the other way round."""
    rows = [(layer, head, value) for layer, values in enumerate(scores) for head, value in enumerate(values)]
    columns = {"layer": [r[0] for r in rows], "head": [r[1] for r in rows], "value": [r[2] for r in rows]}
    frame = pl.DataFrame(columns, schema={"layer": pl.Int16, "head": pl.Int16, "value": pl.Float64})
    other = frame.with_columns(-pl.col("value"), statistic=pl.lit("text_mass"))
    return pl.concat([other, frame.with_columns(statistic=pl.lit(statistic))])


def one_head(scores: list[float]) -> pl.DataFrame:
    return heads_frame([[score] for score in scores])


def test_a_layers_score_is_the_mean_over_its_heads() -> None:
    frame = heads_frame([[0.1, 0.2], [0.6, 0.0], [0.2, 0.1]])
    assert layer_scores(frame, "head_impact") == pytest.approx([0.15, 0.3, 0.15])
    assert select(frame, Criterion(k=1), "top").layers == (1,)


@pytest.mark.parametrize(("arm", "layers"), [("top", (1, 3)), ("bottom", (0, 4)), ("all", (0, 1, 2, 3, 4))])
def test_the_arms_by_hand(arm: LayerArm, layers: tuple[int, ...]) -> None:
    selection = select(one_head([0.1, 0.9, 0.3, 0.5, 0.2]), Criterion(k=2), arm)
    assert selection == Selection(arm=arm, criterion=Criterion(k=2), layers=layers, num_layers=5)


@settings(max_examples=80, deadline=None)
@given(SCORES, st.data())
def test_every_arm_takes_k_layers_of_the_model(scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    arm = data.draw(st.sampled_from(get_args(LayerArm)))
    selection = select(one_head(scores), Criterion(k=k), arm)
    assert list(selection.layers) == sorted(set(selection.layers))
    assert set(selection.layers) <= set(range(len(scores)))
    assert len(selection.layers) == (len(scores) if arm == "all" else k)
    assert selection.num_layers == len(scores)


@settings(max_examples=80, deadline=None)
@given(SCORES, st.data())
def test_top_scores_are_no_lower_and_bottom_scores_no_higher_than_the_rest(scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    top, bottom = (select(one_head(scores), Criterion(k=k), arm).layers for arm in ("top", "bottom"))
    rest = [scores[i] for i in range(len(scores)) if i not in top]
    assert not rest or min(scores[i] for i in top) >= max(rest)
    rest = [scores[i] for i in range(len(scores)) if i not in bottom]
    assert not rest or max(scores[i] for i in bottom) <= min(rest)


@settings(max_examples=80, deadline=None)
@given(SCORES, st.data())
def test_top_and_bottom_share_no_layer_even_among_ties(scores: list[float], data: st.DataObject) -> None:
    if len(scores) < 2:
        return
    k = data.draw(st.integers(1, len(scores) // 2))
    top, bottom = (select(one_head(scores), Criterion(k=k), arm).layers for arm in ("top", "bottom"))
    assert not set(top) & set(bottom)


@settings(max_examples=40, deadline=None)
@given(SCORES, st.sampled_from(get_args(LayerArm)))
def test_the_order_of_the_rows_does_not_matter(scores: list[float], arm: LayerArm) -> None:
    frame = heads_frame([[score, score / 3] for score in scores])
    criterion = Criterion(k=1)
    expected = select(frame, criterion, arm)
    assert select(frame.reverse(), criterion, arm) == expected
    assert select(frame.sample(fraction=1, shuffle=True, seed=1), criterion, arm) == expected


def test_of_equal_layers_the_lower_is_on_top() -> None:
    frame = one_head([0.5, 0.5, 0.5, 0.5])
    assert select(frame, Criterion(k=2), "top").layers == (0, 1)
    assert select(frame, Criterion(k=2), "bottom").layers == (2, 3)


def test_random_depends_on_the_seed_alone_and_reaches_every_layer() -> None:
    rising, falling = one_head([float(i) for i in range(10)]), one_head([float(-i) for i in range(10)])
    drawn = [select(rising, Criterion(k=3, seed=seed), "random").layers for seed in range(60)]
    assert drawn == [select(falling, Criterion(k=3, seed=seed), "random").layers for seed in range(60)]
    assert {layer for layers in drawn for layer in layers} == set(range(10))
    assert len(set(drawn)) > 30
    assert all(drawn.count(layers) < 10 for layers in drawn)


def test_another_statistic_chooses_other_layers() -> None:
    frame = pl.concat([one_head([0.1, 0.2, 0.3]), heads_frame([[0.3], [0.2], [0.1]], "visual_mass")])
    assert select(frame, Criterion(k=1), "top").layers == (2,)
    assert select(frame, Criterion(k=1, statistic="visual_mass"), "top").layers == (0,)


@pytest.mark.parametrize("arm", ["top", "bottom", "random"])
def test_more_layers_than_the_model_has_are_refused_with_both_numbers(arm: LayerArm) -> None:
    with pytest.raises(ValueError, match="k = 4 layers asked for, the model has 3"):
        select(one_head([0.1, 0.2, 0.3]), Criterion(k=4), arm)
    assert select(one_head([0.1, 0.2, 0.3]), Criterion(k=4), "all").layers == (0, 1, 2)


def test_a_statistic_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"no 'head_impact_nosink'; they have \['head_impact', 'text_mass'\]"):
        select(one_head([0.1, 0.2]), Criterion(statistic="head_impact_nosink", k=1), "top")


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_head_without_a_value_is_named(value: float | None) -> None:
    with pytest.raises(ValueError, match="head_impact of layer 1, head 0 has no value"):
        select(heads_frame([[0.1, 0.2], [value, 0.3]]), Criterion(k=1), "top")


def test_scores_that_skip_a_layer_are_refused() -> None:
    frame = one_head([0.1, 0.2, 0.3]).filter(pl.col("layer") != 1)
    with pytest.raises(ValueError, match=r"skip layers: head_impact is given for \[0, 2\]"):
        select(frame, Criterion(k=1), "top")


def test_a_selection_is_read_back_with_the_digest_of_its_scores(tmp_path: Path) -> None:
    scores = tmp_path / "heads.parquet"
    scores.write_bytes(b"scores")
    selection = select(one_head([0.1, 0.9, 0.5]), Criterion(k=2), "top")
    write_selection(selection, scores, tmp_path / "selection.json")
    found = read_selection(tmp_path / "selection.json")
    assert found.layers == (1, 2)
    assert found.scores_sha256 == sha256_file(scores)
    assert found.criterion == selection.criterion
    content = read_json(tmp_path / "selection.json")
    assert set(content) == {"arm", "criterion", "layers", "num_layers", "scores_sha256"}
    assert (content["layers"], content["num_layers"]) == ([1, 2], 3)


def test_a_selection_with_an_unknown_arm_is_refused(tmp_path: Path) -> None:
    write_selection(select(one_head([0.1, 0.9]), Criterion(k=1), "top"), Path(__file__), tmp_path / "selection.json")
    write_json({**read_json(tmp_path / "selection.json"), "arm": "middle"}, tmp_path / "selection.json")
    with pytest.raises(ValueError, match="arm"):
        read_selection(tmp_path / "selection.json")


@pytest.mark.parametrize("wrong", [{"k": 0}, {"statistic": "text_mass"}, {"seed": -1}, {"layers": 4}])
def test_a_criterion_out_of_bounds_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Criterion).validate_python(wrong)
