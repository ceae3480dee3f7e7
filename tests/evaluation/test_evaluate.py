"""Evaluation of tiny real models on a data set in a folder."""

from dataclasses import replace

import polars as pl
import pytest
import torch

from headwise.evaluation.evaluate import evaluate, known_answers
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.vqa import normalise
from headwise.likelihood import read_answers
from headwise.vlm import encode, generate
from tests import tiny
from tests.dataset import write_dataset

SETTINGS = Evaluation(batch_size=4, max_new_tokens=6)


def ignore(done: int, total: int) -> None:
    """A progress that nobody watches."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "images"
    return folder, write_dataset(folder, evaluation=3, forgetting=2)


def test_every_example_has_a_row_with_its_nats(data):
    folder, examples = data
    heard: list[tuple[int, int]] = []
    answers, bad = evaluate(tiny.tiny_vlm(), folder, examples, SETTINGS, lambda done, total: heard.append((done, total)))
    assert (
        answers["example_id"].to_list() == sorted(example.id for example in examples)
        and not bad
        and heard[-1] == (len(examples), len(examples))
    )
    for example in examples:
        row = answers.row(by_predicate=pl.col("example_id") == example.id, named=True)
        image = tiny.Image.open(folder / example.image).convert("RGB")
        with torch.no_grad():
            nats, tokens, _ = read_answers(tiny.tiny_vlm(), encode(tiny.tiny_vlm(), [image], [example.question], list(example.answers)))
        assert row["nats"] == pytest.approx(nats.item(), rel=1e-4) and row["tokens"] == tokens.item()
        assert row["image"] == example.image and row["split"] == example.split


def test_captions_are_read_and_closed_questions_are_answered(data):
    folder, examples = data
    answers, _ = evaluate(tiny.tiny_vlm(), folder, examples, SETTINGS, ignore)
    captions, closed = answers.filter(pl.col("task") == "caption"), answers.filter(pl.col("task") != "caption")
    assert captions["answer"].unique().to_list() == [""] and captions["right"].null_count() == len(captions) and captions["valid"].all()
    assert closed["right"].null_count() == 0
    for row in closed.iter_rows(named=True):
        (example,) = [e for e in examples if e.id == row["example_id"]]
        image = tiny.Image.open(folder / example.image).convert("RGB")
        assert row["answer"] == generate(tiny.tiny_vlm(), [image], [example.question], 6)[0]
        assert row["right"] == float(normalise(row["answer"]) == normalise(example.answers[0]))


def test_greedy_answers_of_a_padded_batch_are_the_likeliest_tokens_step_by_step():
    vlm, questions = tiny.tiny_vlm(), ["What colour is it?", "How many squares are in the picture on the left?"] * 2
    images = [tiny.image(seed) for seed in range(4)]
    for image, question, answer in zip(images, questions, generate(vlm, images, questions, 6), strict=True):
        inputs, given = encode(vlm, [image], [question]).inputs, []
        for _ in range(6):
            ids = torch.cat([inputs["input_ids"], torch.tensor([given], dtype=torch.int64)], dim=1)
            with torch.no_grad():
                given.append(vlm.model(input_ids=ids, pixel_values=inputs["pixel_values"], use_cache=False).logits[0, -1].argmax().item())
            if given[-1] == vlm.end_id:
                break
        assert answer == vlm.tokenizer.decode(given, skip_special_tokens=True).strip()


def test_valid_means_a_known_answer_of_the_same_task(data):
    _, examples = data
    known = known_answers([*examples, replace(examples[1], id="x", answers=("The Two",))])
    assert known["colour"] == {"red", "blue", "green", "2"} and known["count"] == {"1", "2"}


def test_a_model_that_learned_the_answer_is_right(data):
    folder, examples = data
    (example,) = [e for e in examples if e.id == "evaluation-0-colour"]
    vlm = tiny.new_tiny_vlm()
    optimizer = torch.optim.Adam(vlm.decoder.parameters(), lr=3e-3)
    image = tiny.Image.open(folder / example.image).convert("RGB")
    for _ in range(40):
        optimizer.zero_grad()
        read_answers(vlm, encode(vlm, [image], [example.question], list(example.answers)))[0].sum().backward()
        optimizer.step()
    answers, _ = evaluate(vlm, folder, [example], SETTINGS, ignore)
    assert answers.row(0, named=True) | {"nats": 0.0} == {
        "example_id": example.id,
        "image": example.image,
        "split": "evaluation",
        "task": "colour",
        "answer": "red",
        "right": 1.0,
        "valid": True,
        "nats": 0.0,
        "tokens": answers["tokens"][0],
    }
    assert answers["nats"][0] < 0.5


def test_bad_examples_become_reasons_and_the_others_go_on(data):
    folder, examples = data
    broken = [
        replace(examples[0], id="missing", image="images/none.png"),
        replace(examples[1], id="silent", answers=()),
        replace(examples[1], id="changed", sha256="0" * 64),
        replace(examples[1], id="long", question="very " * 300),
        replace(examples[1], id="empty", answers=("",)),
    ]
    answers, bad = evaluate(tiny.tiny_vlm(), folder, [*examples, *broken], SETTINGS, ignore)
    assert sorted(bad) == ["changed", "empty", "long", "missing", "silent"]
    assert len(answers) == len(examples)
    assert "cannot be read" in bad["missing"] and "sha256" in bad["changed"] and "the model takes 256" in bad["long"]


def test_nats_that_are_no_numbers_are_bad_and_never_counted(data):
    folder, examples = data
    vlm = tiny.new_tiny_vlm()
    with torch.no_grad():
        vlm.decoder.norm.weight.fill_(float("nan"))
    answers, bad = evaluate(vlm, folder, examples, SETTINGS, ignore)
    assert len(bad) == len(examples) and answers.is_empty()


def test_text_alone_is_its_own_cluster(tmp_path):
    examples = [replace(e, image=None, sha256=None) for e in write_dataset(tmp_path / "data", evaluation=1)]
    answers, bad = evaluate(tiny.tiny_lm(), tmp_path, examples, SETTINGS, ignore)
    assert not bad and answers["image"].to_list() == answers["example_id"].to_list()
