"""Comparisons of two answer tables: verdicts, units, pairing."""

import math

import numpy as np
import polars as pl
import pytest

from headwise.evaluation.compare import compare, least_loss
from headwise.evaluation.perplexity import perplexity
from headwise.evaluation.statistics import Statistics
from headwise.evaluation.table import ANSWERS, metrics

SETTINGS = Statistics(bootstrap=800, sign_flips=800)


def answers(generator, skill=0.5, images=60, per_image=2, split="evaluation", nats=2.0):
    """Two closed tasks and one caption for every image."""
    rows = []
    for image in range(images):
        for question in range(per_image):
            right = float(generator.random() < skill)
            task = ("colour", "count")[question % 2]
            rows.append((f"{split}-{image:03d}-{question}", task, "red", right, True, 1.0, 1))
        tokens = int(generator.integers(5, 15))
        rows.append((f"{split}-{image:03d}-caption", "caption", "", None, True, nats * tokens + float(generator.normal()), tokens))
    columns = ("example_id", "task", "answer", "right", "valid", "nats", "tokens")
    frame = pl.DataFrame(rows, schema=columns, orient="row").with_columns(
        image=pl.col("example_id").str.slice(0, len(split) + 4),
        split=pl.lit(split),
        part=pl.lit(None, pl.Float64),
        whole=pl.lit(None, pl.Float64),
    )
    return frame.select(ANSWERS.names)


def table(seed=0, **given):
    return answers(np.random.default_rng(seed), **given)


def headline(comparisons, metric, split="evaluation"):
    (found,) = [c for c in comparisons if c.metric == metric and c.task is None and c.split == split]
    return found


def test_the_same_answers_are_no_gain():
    for comparison in compare(table(), table(), SETTINGS):
        assert comparison.verdict == "no gain"
        assert comparison.low == comparison.high == (1.0 if comparison.metric == "perplexity" else 0.0)
        assert comparison.p_value == comparison.p_holm == 1.0


def test_a_clear_change_is_a_gain_and_backwards_a_loss():
    weak, strong = table(1, skill=0.4, nats=2.0), table(1, skill=0.9, nats=1.8)
    for comparison in compare(weak, strong, SETTINGS):
        assert comparison.gain and not comparison.loss and comparison.p_holm < 0.05
    for comparison in compare(strong, weak, SETTINGS):
        assert comparison.loss and not comparison.gain and not comparison.loses_at_most(0.02)


def test_a_task_asked_about_a_single_image_is_left_out():
    rare = table().with_columns(task=pl.when(pl.col("example_id") == "evaluation-000-0").then(pl.lit("rare")).otherwise(pl.col("task")))
    assert {comparison.task for comparison in compare(rare, rare, SETTINGS)} == {None, "colour", "count"}


def test_the_perplexity_effect_is_the_ratio_of_corpus_perplexities():
    before, noise = table(2), np.random.default_rng(0).normal(0, 0.05, 180)
    after = before.with_columns(nats=(pl.col("nats") - (0.1 + pl.Series(noise)) * pl.col("tokens")))
    found = headline(compare(before, after, SETTINGS), "perplexity")
    captions = [frame.filter(pl.col("task") == "caption") for frame in (before, after)]
    first, second = (math.exp(frame["nats"].sum() / frame["tokens"].sum()) for frame in captions)
    assert (found.before, found.after, found.effect) == pytest.approx((first, second, second / first))
    assert found.low < found.effect < found.high < 1
    assert found.detectable < 1


def test_the_accuracy_effect_is_the_difference_of_means():
    before, after = table(3), table(4).with_columns(nats=table(3)["nats"], tokens=table(3)["tokens"])
    found = headline(compare(before, after, SETTINGS), "accuracy")
    assert found.effect == pytest.approx(after["right"].mean() - before["right"].mean(), abs=1e-6)
    assert (found.num_examples, found.num_images) == (120, 60)


def test_an_interval_that_touches_zero_is_no_gain():
    before = table(5, images=20, per_image=1)
    after = before.with_columns(right=pl.when(pl.int_range(pl.len()) == 0).then(1.0 - pl.col("right")).otherwise(pl.col("right")))
    found = headline(compare(before, after, SETTINGS), "accuracy")
    assert found.effect != 0 and found.verdict == "no gain"


def test_mcnemar_only_where_every_image_has_one_question():
    two = headline(compare(table(6), table(6), SETTINGS), "accuracy")
    one = headline(compare(table(6, per_image=1), table(6, per_image=1), SETTINGS), "accuracy")
    assert two.p_mcnemar is None and one.p_mcnemar == 1.0
    soft = table(6, per_image=1).with_columns(right=pl.col("right") * 0.3)
    assert headline(compare(soft, soft, SETTINGS), "accuracy").p_mcnemar is None


def test_the_order_of_rows_does_not_matter():
    before, after = table(7, skill=0.4), table(8, skill=0.6).with_columns(nats=table(7)["nats"], tokens=table(7)["tokens"])
    assert compare(before, after, SETTINGS) == compare(before.reverse(), after.sample(fraction=1, shuffle=True, seed=1), SETTINGS)


def test_holm_runs_over_the_splits():
    before = pl.concat([table(9), table(9, split="forgetting")])
    after = pl.concat([table(9, skill=0.8), table(9, split="forgetting", skill=0.2)])
    comparisons = compare(before, after, SETTINGS)
    assert [(c.split, c.metric, c.task) for c in comparisons] == [
        ("evaluation", "perplexity", None),
        ("evaluation", "accuracy", None),
        ("forgetting", "perplexity", None),
        ("forgetting", "accuracy", None),
        *((split, "accuracy", task) for split in ("evaluation", "forgetting") for task in ("colour", "count")),
    ]
    assert headline(comparisons, "accuracy").gain and headline(comparisons, "accuracy", "forgetting").loss
    assert [comparison.verdict for comparison in comparisons[:4]] == ["no gain", "gain", "no loss shown", "loss"]


def test_other_examples_are_refused():
    with pytest.raises(ValueError, match="180 answers before and 177 after, but 3 examples"):
        compare(table(10), table(10).head(177), SETTINGS)


def test_other_tokens_are_refused():
    with pytest.raises(ValueError, match="different tokens"):
        compare(table(11), table(11).with_columns(tokens=pl.col("tokens") + 1), SETTINGS)


def test_metrics_sum_up_by_split_and_task():
    found = metrics(pl.concat([table(12), table(13, split="forgetting").filter(pl.col("task") == "count")]))
    frame = table(12)
    captions = frame.filter(pl.col("task") == "caption")
    assert found["evaluation"]["perplexity"] == pytest.approx(math.exp(captions["nats"].sum() / captions["tokens"].sum()))
    assert found["evaluation"]["accuracy"] == pytest.approx(frame["right"].mean())
    assert found["evaluation"]["tasks"]["caption"]["accuracy"] is None
    assert found["forgetting"]["perplexity"] is None and found["forgetting"]["tasks"]["count"]["n"] == 60


@pytest.mark.parametrize(("nats", "tokens"), [(1.0, 0), (math.inf, 3), (math.nan, 3)])
def test_perplexity_needs_finite_nats_and_tokens(nats, tokens):
    with pytest.raises(ValueError, match="finite"):
        perplexity(nats, tokens)


def test_perplexity_of_a_fair_coin_is_two():
    assert perplexity(10 * math.log(2), 10) == pytest.approx(2.0)


def counted(part, whole, task, images=40):
    """A benchmark's answers whose rule counts part of whole."""
    generator = np.random.default_rng(4)
    frame = table(images=images, per_image=1, split="coco").filter(pl.col("task") != "caption")
    wholes = generator.integers(*whole, len(frame)).astype(float)
    parts = np.minimum(wholes, generator.binomial(10, part, len(frame)) / 10 * wholes)
    return frame.with_columns(task=pl.lit(task), part=pl.Series(parts), whole=pl.Series(wholes))


def test_hallucinations_are_better_below_and_boxes_above():
    often, rarely = counted(0.6, (1, 6), "chair"), counted(0.2, (1, 6), "chair")
    fewer, more = (headline(compare(*pair, SETTINGS), "hallucination", "coco") for pair in ((often, rarely), (rarely, often)))
    assert fewer.gain and more.loss and fewer.effect < 0 < more.effect
    assert fewer.before == pytest.approx(often["part"].sum() / often["whole"].sum())
    assert fewer.after - fewer.before == pytest.approx(fewer.effect) and fewer.loses_at_most(0) and not more.loses_at_most(0.02)
    wide, tight = counted(0.3, (1, 2), "val"), counted(0.7, (1, 2), "val")
    better = headline(compare(wide, tight, SETTINGS), "iou", "coco")
    assert better.gain and better.effect == pytest.approx(tight["part"].mean() - wide["part"].mean())
    assert {c.metric for c in compare(wide, tight, SETTINGS)} == {"accuracy", "iou"}


def test_where_no_answer_changed_not_worse_is_as_sure_as_the_number_of_questions_allows():
    few, many = table(images=10), table(images=300)
    for frame, number in ((few, 20), (many, 600)):
        found = headline(compare(frame, frame, SETTINGS), "accuracy")
        assert found.p_not_worse == found.p_equivalent == pytest.approx(0.98**number)
        assert found.detectable == least_loss(number), "no answer changed, and a small sample is not all-powerful for that"
        assert headline(compare(frame, frame, SETTINGS), "perplexity").p_not_worse == 1, "nothing varies, so nothing is known"


def test_two_gains_and_no_loss_make_a_small_sample_no_surer_that_nothing_is_lost():
    before = table(images=10).with_columns(right=pl.when(pl.col("right").is_not_null()).then(pl.lit(0.0, pl.Float32)))
    first = before.filter(pl.col("right").is_not_null())["example_id"].to_list()[:2]
    after = before.with_columns(right=pl.when(pl.col("example_id").is_in(first)).then(pl.lit(1.0, pl.Float32)).otherwise("right"))
    found = headline(compare(before, after, SETTINGS), "accuracy")
    assert found.p_not_worse >= 0.98**20 and found.after > found.before


def test_not_worse_and_equivalent_are_asked_at_the_margin():
    before = table(3, images=200)
    worse = before.with_columns(nats=pl.col("nats") + 0.03 * pl.col("tokens"))
    for margin, sure in ((0.02, False), (0.05, True)):
        found = headline(compare(before, worse, Statistics(bootstrap=800, sign_flips=800, margin=margin)), "perplexity")
        assert (found.p_not_worse < 0.05) is sure is (found.p_equivalent < 0.05)
    better = headline(compare(worse, before, SETTINGS), "perplexity")
    assert better.p_not_worse < 0.05 < better.p_equivalent, "better by more than the margin is not worse, and not the same"


def test_the_luckiest_of_many_tasks_is_no_gain():
    """Twenty tasks without a change: one has an interval above 0 by luck, and none is called a gain."""
    generator = np.random.default_rng(5)
    before = pl.concat([answers(generator, images=60, split=f"s{k}").filter(pl.col("task") == "colour") for k in range(20)])
    after = before.with_columns(right=pl.Series(generator.random(len(before)) < 0.5).cast(pl.Float64))
    found = [c for c in compare(before, after, SETTINGS) if c.task]
    assert any(c.low > 0 for c in found) and not any(c.gain for c in found)
