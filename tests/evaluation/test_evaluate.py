"""Evaluation of tiny real models on a data set in a folder."""

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
import torch

from headwise.evaluation.boxes import box_rule
from headwise.evaluation.evaluate import evaluate, own_questions
from headwise.evaluation.judgement import Asking, Questions
from headwise.evaluation.responses import Responses
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.vqa import normalise
from headwise.likelihood import read_answers
from headwise.vlm import encode, generate
from tests import tiny
from tests.dataset import write_dataset

SETTINGS = Evaluation(batch_size=4, max_new_tokens=6)


def ignore(done: int, total: int) -> None:
    """A progress that nobody watches."""


def ask(vlm, folder, examples, path=None, progress=ignore, settings=SETTINGS, adapter=None):
    return evaluate(vlm, own_questions(folder, examples), settings, Responses(path, {"adapter": adapter}), progress)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "images"
    return folder, write_dataset(folder, evaluation=3, forgetting=2)


def test_every_example_has_a_row_with_its_nats(data):
    folder, examples = data
    heard: list[tuple[int, int]] = []
    answers, bad = ask(tiny.tiny_vlm(), folder, examples, progress=lambda done, total: heard.append((done, total)))
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
    answers, _ = ask(tiny.tiny_vlm(), folder, examples)
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
    asking = own_questions(Path(), [*examples, replace(examples[1], id="x", answers=("The Two",))]).askings
    assert asking["caption"].rule is None
    judged = {answer: asking["colour"].rule(answer, examples[1]).valid for answer in ("red", "Blue.", "two", "1", "purple", "")}
    assert judged == {"red": True, "Blue.": True, "two": True, "1": False, "purple": False, "": False}


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
    answers, _ = ask(vlm, folder, [example])
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
        "part": None,
        "whole": None,
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
    answers, bad = ask(tiny.tiny_vlm(), folder, [*examples, *broken])
    assert sorted(bad) == ["changed", "empty", "long", "missing", "silent"]
    assert len(answers) == len(examples)
    assert "cannot be read" in bad["missing"] and "sha256" in bad["changed"] and "the model takes 256" in bad["long"]


def test_nats_that_are_no_numbers_are_bad_and_never_counted(data):
    folder, examples = data
    vlm = tiny.new_tiny_vlm()
    with torch.no_grad():
        vlm.decoder.norm.weight.fill_(float("nan"))
    answers, bad = ask(vlm, folder, examples)
    assert len(bad) == len(examples) and answers.is_empty()


def test_text_alone_is_its_own_cluster(tmp_path):
    examples = [replace(e, image=None, sha256=None) for e in write_dataset(tmp_path / "data", evaluation=1)]
    answers, bad = ask(tiny.tiny_lm(), tmp_path, examples)
    assert not bad and answers["image"].to_list() == answers["example_id"].to_list()


def test_an_image_is_read_once_for_all_its_questions_and_no_window_is_larger_than_a_batch(data):
    """Three questions an image and four in a batch: a window that cut an image in two would read it twice."""
    folder, examples = data
    vlm, seen = tiny.new_tiny_vlm(), []
    counting = vlm.base.model.vision_tower.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    ask(vlm, folder, examples)
    assert sum(seen) == len({example.image for example in examples}) == len(seen)
    seen.clear()
    ask(vlm, folder, examples, settings=Evaluation(batch_size=2, max_new_tokens=6))
    counting.remove()
    assert sum(seen) > len({example.image for example in examples}), "three do not fit into two"


class Counted:
    """A model that counts the examples it is asked."""

    def __init__(self, monkeypatch):
        from headwise.evaluation import evaluate as module

        self.read, self.said, self.fails_after = 0, 0, None
        read, said = module.read_answers, module.generate

        def read_answers(vlm, batch, **options):
            self.read += len(batch.inputs["input_ids"])
            return read(vlm, batch, **options)

        def generate(vlm, images, questions, tokens):
            self.say(len(images))
            return said(vlm, images, questions, tokens)

        read_more, say_more = module.read_continued, module.generate_continued

        def read_continued(continued):
            self.read += len(continued.logits)
            return read_more(continued)

        def generate_continued(vlm, continued, examples, tokens):
            self.say(len(examples))
            return say_more(vlm, continued, examples, tokens)

        for function in (read_answers, generate, read_continued, generate_continued):
            monkeypatch.setattr(module, function.__name__, function)

    def say(self, number):
        if self.fails_after is not None and self.said >= self.fails_after:
            raise RuntimeError("killed")
        self.said += number


def test_what_was_asked_is_not_asked_again(data, tmp_path, monkeypatch):
    folder, examples = data
    first, _ = ask(tiny.tiny_vlm(), folder, examples, tmp_path / "kept.sqlite")
    model = Counted(monkeypatch)
    again, _ = ask(tiny.tiny_vlm(), folder, examples, tmp_path / "kept.sqlite")
    assert again.equals(first) and (model.read, model.said) == (0, 0)
    more = [*examples, replace(examples[1], id="new", question="What is new?")]
    ask(tiny.tiny_vlm(), folder, more, tmp_path / "kept.sqlite")
    assert model.read == 1 and model.said <= 1
    changed = [replace(e, answers=("another",)) for e in examples if e.task == "colour"]
    ask(tiny.tiny_vlm(), folder, changed, tmp_path / "kept.sqlite")
    assert model.read == 1 + len(changed) and model.said <= 1, "another reference is read, and the answer is the same"
    ask(tiny.tiny_vlm(), folder, examples, tmp_path / "kept.sqlite", adapter="another")
    assert model.read == 1 + len(changed) + len(examples)


def test_a_run_that_was_killed_goes_on_where_it_was(data, tmp_path, monkeypatch):
    folder, examples = data
    whole, _ = ask(tiny.tiny_vlm(), folder, examples)
    model = Counted(monkeypatch)
    model.fails_after = 4
    with pytest.raises(RuntimeError, match="killed"):
        ask(tiny.tiny_vlm(), folder, examples, tmp_path / "kept.sqlite")
    assert 4 <= model.said < len(examples) - 5
    model.fails_after = None
    heard = []
    resumed, _ = ask(tiny.tiny_vlm(), folder, examples, tmp_path / "kept.sqlite", lambda done, total: heard.append(done))
    closed = whole.filter(pl.col("task") != "caption")
    again = SETTINGS.batch_size  # of the batch that was killed
    assert len(examples) <= model.read <= len(examples) + again and len(closed) <= model.said <= len(closed) + again
    assert resumed.equals(whole) and 0 < heard[0] < len(examples)


def test_what_is_only_to_be_said_is_not_read(data):
    folder, examples = data
    boxes = [replace(e, id=f"{e.id}-box", task="box", answers=("[0.1, 0.2, 0.5, 0.6]",)) for e in examples[:3]]
    empty = replace(boxes[0], id="none", answers=())
    askings = {"box": Asking(lambda answer, example: box_rule(answer, boxes[0]), read=False)}
    answers, bad = evaluate(tiny.tiny_vlm(), Questions([*boxes, empty], askings, folder), SETTINGS, Responses(None, {}), ignore)
    assert not bad and len(answers) == 4, "what is not read needs no reference"
    assert answers["nats"].null_count() == answers["tokens"].null_count() == 4
    assert answers["whole"].to_list() == [1.0] * 4 and not answers["valid"].any()
