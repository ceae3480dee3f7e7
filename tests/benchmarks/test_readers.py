"""Every benchmark is read from files as they are published, and says what is wrong with others."""

import json
import pickle
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import get_args

import pytest

from headwise.benchmarks.benchmark import Pictured, Source, Text, drawn, of_shard
from headwise.benchmarks.registry import BENCHMARKS, files_digest, read_questions
from headwise.evaluation.judgement import Questions
from headwise.examples import Example, open_image
from tests.benchmarks.official import WRITERS


def read(name: str, folder: Path, **fields: object) -> Questions:
    return read_questions(Source(name=name, path=str(folder), **fields), Path("nowhere"))


@pytest.fixture(autouse=True)
def any_review(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of held-out reviews names sentences of the real file, and these are others."""
    monkeypatch.setitem(BENCHMARKS, "reviews", replace(BENCHMARKS["reviews"], held_out=frozenset()))


@pytest.fixture(params=sorted(BENCHMARKS))
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    WRITERS[request.param](tmp_path)
    return request.param, tmp_path


def test_every_name_of_the_form_is_a_benchmark() -> None:
    assert set(get_args(Pictured) + get_args(Text)) == set(BENCHMARKS) == set(WRITERS)


def test_every_question_has_an_image_an_answer_and_a_rule(written: tuple[str, Path]) -> None:
    name, folder = written
    found = read(name, folder)
    assert len({example.id for example in found.examples}) == len(found.examples) >= 1
    for example in found.examples:
        assert example.id.startswith(f"{name}/") and example.split == name and example.question and example.answers
        assert (example.image is None) is (name not in get_args(Pictured) or (name == "scienceqa" and "image" not in example.task))
        if example.image:
            assert open_image(found.images, example).size == (80, 60)
        rule = found.askings[example.task].rule
        if rule:
            perfect = rule(example.answers[0] if name != "coco" else " and ".join(example.answers), example)
            assert perfect.valid and (perfect.right == 1 or name in ("vqav2", "textvqa", "vizwiz"))
            assert rule("", example).right in (0, 1) and not rule("", example).valid
    assert len(files_digest(Source(name=name, path=str(folder)))) == 64


def test_prompts_are_the_protocols_own_or_the_users(written: tuple[str, Path]) -> None:
    name, folder = written
    ends = {example.question.endswith(BENCHMARKS[name].prompt) for example in read(name, folder).examples}
    assert ends == {True}
    assert {example.question.endswith(" Say it.") for example in read(name, folder, prompt=" Say it.").examples} == {True}


def test_a_cut_or_missing_file_is_named(written: tuple[str, Path]) -> None:
    name, folder = written
    files = sorted({file for pattern in BENCHMARKS[name].files for file in folder.rglob(pattern) if file.name != "synonyms.txt"})
    if files[0].suffix in (".json", ".jsonl", ".p"):
        content = files[0].read_bytes()
        files[0].write_bytes(content[: len(content) // 2 + 3])
        with pytest.raises(ValueError, match=re.escape(files[0].name)):
            read(name, folder)
    for file in files:
        file.unlink()
    with pytest.raises(ValueError, match=r"no file|none of MME's categories"):
        read(name, folder)


def by_id(found: Questions) -> dict[str, Example]:
    return {example.id.partition("/")[2]: example for example in found.examples}


def test_vqav2(tmp_path: Path) -> None:
    WRITERS["vqav2"](tmp_path)
    found = by_id(read("vqav2", tmp_path))
    assert found["42002"].image == "val2014/COCO_val2014_000000000043.jpg" and found["42002"].task == "number"
    assert found["42000"].question == "What colour is it, 0?\nAnswer the question using a single word or phrase."
    assert len(found["42000"].answers) == 10
    questions = json.loads((tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())
    questions["questions"][0]["question_id"] = 1
    (tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps(questions))
    with pytest.raises(ValueError, match="1 questions without an annotation, such as 1; are both files of one split"):
        read("vqav2", tmp_path)


def test_scienceqa_asks_the_test_split_with_hint_and_letters(tmp_path: Path) -> None:
    WRITERS["scienceqa"](tmp_path)
    found = by_id(read("scienceqa", tmp_path))
    assert sorted(found) == ["4", "5"]
    assert found["4"].question == (
        "Context: Bats nurse.\nWhich is a mammal?\nA. shark\nB. bat\nAnswer with the option's letter from the given choices directly."
    )
    assert found["4"].answers == ("B", "bat") and found["4"].task == "natural science, image" and found["5"].task == "language science"


def test_pope_has_a_task_per_setting_and_keeps_lines_asked_twice(tmp_path: Path) -> None:
    WRITERS["pope"](tmp_path)
    found = read("pope", tmp_path).examples
    assert [sum(example.task == task for example in found) for task in ("random", "popular", "adversarial")] == [4, 4, 4]
    (tmp_path / "coco_pope_random.json").write_text('{"question_id": 1, "image": "a.jpg", "text": "Is it?", "label": "maybe"}\n')
    with pytest.raises(ValueError, match=r"coco_pope_random\.json, line 1: label: Input should be 'yes' or 'no'"):
        read("pope", tmp_path)


def test_mme_reads_both_forms_of_folder(tmp_path: Path) -> None:
    WRITERS["mme"](tmp_path)
    found = by_id(read("mme", tmp_path))
    assert found["posters-tt01-0"].image == "posters/images/tt01.png" and found["count-2-1"].image == "count/2.jpg"
    assert found["count-2-1"].question == "Is there 3 dog? Please answer yes or no." and found["count-2-1"].answers == ("no",)
    (tmp_path / "count/1.txt").write_text("Is it?\tperhaps\n")
    with pytest.raises(ValueError, match=r"1\.txt, line 1: not a question, a tab and Yes or No"):
        read("mme", tmp_path)


def test_coco_knows_objects_from_instances_and_captions(tmp_path: Path) -> None:
    WRITERS["coco"](tmp_path)
    found = read("coco", tmp_path)
    own = by_id(found)
    assert own["chair-1"].answers == ("bench", "dog") and own["chair-2"].answers == ("bus",)
    assert own["caption-1"].answers == ("A dog on a bench.", "a puppy rests")
    judge = found.askings["chair"].rule
    assert judge is not None and not found.askings["chair"].read and found.askings["caption"].rule is None
    assert judge("Two puppies and a coach", own["chair-1"]).part == 1
    (tmp_path / "synonyms.txt").unlink()
    judge = read("coco", tmp_path).askings["chair"].rule
    assert judge is not None and judge("Two puppies and a coach", own["chair-1"]).whole == 0, "without synonyms COCO's names alone"


def test_refcoco_reads_the_authors_pickle_and_runs_nothing_in_it(tmp_path: Path) -> None:
    WRITERS["refcoco"](tmp_path)
    found = by_id(read("refcoco", tmp_path))
    assert sorted(found) == ["1-0", "1-1"] and found["1-0"].task == "testA" and found["1-1"].phrase == "man in red"
    assert found["1-0"].answers == ("[0.1000, 0.1000, 0.6000, 0.6000]",)
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([Path("/tmp")]))
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p: not a pickle of plain values \(it calls pathlib"):
        read("refcoco", tmp_path)


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("reviews", {"Review: The Rock is new.": "positive", "Review: A bore.": "negative"}),
        ("sst2", {"Review: it 's a charming journey .": "positive", 'Review: unflinchingly "bleak" and desperate': "negative"}),
        ("mr", {"Review: a café of a film": "positive", "Review: simplistic , silly \x85 and tedious .": "negative"}),
        (
            "subj",
            {
                "Sentence: smart and alert .": "subjective",
                "Sentence: the movie begins in the past .": "objective",
            },
        ),
        ("sst5", {"Review: It works (well)": "good", "Review: Dull .": "terrible"}),
        ("trec", {"Question: How far is it from Denver to Aspen ?": "number", "Question: What county is Modesto in ?": "location"}),
        ("cb", {"He left.\nDoes it follow that he is gone?": "yes", "She may come.\nDoes it follow that she comes?": "maybe"}),
        ("boolq", {"Rain is wet.\nQuestion: is it wet?": "yes", "Rain is wet.\nQuestion: is it dry?": "no"}),
    ],
)
def test_texts_and_their_labels(tmp_path: Path, name: str, texts: dict[str, str]) -> None:
    WRITERS[name](tmp_path)
    assert {example.question: example.answers[0] for example in read(name, tmp_path, prompt="").examples} == texts


def test_arc_turns_numbers_into_letters(tmp_path: Path) -> None:
    WRITERS["arc"](tmp_path)
    found = by_id(read("arc", tmp_path))
    assert found["Mercury_1"].answers == ("C", "option C") and found["NYSEDREGENTS_2"].answers == ("B", "option 2")


@pytest.mark.parametrize(
    ("name", "number", "task", "question", "answers"),
    [
        ("mmlu", 3, "virology", "Which virus, if any?\nA. HIV\nB. HPV\nC. RSV\nD. HBV", ("B", "HPV")),
        ("aqua", 2, "choice", "How far?\nA. 5(3) km\nB. 6 km\nC. 7\nD. 8\nE. 9", ("E", "9")),
        ("mathqa", 2, "choice", "how many ?\nA. 1 , 200\nB. 27.5\nC. 30\nD. none\nE. rs . 4", ("A", "1 , 200")),
        ("logiqa", 2, "choice", "All A are B.\nWhich follows?\nA. Some A.\nB. No A.\nC. All B.\nD. None.", ("C", "All B.")),
        ("csqa", 1, "choice", "Where to?\nA. bank\nB. library\nC. shop\nD. mall\nE. york", ("A", "bank")),
        ("piqa", 2, "choice", "To dry\nA. rain.\nB. sun.", ("B", "sun.")),
    ],
)
def test_multiple_choice(tmp_path: Path, name: str, number: int, task: str, question: str, answers: tuple[str, str]) -> None:
    WRITERS[name](tmp_path)
    *_, last = examples = read(name, tmp_path).examples
    assert len(examples) == number and last.question.startswith(f"{question}\nAnswer with the option's letter")
    assert (last.task, last.answers) == (task, answers)


def test_a_letter_that_is_no_option_and_labels_that_are_missing_are_named(tmp_path: Path) -> None:
    for name in ("aqua", "piqa", "logiqa", "mmlu"):
        WRITERS[name](tmp_path / name)
    path = tmp_path / "aqua/test.json"
    path.write_text(path.read_text().replace('"correct": "E"', '"correct": "F"'))
    with pytest.raises(ValueError, match=r"test\.json, question 0: 'F' is none of its 5 options"):
        read("aqua", tmp_path / "aqua")
    (tmp_path / "piqa/valid-labels.lst").write_text("0\n")
    with pytest.raises(ValueError, match=r"valid-labels\.lst: 1 labels for 2 goals"):
        read("piqa", tmp_path / "piqa")
    with (tmp_path / "logiqa/Test.txt").open("a") as file:
        file.write("\na\n")
    with pytest.raises(ValueError, match="which are no blocks of eight"):
        read("logiqa", tmp_path / "logiqa")
    with (tmp_path / "mmlu/test/anatomy_test.csv").open("a") as file:
        file.write("What?,1,2,A\n")
    with pytest.raises(ValueError, match=r"anatomy_test\.csv, row 3: a question, four options and a letter"):
        read("mmlu", tmp_path / "mmlu")


def test_a_limit_draws_whole_images_and_the_seed_says_which(tmp_path: Path) -> None:
    examples = [Example(f"{image}-{k}", f"{image}.jpg", None, "?", ("a",), None, "t", "s") for image in range(50) for k in range(3)]
    one, other = drawn(examples, 10, 0), drawn(examples, 10, 1)
    assert len(one) == len(other) == 30 and one != other and drawn(examples, 10, 0) == one
    assert len({example.image for example in one}) == 10
    assert drawn(examples, 0, 0) == drawn(examples, 50, 0) == examples
    assert set(drawn(examples, 10, 0)) < set(drawn(examples, 20, 0)), "a higher limit adds images"


@pytest.mark.parametrize("number", [1, 2, 7])
def test_shards_share_out_the_images(number: int) -> None:
    examples = [Example(f"{image}-{k}", f"{image}.jpg", None, "?", ("a",), None, "t", "s") for image in range(20) for k in range(3)]
    shards = [of_shard(examples, place, number) for place in range(number)]
    assert sorted(chain(*shards), key=lambda e: e.id) == sorted(examples, key=lambda e: e.id)
    assert len({image for shard in shards for image in {e.image for e in shard}}) == sum(len({e.image for e in shard}) for shard in shards)


def test_a_test_split_without_answers_is_refused(tmp_path: Path) -> None:
    WRITERS["textvqa"](tmp_path)
    file = tmp_path / "TextVQA_0.5.1_val.json"
    content = json.loads(file.read_text())
    content["data"][0]["answers"] = []
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"1 questions have no answer, such as textvqa/34602; is it a test split\?"):
        read("textvqa", tmp_path)


def test_folders_that_are_nowhere_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset '.*nowhere': neither a folder, nor an id on the Hugging Face Hub"):
        read("gqa", tmp_path / "nowhere")
    WRITERS["gqa"](tmp_path)
    with pytest.raises(ValueError, match=r"images = .*: no such folder"):
        read("gqa", tmp_path, images=str(tmp_path / "none"))
    with pytest.raises(
        ValueError, match="benchmark gqa: no folder of its files; from the run's own data only pope, coco, grounding can be made"
    ):
        read_questions(replace(Source(name="gqa"), path=""), tmp_path)
