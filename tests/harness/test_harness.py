"""lmms-eval on a task of our own with the embedded model, base and calibrated: the figures of the native evaluation, answer by answer."""

import json
import re
import subprocess
from pathlib import Path

import polars as pl
import pytest
from pydantic import TypeAdapter
from yaml import safe_dump

from flows.parameters import located_benchmark
from headwise.benchmarks.benchmark import Source
from headwise.benchmarks.registry import read_questions
from headwise.calibration.settings import Lora
from headwise.data import DataSource, write_data
from headwise.evaluation.compare import compare
from headwise.evaluation.conditions import check_conditions
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.statistics import Statistics
from headwise.evaluation.table import read_answers
from headwise.examples import CAPTION, Example, read_examples
from headwise.files import MANIFEST, read_json, write_json
from headwise.harness.request import HARNESS, RESULTS, SAMPLES, TRACEBACK, Request, ask_harness, harness_python
from headwise.observation import EMBEDDED, Observation
from headwise.selection import SELECTION_FILE, Criterion, Selection
from tasks.benchmark import write_benchmark, write_harnessed
from tasks.calibration import calibrate

SETTINGS = Evaluation(max_new_tokens=8)
METRIC = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True, "ignore_punctuation": True}
TASK = {
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "question",
    "doc_to_target": "answer",
    "generation_kwargs": {"max_new_tokens": 8, "do_sample": False},
    "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True, "ignore_punctuation": True}
    ],
    "metadata": {"version": 3},
}
CODE = """from PIL import Image
def doc_to_visual(doc):
    return [Image.open(path) for path in doc["images"]]
"""
FILTER = """filter_list:
  - name: known
    filter:
      - function: !function code.Known
      - function: take_first
"""
KNOWN = """
from lmms_eval.filters.transformation import MapFilter
class Known(MapFilter):
    def __init__(self):
        super().__init__({})
    def apply(self, resps, docs):
        return [[doc["answer"]] for doc, _ in zip(docs, resps)]
"""
ARMS = ("base", "top")


def define(folder: Path, name: str, documents: list[dict[str, object]], **fields: object) -> Path:
    """A task of that name for lmms-eval, its documents beside it."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    content = {"task": name, **TASK, "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}}, **fields}
    (folder / f"{name}.yaml").write_text(f"{safe_dump(content)}doc_to_visual: !function code.doc_to_visual\n")
    (folder / "code.py").write_text(CODE)
    return folder


def documents_of(images: Path, examples: list[Example]) -> list[dict[str, object]]:
    return [{"images": [str(images / str(e.image))], "question": e.question, "answer": e.answers[0], "id": e.id} for e in examples]


def request(folder: Path, task: str, **fields: object) -> Request:
    asked = {"split": f"lmms-{task}", "task": task, "folder": str(folder), "model": EMBEDDED, "adapter": None, "dtype": "auto"}
    sizes = {"batch_size": 16, "limit": 0, "seed": 0, "shard": 0, "num_shards": 1}
    return Request(**asked | sizes | fields)


class TestReading:
    """What lmms-eval left is read back, by an interpreter that leaves it."""

    def python(self, folder: Path, samples: list[dict[str, object]] | None, monkeypatch: pytest.MonkeyPatch, said: str = "") -> None:
        python = folder / "bin" / "python"
        python.parent.mkdir(parents=True)
        results = {"figures": {"t": {"exact_match,none": 0.5}}, "versions": {"lmms_eval": "0.7.3"}, "dtype": "torch.float32"}
        written = "".join(
            f"cat > $4/{name} <<'E'\n{json.dumps(content)}\nE\n" for name, content in ((SAMPLES, samples), (RESULTS, results))
        )
        python.write_text("#!/bin/sh\n" + ("echo asking\n" + written if samples is not None else f"cat <<'E'\n{said}\nE\nexit 1\n"))
        python.chmod(0o755)
        monkeypatch.setenv(HARNESS, str(folder))

    def sample(self, document: int, right: float | None) -> dict[str, object]:
        said = {"answer": "yes", "metrics": ["bleu"], "metric": None if right is None else "score", "right": right, "content": "d"}
        return {"task": "t", "document": document, "image": None, **said}

    def test_rows_by_example(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.python(tmp_path / "env", [self.sample(k, k % 2) for k in (2, 1)], monkeypatch)
        heard: list[str] = []
        found = ask_harness(request(tmp_path, "t"), tmp_path, heard.append)
        assert heard == ["asking"] and found.dtype == "torch.float32" and found.figures["t"] == {"exact_match,none": 0.5}
        rows = found.answers.select("example_id", "image", "split", "task", "right", "valid").rows()
        assert rows == [("lmms-t/t/1", "lmms-t/t/1", "lmms-t", "t", 1.0, None), ("lmms-t/t/2", "lmms-t/t/2", "lmms-t", "t", 0.0, None)]

    @pytest.mark.parametrize(
        ("right", "message"),
        [
            (None, "lmms-t/t/0: none of bleu is a number"),
            (30.0, "score is 30.0, and only figures of single examples in"),
            (-1, "score is -1"),
        ],
    )
    def test_a_figure_that_cannot_be_compared_is_refused(
        self, right: float | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.python(tmp_path / "env", [self.sample(0, right)], monkeypatch)
        with pytest.raises(ValueError, match=message):
            ask_harness(request(tmp_path, "t"), tmp_path, print)

    @pytest.mark.parametrize(
        ("said", "reason"),
        [
            (f"asking\n{TRACEBACK}\n  File x\nValueError: no such thing", "no such thing"),
            (f"{TRACEBACK}\n  a\nheadwise.examples.BadExample: too long", "too long"),
            (f"{TRACEBACK}\n  a\nKeyError: 'b'\n\n{TRACEBACK}\n  c\nRetryError: d", "KeyError: 'b'"),
            (f"{TRACEBACK}\n  a\nAssertionError\nbar 100 %", "AssertionError"),
            ("Killed", "Killed"),
            ("", "no word"),
        ],
    )
    def test_a_failure_is_told_in_its_own_words(self, said: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.python(tmp_path / "env", None, monkeypatch, said)
        with pytest.raises(ValueError, match=f"^lmms-eval failed at t: {re.escape(reason)}$"):
            ask_harness(request(tmp_path, "t"), tmp_path, print)

    def test_an_environment_that_is_not_there_is_named_before_anything_runs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(HARNESS, str(tmp_path))
        with pytest.raises(ValueError, match="no environment here yet; `make harness` builds it"):
            located_benchmark(Source(name="lmms-mmmu_val"))


def test_a_task_brings_its_own_images_and_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").touch()
    monkeypatch.setenv(HARNESS, str(tmp_path))
    with pytest.raises(ValueError, match="bring their own images and prompts"):
        located_benchmark(Source(name="lmms-mmmu_val", prompt="?"))
    with pytest.raises(ValueError, match="no such folder; give the one that defines the task"):
        located_benchmark(Source(name="lmms-mmmu_val", path=str(tmp_path / "nowhere")))
    tasks = tmp_path / "lib/python3/site-packages/lmms_eval/tasks/mmmu"
    tasks.mkdir(parents=True)
    (tasks / "val.yaml").write_text('include: x\ntask: "mmmu_val"\n')
    (tasks / "_default_template_yaml").write_text("group: mmmu\ntask:\n- mmmu_val\n- mmmu_test\n")
    for name in ("mmmu_val", "mmmu_test", "mmmu"):
        assert located_benchmark(Source(name=f"lmms-{name}")).path == ""
    with pytest.raises(ValueError, match="lmms-eval has no task 'mmmu_va'"):
        located_benchmark(Source(name="lmms-mmmu_va"))
    folder = define(tmp_path / "own", "mine", [])
    assert located_benchmark(Source(name="lmms-mine", path=str(folder))).path == str(folder)
    with pytest.raises(ValueError, match="own defines no task 'mmmu_val'"):
        located_benchmark(Source(name="lmms-mmmu_val", path=str(folder)))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes, an adapter trained on some of them, POPE about the others, by Headwise and as a task of lmms-eval."""
    place = tmp_path_factory.mktemp("place")
    images = place / "data/images"
    write_data(DataSource(calibration=16, evaluation=10, forgetting=4), images, lambda _done, _all: None)
    (place / "selection").mkdir()
    selection = Selection(arm="top", criterion=Criterion(k=4), layers=(12, 13, 14, 15), num_layers=30)
    write_json(TypeAdapter(Selection).dump_python(selection, mode="json"), place / "selection" / SELECTION_FILE)
    calibrate(images, place / "selection" / SELECTION_FILE, place / "top", Observation(), Lora(steps=6, learning_rate=0.003))
    return place


@pytest.fixture(scope="module")
def answers(place: Path) -> dict[str, tuple[pl.DataFrame, pl.DataFrame]]:
    """By arm: the native answers and lmms-eval's. In float32: in bfloat16 the embedded model's yes and no are so near each other that
    another batch can round to another answer.
    """
    own, data = place / "data/images", place / "data"
    native = Source(name="pope", limit=4)
    questions = read_questions(native, own).examples
    folder = define(place / "task", "mypope", documents_of(own, list(questions)))
    harnessed = Source(name="lmms-mypope", path=str(folder))
    for arm in ARMS:
        adapter = None if arm == "base" else place / "top"
        for source, write in ((native, write_benchmark), (harnessed, write_harnessed)):
            output = data / "benchmarks" / source.name / arm / "shard=00"
            write(source, own, adapter, output, Observation(dtype="float32"), SETTINGS, (0, 1))
    ids = {place: question.id for place, question in enumerate(questions)}
    found = {}
    for arm in ARMS:
        table = read_answers(data, arm)
        theirs = table.filter(pl.col("split") == "lmms-mypope")
        number = pl.col("example_id").str.split("/").list.last().cast(pl.Int64)
        theirs = theirs.with_columns(example_id=number.replace_strict(ids)).sort("example_id")
        found[arm] = table.filter(pl.col("split") == "pope").sort("example_id"), theirs
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestWithTheEmbeddedModel:
    """Through lmms-eval itself, in its own environment."""

    def test_every_answer_and_the_figure_are_the_native_ones(self, answers: dict[str, tuple[pl.DataFrame, pl.DataFrame]]) -> None:
        for native, theirs in answers.values():
            assert len(native) == len(theirs) >= 40
            assert native.select("example_id", "answer").equals(theirs.select("example_id", "answer"))
            plain = pl.col("answer").str.to_lowercase().is_in(["yes", "no"])
            assert native.filter(plain).height >= 0.9 * native.height
            exact = native.select(pl.when(plain).then("right").otherwise(0)).to_series()  # what is neither is wrong in an exact match
            assert exact.to_list() == theirs["right"].to_list()
        base, top = (native for native, _ in answers.values())
        assert base["answer"].to_list() != top["answer"].to_list(), "the adapter changes nothing, so nothing was shown of it"

    def test_both_compare_alike(self, answers: dict[str, tuple[pl.DataFrame, pl.DataFrame]]) -> None:
        quick = Statistics(bootstrap=500, sign_flips=500)
        native, theirs = (next(c for c in compare(answers["base"][k], answers["top"][k], quick) if c.task is None) for k in (0, 1))
        assert native.num_images == theirs.num_images == 4 and native.before == theirs.before
        assert native.after == pytest.approx(theirs.after, abs=0.02)
        assert (native.low, native.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)

    @pytest.mark.usefixtures("answers")
    def test_the_manifest_says_by_what_and_the_arms_compare(self, place: Path) -> None:
        folders = [place / "data/benchmarks/lmms-mypope" / arm / "shard=00" for arm in ARMS]
        manifest = read_json(folders[0] / MANIFEST)
        assert manifest["protocol"] == "lmms_eval 0.7.3, task mypope 3 by exact_match" and manifest["shards"] == 1
        figures = manifest["lmms_eval"]
        assert isinstance(figures, dict) and 0 < figures["mypope"]["exact_match,none"] <= 1
        check_conditions(folders)

    def test_choices_are_read_by_their_likelihood(self, place: Path) -> None:
        examples = [e for e in read_examples(place / "data/images", "evaluation") if e.task == "count"][:5]
        documents = [
            {**document, "choices": [str(number) for number in range(10)]} for document in documents_of(place / "data/images", examples)
        ]
        metrics = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
        fields = {"output_type": "multiple_choice", "doc_to_choice": "choices", "target_delimiter": " ", "metric_list": metrics}
        folder = define(place / "choices", "chosen", documents, **fields)
        for k in (0, 1):
            (place / f"chosen{k}").mkdir()
        shards = [ask_harness(request(folder, "chosen", shard=k, num_shards=2), place / f"chosen{k}", print).answers for k in (0, 1)]
        rows = pl.concat(shards).sort("example_id")
        assert rows["example_id"].to_list() == [f"lmms-chosen/chosen/{number}" for number in range(5)] and rows["right"].mean() >= 0.4

    def test_filters_see_the_documents_that_were_asked(self, place: Path, tmp_path: Path) -> None:
        """A filter that puts each document's own answer in the place of what was said: right for every one, whichever are drawn."""
        examples = [e for e in read_examples(place / "data/images", "evaluation") if e.task != CAPTION][:6]
        documents = documents_of(place / "data/images", examples)
        folder = define(tmp_path / "task", "filtered", documents, process_results_use_image=True, generation_kwargs={"max_new_tokens": 1})
        with (folder / "filtered.yaml").open("a") as definition:
            definition.write(FILTER)
        with (folder / "code.py").open("a") as code:
            code.write(KNOWN)
        found = ask_harness(request(folder, "filtered", limit=4, seed=1, shard=1, num_shards=2), tmp_path, print)
        assert len(found.answers) == 2 and found.answers["right"].to_list() == [1, 1]

    @pytest.mark.parametrize(
        ("fields", "images", "message"),
        [
            ({}, 2, "shows 2 things .*Headwise asks about one image"),
            ({"generation_kwargs": {"do_sample": True, "temperature": 0.7}}, 1, "samples its answers, and Headwise's are greedy"),
            ({"metric_list": [{**METRIC, "higher_is_better": False}]}, 1, "exact_match is better where it is lower"),
        ],
    )
    def test_what_cannot_be_asked_is_refused(
        self, fields: dict[str, object], images: int, message: str, place: Path, tmp_path: Path
    ) -> None:
        examples = [e for e in read_examples(place / "data/images", "evaluation") if e.task != CAPTION][:2]
        documents = [{**document, "images": [*document["images"]] * images} for document in documents_of(place / "data/images", examples)]
        folder = define(tmp_path / "task", "odd", documents, **fields)
        with pytest.raises(ValueError, match=f"lmms-eval failed at odd: .*{message}"):
            ask_harness(request(folder, "odd"), tmp_path, print)

    def test_an_image_to_calibrate_with_is_found(self, place: Path, tmp_path: Path) -> None:
        own = place / "data/images"
        examples = [e for e in read_examples(own, "calibration") if e.task != CAPTION][:2]
        folder = define(tmp_path / "task", "leaking", documents_of(own, examples))
        with pytest.raises(ValueError, match="look like, images of the benchmark lmms-leaking"):
            write_harnessed(Source(name="lmms-leaking", path=str(folder)), own, None, tmp_path / "out", Observation(), SETTINGS, (0, 1))
        assert not (tmp_path / "out").exists()

    def test_a_task_that_is_nowhere_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="lmms-eval has no task 'nowhere'"):
            ask_harness(request(tmp_path, "nowhere"), tmp_path, print)

    def test_lmms_evals_own_command_finds_the_model(self, place: Path, tmp_path: Path) -> None:
        examples = [e for e in read_examples(place / "data/images", "evaluation") if e.task != CAPTION][:16]
        folder = define(tmp_path / "task", "own", documents_of(place / "data/images", examples))

        def command(arguments: str) -> subprocess.CompletedProcess[str]:
            start = [harness_python().with_name("lmms-eval"), "--model", "headwise", "--model_args", arguments, "--tasks", "own"]
            options = ["--include_path", folder, "--output_path", tmp_path / "out", "--log_samples", "--verbosity", "DEBUG"]
            return subprocess.run([*start, *options, "--batch_size", "4"], capture_output=True, text=True, check=False)

        done = command(f"adapter={place / 'top'}")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        (samples,) = (tmp_path / "out").rglob("*_samples_own.jsonl")
        said = [json.loads(line)["filtered_resps"] for line in samples.read_text().splitlines()]
        found = {}
        for arm, adapter in (("base", None), ("top", str(place / "top"))):
            (tmp_path / arm).mkdir()
            asked = ask_harness(request(folder, "own", adapter=adapter, batch_size=4), tmp_path / arm, print)
            found[arm] = asked.answers.sort(pl.col("example_id").str.split("/").list.last().cast(pl.Int64))["answer"].to_list()
        assert said == found["top"] != found["base"]
        wrong = command("adaptor=x")
        assert "unexpected keyword argument 'adaptor'" in wrong.stdout + wrong.stderr
