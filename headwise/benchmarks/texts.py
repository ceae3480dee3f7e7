"""Text alone: what ZeroTuning is measured by (Han et al. 2025): sentiment, subjectivity, kinds of questions, entailment, reading."""

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from headwise.benchmarks.benchmark import Benchmark, ask, find, read_json_lines
from headwise.evaluation.judgement import Asking, Questions
from headwise.evaluation.vqa import known_rule

Row = tuple[str, str]
"""A text and its label."""
FIVE = ("terrible", "bad", "okay", "good", "great")
TREC = {
    "ABBR": "abbreviation",
    "ENTY": "entity",
    "DESC": "description",
    "HUM": "person",
    "LOC": "location",
    "NUM": "number",
}
ENTAILMENT = {"entailment": "yes", "contradiction": "no", "neutral": "maybe"}


def read_sst2(folder: Path) -> Iterator[Row]:
    """GLUE's `dev.tsv`: sentence, tab, 0 or 1."""
    with find(folder, "dev.tsv", "**/dev.tsv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            yield row["sentence"].strip(), ("negative", "positive")[int(row["label"])]


def read_mr(folder: Path) -> Iterator[Row]:
    """Pang and Lee's `rt-polarity.pos` and `.neg`."""
    return _by_file(folder, {"rt-polarity.pos": "positive", "rt-polarity.neg": "negative"})


def read_subj(folder: Path) -> Iterator[Row]:
    """Pang and Lee's `quote.tok.gt9.5000` (subjective) and `plot.tok.gt9.5000` (objective)."""
    return _by_file(folder, {"quote.tok.gt9.5000": "subjective", "plot.tok.gt9.5000": "objective"})


def _by_file(folder: Path, labels: dict[str, str]) -> Iterator[Row]:
    for name, label in labels.items():
        lines = find(folder, name, f"**/{name}").read_text(encoding="latin-1").split("\n")  # byte 0x85 ends no line
        yield from ((line.strip(), label) for line in lines if line.strip())


def read_sst5(folder: Path) -> Iterator[Row]:
    """The Stanford treebank's `trees/test.txt`: the label of the whole sentence is the root's."""
    for line in find(folder, "test.txt", "trees/test.txt").read_text(encoding="utf-8").split("\n"):
        if line.strip():
            text = " ".join(re.findall(r"[^\s()]+(?=\))", line)).replace("-LRB-", "(").replace("-RRB-", ")")
            yield text, FIVE[int(line[1])]


def read_trec(folder: Path) -> Iterator[Row]:
    """Li and Roth's `TREC_10.label`: coarse and fine kind, the question."""
    for line in filter(None, find(folder, "TREC_10.label", "**/TREC_10.label").read_text(encoding="latin-1").split("\n")):
        kind, _, question = line.partition(" ")
        yield question.strip(), TREC[kind.partition(":")[0]]


class CBLine(BaseModel):
    """A pair of SuperGLUE's CommitmentBank."""

    premise: str
    hypothesis: str
    label: Literal["entailment", "contradiction", "neutral"]


def read_cb(folder: Path) -> Iterator[Row]:
    """SuperGLUE's `val.jsonl`."""
    lines: list[CBLine] = read_json_lines(find(folder, "val.jsonl", "**/val.jsonl"), CBLine)
    return ((f"{line.premise}\nDoes it follow that {line.hypothesis.rstrip('.')}?", ENTAILMENT[line.label]) for line in lines)


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
        yield f"{line.passage}\nQuestion: {line.question.rstrip('?')}?", "yes" if truth else "no"


def _benchmark(
    name: str, source: str, files: tuple[str, ...], rows: Callable[[Path], Iterator[Row]], before: str, prompt: str
) -> Benchmark:
    """A text behind `before`, then the prompt; right is the label itself after VQA's normalisation, valid any label."""

    def read(folder: Path, images: Path, prompt: str) -> Questions:
        texts = enumerate(rows(folder))
        examples = [ask(name, f"{number:06d}", None, f"{before}{text}{prompt}", [label], name) for number, (text, label) in texts]
        return Questions(examples, {name: Asking(known_rule(examples))}, images)

    protocol = f"{source}: the label itself, normalised; any other answer is wrong, and invalid; version 1"
    return Benchmark(name, protocol, files, read, prompt)


SENTIMENT = "\nIs the sentiment of this review positive or negative? Answer with one word."
TEXTS = (
    _benchmark("sst2", "SST-2 (Socher et al. 2013), GLUE's dev", ("dev.tsv",), read_sst2, "Review: ", SENTIMENT),
    _benchmark("mr", "MR (Pang and Lee 2005)", ("rt-polarity.*",), read_mr, "Review: ", SENTIMENT),
    _benchmark(
        "sst5",
        "SST-5 (Socher et al. 2013), test",
        ("test.txt",),
        read_sst5,
        "Review: ",
        f"\nIs this review {', '.join(FIVE[:-1])} or {FIVE[-1]}? Answer with one word.",
    ),
    _benchmark(
        "subj",
        "SUBJ (Pang and Lee 2004)",
        ("*.tok.gt9.5000",),
        read_subj,
        "Sentence: ",
        "\nIs this sentence subjective or objective? Answer with one word.",
    ),
    _benchmark(
        "trec",
        "TREC (Li and Roth 2002), coarse kinds, test",
        ("TREC_10.label",),
        read_trec,
        "Question: ",
        f"\nDoes it ask for {', '.join([*TREC.values()][:-1])} or {[*TREC.values()][-1]}? Answer with one word.",
    ),
    _benchmark("cb", "CB (de Marneffe et al. 2019), SuperGLUE's val", ("val.jsonl",), read_cb, "", "\nAnswer yes, no or maybe."),
    _benchmark("boolq", "BoolQ (Clark et al. 2019), dev", ("dev.jsonl", "val.jsonl"), read_boolq, "", "\nAnswer yes or no."),
)
