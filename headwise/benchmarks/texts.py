"""Text alone: what ZeroTuning is measured by (Han et al. 2025): sentiment, subjectivity, kinds of questions, entailment, reading."""

import csv
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, TypeAdapter

from headwise.benchmarks.benchmark import Benchmark, ask, find, read_json_lines
from headwise.evaluation.judgement import Asking, Questions
from headwise.evaluation.vqa import known_rule

Row = tuple[str, str]
"""A text and its label, as the files write it."""
REVIEWS = "movieReviewSnippets_GroundTruth.txt"


def read_sst2(folder: Path) -> Iterator[Row]:
    """GLUE's `dev.tsv`: sentence, tab, 0 or 1."""
    with find(folder, "dev.tsv", "**/dev.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            yield row["sentence"].strip(), row["label"]


def read_reviews(folder: Path) -> Iterator[Row]:
    """The sentences of Hutto and Gilbert (2014) whose mean rating is above 1 or below -1: number, rating from -4 to 4, text."""
    path = find(folder, REVIEWS)
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line:
            continue
        try:
            _, rating, text = line.split("\t")
            strength = float(rating)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: a number, a rating and a text with tabs between them are needed") from error
        if abs(strength) > 1:
            yield text.strip(), "+" if strength > 0 else "-"


def read_mr(folder: Path) -> Iterator[Row]:
    """Pang and Lee's `rt-polarity.pos` and `.neg`."""
    return _by_file(folder, {"rt-polarity.pos": "pos", "rt-polarity.neg": "neg"})


def read_subj(folder: Path) -> Iterator[Row]:
    """Pang and Lee's `quote.tok.gt9.5000` (subjective) and `plot.tok.gt9.5000` (objective)."""
    return _by_file(folder, {"quote.tok.gt9.5000": "quote", "plot.tok.gt9.5000": "plot"})


def _by_file(folder: Path, labels: dict[str, str]) -> Iterator[Row]:
    for name, label in labels.items():
        lines = find(folder, name, f"**/{name}").read_text(encoding="latin-1").split("\n")  # byte 0x85 ends no line
        yield from ((line.strip(), label) for line in lines if line.strip())


def read_sst5(folder: Path) -> Iterator[Row]:
    """The Stanford treebank's `trees/test.txt`: the label of the whole sentence is the root's."""
    for line in find(folder, "test.txt", "trees/test.txt").read_text(encoding="utf-8").split("\n"):
        if line.strip():
            text = " ".join(re.findall(r"[^\s()]+(?=\))", line)).replace("-LRB-", "(").replace("-RRB-", ")")
            yield text, line[1]


def read_trec(folder: Path) -> Iterator[Row]:
    """Li and Roth's `TREC_10.label`: coarse and fine kind, the question."""
    for line in filter(None, find(folder, "TREC_10.label", "**/TREC_10.label").read_text(encoding="latin-1").split("\n")):
        kind, _, question = line.partition(" ")
        yield question.strip(), kind.partition(":")[0]


class CBLine(BaseModel):
    """A pair of SuperGLUE's CommitmentBank."""

    premise: str
    hypothesis: str
    label: Literal["entailment", "contradiction", "neutral"]


def read_cb(folder: Path) -> Iterator[Row]:
    """SuperGLUE's `val.jsonl`."""
    lines: list[CBLine] = read_json_lines(find(folder, "val.jsonl", "**/val.jsonl"), CBLine)
    return ((f"{line.premise}\nDoes it follow that {line.hypothesis.rstrip('.')}?", line.label) for line in lines)


class BoolQLine(BaseModel):
    """A question of BoolQ (`dev.jsonl`: answer) or of SuperGLUE's (`val.jsonl`: label)."""

    question: str
    passage: str
    answer: bool | None = None
    label: bool | None = None


def read_boolq(folder: Path) -> Iterator[Row]:
    """`dev.jsonl` of the authors, or SuperGLUE's `val.jsonl`."""
    path = find(folder, "dev.jsonl", "val.jsonl")
    lines: list[BoolQLine] = read_json_lines(path, BoolQLine)
    for number, line in enumerate(lines, start=1):
        truth = line.label if line.answer is None else line.answer
        if truth is None:
            raise ValueError(f"{path}, entry {number}: no answer")
        yield f"{line.passage}\nQuestion: {line.question.rstrip('?')}?", str(truth).lower()


class Template(BaseModel, extra="forbid"):
    """An entry of texts.toml."""

    source: str
    before: str
    prompt: str
    completion: str
    labels: dict[str, str]


def _benchmark(name: str, files: tuple[str, ...], rows: Callable[[Path], Iterator[Row]], template: Template) -> Benchmark:
    """A text behind `before`, then the prompt; right is the label's word after VQA's normalisation, valid any label."""

    def read(folder: Path, images: Path, prompt: str) -> Questions:
        examples = []
        for number, (text, label) in enumerate(rows(folder)):
            if label not in template.labels:
                raise ValueError(f"{folder}: text {number} of {name} has the label {label!r}, none of {', '.join(template.labels)}")
            examples.append(ask(name, f"{number:06d}", None, f"{template.before}{text}{prompt}", [template.labels[label]], name))
        return Questions(examples, {name: Asking(known_rule(examples))}, images)

    protocol = f"{template.source}: the label itself, normalised; any other answer is wrong, and invalid; version 1"
    return Benchmark(name, protocol, files, read, template.prompt, completion=template.completion, held_out=_held_out(name))


def _held_out(name: str) -> frozenset[str]:
    """The numbers in `NAME_test.txt`, where there is one, as ids."""
    path = Path(__file__).with_name(f"{name}_test.txt")
    return frozenset(f"{name}/{number}" for number in path.read_text("utf-8").split()) if path.is_file() else frozenset()


READERS: Mapping[str, tuple[tuple[str, ...], Callable[[Path], Iterator[Row]]]] = {
    "sst2": (("dev.tsv",), read_sst2),
    "mr": (("rt-polarity.*",), read_mr),
    "reviews": ((REVIEWS,), read_reviews),
    "sst5": (("test.txt",), read_sst5),
    "subj": (("*.tok.gt9.5000",), read_subj),
    "trec": (("TREC_10.label",), read_trec),
    "cb": (("val.jsonl",), read_cb),
    "boolq": (("dev.jsonl", "val.jsonl"), read_boolq),
}
TEMPLATES = TypeAdapter(dict[str, Template]).validate_python(tomllib.loads(Path(__file__).with_name("texts.toml").read_text("utf-8")))
TEXTS = tuple(_benchmark(name, *READERS[name], template) for name, template in TEMPLATES.items())
