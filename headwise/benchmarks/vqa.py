"""Open questions with short answers: VQAv2, GQA, TextVQA and VizWiz, from the files their authors publish."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from headwise.benchmarks.benchmark import SHORT_ANSWER, Benchmark, ask, find, image_folder, read_json
from headwise.evaluation.judgement import Asking, Questions
from headwise.evaluation.vqa import exact_rule, vqa_rule
from headwise.examples import Example

SOFT, EXACT = Asking(vqa_rule), Asking(exact_rule)
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


class Said(BaseModel):
    """What one annotator answered."""

    answer: str


class VQAQuestion(BaseModel):
    """A question of VQAv2."""

    question_id: int
    image_id: int
    question: str


class VQAQuestions(BaseModel):
    """VQAv2's file of questions; `data_subtype` is the folder of the images."""

    data_subtype: str
    questions: list[VQAQuestion]


class VQAAnnotation(BaseModel):
    """The ten answers to a question of VQAv2."""

    question_id: int
    answer_type: str
    answers: list[Said]


class VQAAnnotations(BaseModel):
    """VQAv2's file of answers."""

    annotations: list[VQAAnnotation]


def read_vqav2(folder: Path, images: Path, prompt: str) -> Questions:
    """Tasks are the types of answers: yes/no, number, other."""
    asked: VQAQuestions = read_json(find(folder, "*OpenEnded*questions.json"), VQAQuestions)
    told: VQAAnnotations = read_json(find(folder, "*mscoco*annotations.json"), VQAAnnotations)
    answers = {annotation.question_id: annotation for annotation in told.annotations}
    if missing := [question.question_id for question in asked.questions if question.question_id not in answers]:
        raise ValueError(f"{folder}: {len(missing)} questions without an annotation, such as {missing[0]}; are both files of one split?")
    place = image_folder(images, asked.data_subtype, "images")
    examples: list[Example] = []
    for question in asked.questions:
        own, image = answers[question.question_id], f"{place}COCO_{asked.data_subtype}_{question.image_id:012d}.jpg"
        said = [one.answer for one in own.answers]
        examples.append(ask("vqav2", str(question.question_id), image, question.question + prompt, said, own.answer_type))
    return Questions(examples, dict.fromkeys({example.task for example in examples}, SOFT), images)


class GQATypes(BaseModel):
    """How a question of GQA is built."""

    structural: str


class GQAQuestion(BaseModel):
    """A question of GQA."""

    question: str
    imageId: str  # noqa: N815
    answer: str
    types: GQATypes


def read_gqa(folder: Path, images: Path, prompt: str) -> Questions:
    """Tasks are the structural types: verify, query, choose, logical, compare."""
    asked: dict[str, GQAQuestion] = read_json(find(folder, "testdev_balanced_questions.json"), dict[str, GQAQuestion])
    place = image_folder(images, "images")
    examples = [
        ask("gqa", name, f"{place}{one.imageId}.jpg", one.question + prompt, [one.answer], one.types.structural)
        for name, one in asked.items()
    ]
    return Questions(examples, dict.fromkeys({example.task for example in examples}, EXACT), images)


class TextVQAQuestion(BaseModel):
    """A question of TextVQA with its ten answers; the test split has none."""

    question_id: int
    image_id: str
    question: str
    answers: list[str]


class TextVQAData(BaseModel):
    """TextVQA's file."""

    data: list[TextVQAQuestion]


def read_textvqa(folder: Path, images: Path, prompt: str) -> Questions:
    """Images of the validation split lie in `train_images`."""
    asked: TextVQAData = read_json(find(folder, "TextVQA_*_val.json"), TextVQAData)
    place = image_folder(images, "train_images", "images")
    examples = [
        ask("textvqa", str(one.question_id), f"{place}{one.image_id}.jpg", one.question + prompt, one.answers, "text") for one in asked.data
    ]
    return Questions(examples, {"text": SOFT}, images)


class VizWizQuestion(BaseModel):
    """A question of VizWiz with its ten answers."""

    image: str
    question: str
    answers: list[Said]
    answer_type: Literal["other", "unanswerable", "yes/no", "number"]


def read_vizwiz(folder: Path, images: Path, prompt: str) -> Questions:
    """Tasks are the types of answers: other, unanswerable, yes/no, number."""
    asked: list[VizWizQuestion] = read_json(find(folder, "val.json", "**/val.json"), list[VizWizQuestion])
    place = image_folder(images, "val", "images")
    examples = [
        ask("vizwiz", one.image, place + one.image, one.question + prompt, [said.answer for said in one.answers], one.answer_type)
        for one in asked
    ]
    return Questions(examples, dict.fromkeys({example.task for example in examples}, SOFT), images)


VQA_RULE = "soft accuracy min(matches / 3, 1) over the leave-one-out sets of ten annotators, after the official normalisation; version 1"
VQAV2 = Benchmark("vqav2", f"VQAv2 (Goyal et al. 2017): {VQA_RULE}", ("*OpenEnded*questions.json", "*mscoco*annotations.json"), read_vqav2)
GQA = Benchmark(
    "gqa",
    "GQA (Hudson and Manning 2019): the answer itself, in small letters, without a full stop at its end; version 1",
    ("testdev_balanced_questions.json",),
    read_gqa,
)
TEXTVQA = Benchmark("textvqa", f"TextVQA (Singh et al. 2019): {VQA_RULE}", ("TextVQA_*_val.json",), read_textvqa)
VIZWIZ = Benchmark("vizwiz", f"VizWiz (Gurari et al. 2018): {VQA_RULE}", ("val.json",), read_vizwiz, prompt=UNANSWERABLE + SHORT_ANSWER)
