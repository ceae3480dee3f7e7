"""Likelihoods of labels against the obvious way, a pass for every label, and what cannot be told apart."""

import pytest
import torch

from headwise.examples import Example
from headwise.labels import Labels, label_sets, score_labels, tokenised
from headwise.vlm import encode, generate_ids
from tests import zoo
from tests.tiny import image, tiny_lm, tiny_vlm

QUESTIONS = ["What colour is it?", "How many green squares are in the picture?"]
WORDS = ("red", "three squares", "three circles", "blue")  # two of them share their first tokens


@pytest.mark.parametrize("model", [tiny_lm, tiny_vlm, lambda: zoo.vlm("paligemma"), lambda: zoo.vlm("qwen2_5_vl")])
def test_the_scores_are_those_of_a_pass_for_every_label(model) -> None:
    vlm = model()
    images = [image(0), image(1)] if vlm.visual_id is not None else [None, None]
    labels = tokenised(vlm, WORDS)
    assert any(len(context) for context in labels.contexts)
    with torch.no_grad():
        found = score_labels(vlm, images, QUESTIONS, labels)
        for row, question in enumerate(QUESTIONS):
            for column, word in enumerate(WORDS):
                batch = encode(vlm, [images[row]], [question], [word])
                log_probs = vlm.model(**batch.inputs).logits[0].double().log_softmax(-1)
                answer = batch.segments.answer[0].nonzero()[:, 0]
                expected = sum(float(log_probs[place - 1, batch.inputs["input_ids"][0, place]]) for place in answer)
                assert float(found.log_probs[row, column]) == pytest.approx(expected, abs=1e-3)
            prompt = encode(vlm, [images[row]], [question])
            p = vlm.model(**prompt.inputs).logits[0, -1].double().softmax(-1)
            assert float(found.entropy[row]) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-3)


def test_an_answer_is_valid_where_greedy_decoding_begins_with_a_label() -> None:
    vlm = tiny_lm()
    said = generate_ids(vlm, encode(vlm, [None, None], QUESTIONS, padding_side="left"), 3)
    first, other = (tuple(row[:2].tolist()) for row in said)
    assert first != other
    labels = Labels(("first", "unlikely"), (first, (first[0], first[1] + 1)))
    with torch.no_grad():
        assert score_labels(vlm, [None, None], QUESTIONS, labels).valid.tolist() == [True, False]


def test_labels_come_from_the_answers_of_their_task() -> None:
    def example(task: str, *answers: str) -> Example:
        return Example(f"{task}{answers}", None, None, "?", answers, None, task, "calibration")

    assert label_sets(
        [example("sign", "b"), example("sign", "a", "x"), example("sign", "b"), example("caption", "long"), example("n", "1")]
    ) == {"sign": ("a", "b")}  # neither a caption nor a task with a single answer
    assert label_sets([example("number", str(place)) for place in range(27)]) == {}
    with pytest.raises(ValueError, match="of task 'sign' has no answer to tell its labels by"):
        label_sets([example("sign")])


def test_labels_that_cannot_be_told_apart_are_refused_by_name() -> None:
    vlm = tiny_lm()
    with pytest.raises(ValueError, match="the label 'three' begins the label 'three squares': name one of them otherwise"):
        tokenised(vlm, ("three squares", "red", "three"))
    with pytest.raises(ValueError, match="the label 'red' begins the label 'red'"):
        tokenised(vlm, ("red", "red"))
    with pytest.raises(ValueError, match=r"labels \['red'\]: two are needed to choose between"):
        tokenised(vlm, ("red",))
    with pytest.raises(ValueError, match="the answer '' has no tokens"):
        tokenised(vlm, ("red", ""))
