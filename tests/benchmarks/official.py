"""The benchmarks' official files with a few lines each, in the form in which they are published."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

from PIL import Image

TEN = ["red"] * 3 + ["dark red"] * 2 + ["maroon"] * 5


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (80, 60), "white").save(path)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def vqav2(folder: Path) -> None:
    asked = [{"image_id": 42 + i // 2, "question": f"What colour is it, {i}?", "question_id": 42000 + i} for i in range(4)]
    told = [
        {
            "question_id": 42000 + i,
            "image_id": 42 + i // 2,
            "question_type": "what color is the",
            "answer_type": ("other", "yes/no", "number", "other")[i],
            "multiple_choice_answer": "maroon",
            "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": n + 1} for n, answer in enumerate(TEN)],
        }
        for i in range(4)
    ]
    info = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {**info, "task_type": "Open-Ended", "questions": asked})
    write(folder / "v2_mscoco_val2014_annotations.json", {**info, "annotations": told})
    for number in (42, 43):
        picture(folder / f"val2014/COCO_val2014_{number:012d}.jpg")


def gqa(folder: Path) -> None:
    types = {"structural": "query", "semantic": "attr", "detailed": "color"}
    asked = {
        "201307251": {"question": "Is it overcast?", "imageId": "n161313", "answer": "no", "types": {**types, "structural": "verify"}},
        "201640614": {"question": "Who is wearing the dress?", "imageId": "n235859", "answer": "woman", "types": types},
    }
    write(folder / "testdev_balanced_questions.json", {i: {**q, "isBalanced": True, "fullAnswer": "..."} for i, q in asked.items()})
    for name in ("n161313", "n235859"):
        picture(folder / f"images/{name}.jpg")


def textvqa(folder: Path) -> None:
    one = {
        "question": "what is the brand?",
        "image_id": "003a8ae2ef43b901",
        "image_classes": ["Phone"],
        "question_id": 34602,
        "answers": TEN,
    }
    write(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_name": "textvqa", "data": [one], "dataset_version": "0.5.1"})
    picture(folder / "train_images/003a8ae2ef43b901.jpg")


def vizwiz(folder: Path) -> None:
    answers = [{"answer": answer, "answer_confidence": "yes"} for answer in TEN]
    one = {"image": "VizWiz_val_00000000.jpg", "question": "What is this?", "answers": answers, "answer_type": "other", "answerable": 1}
    write(folder / "val.json", [one])
    picture(folder / "val/VizWiz_val_00000000.jpg")


def scienceqa(folder: Path) -> None:
    same = {
        "task": "closed choice",
        "grade": "grade2",
        "topic": "biology",
        "category": "Animals",
        "skill": "",
        "lecture": "",
        "solution": "",
    }
    problems = {
        "4": {
            "question": "Which is a mammal?",
            "choices": ["shark", "bat"],
            "answer": 1,
            "hint": "Bats nurse.",
            "image": "image.png",
            "subject": "natural science",
            "split": "test",
            **same,
        },
        "5": {
            "question": "Which is a verb?",
            "choices": ["run", "red", "the"],
            "answer": 0,
            "hint": "",
            "image": None,
            "subject": "language science",
            "split": "test",
            **same,
        },
        "1": {
            "question": "Trained on?",
            "choices": ["a", "b"],
            "answer": 0,
            "hint": "",
            "image": None,
            "subject": "x",
            "split": "train",
            **same,
        },
    }
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"train": ["1"], "val": [], "test": ["4", "5"]})
    picture(folder / "images/test/4/image.png")


def pope(folder: Path) -> None:
    for setting in ("random", "popular", "adversarial"):
        lines = [
            {
                "question_id": n + 1,
                "image": f"COCO_val2014_{42 + n // 2:012d}.jpg",
                "text": f"Is there a {thing} in the image?",
                "label": label,
            }
            for n, (thing, label) in enumerate([("dog", "yes"), ("car", "no"), ("cat", "yes"), ("bus", "no")])
        ]
        write(folder / f"coco_pope_{setting}.json", "\n".join(map(json.dumps, lines)) + "\n")
    for number in (42, 43):
        picture(folder / f"val2014/COCO_val2014_{number:012d}.jpg")


def mme(folder: Path) -> None:
    for number in (1, 2):
        text = f"Is there {number} dog? Please answer yes or no.\tYes\nIs there {number + 1} dog? Please answer yes or no.\tNo\n"
        write(folder / f"count/{number}.txt", text)
        picture(folder / f"count/{number}.jpg")
    write(folder / "posters/questions_answers_YN/tt01.txt", "Is this movie old? Please answer yes or no.\tNo\nIs it new?\tYes")
    picture(folder / "posters/images/tt01.png")


def coco(folder: Path) -> None:
    images = [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg", "width": 80, "height": 60, "license": 1} for n in (1, 2)]
    captions = [(1, "A dog on a bench."), (1, "a puppy rests"), (2, "Two buses")]
    told = [{"image_id": image, "id": n, "caption": text} for n, (image, text) in enumerate(captions)]
    boxes = [(1, 18, [0, 0, 40, 30]), (2, 6, [10, 10, 20, 20])]
    drawn = [{"id": n, "image_id": image, "category_id": kind, "bbox": box, "area": 9} for n, (image, kind, box) in enumerate(boxes)]
    kinds = [{"id": 18, "name": "dog"}, {"id": 6, "name": "bus"}, {"id": 15, "name": "bench"}]
    write(folder / "annotations/captions_val2014.json", {"info": {}, "licenses": [], "images": images, "annotations": told})
    write(folder / "annotations/instances_val2014.json", {"info": {}, "images": images, "annotations": drawn, "categories": kinds})
    write(folder / "synonyms.txt", "dog, puppy\nbus, coach\nbench\n")
    for image in images:
        picture(folder / f"val2014/{image['file_name']}")


def grounding(folder: Path) -> None:
    refcoco(folder)


def refcoco(folder: Path) -> None:
    image = {"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "width": 80, "height": 60}
    instance = {"id": 70, "image_id": 7, "category_id": 1, "bbox": [8, 6, 40, 30], "area": 1200, "iscrowd": 0}
    write(folder / "instances.json", {"images": [image], "annotations": [instance], "categories": [{"id": 1, "name": "person"}]})
    sentences = [{"tokens": ["left", "man"], "raw": "Left man", "sent_id": 1, "sent": "left man"}, {"sent_id": 2, "sent": "man in red"}]
    same = {"ann_id": 70, "image_id": 7, "category_id": 1, "file_name": "COCO_train2014_000000000007_70.jpg", "sentences": sentences}
    references = [{"ref_id": 1, "split": "testA", **same}, {"ref_id": 2, "split": "train", **same}]
    (folder / "refs(unc).p").write_bytes(pickle.dumps(references, protocol=0))
    picture(folder / "train2014/COCO_train2014_000000000007.jpg")


def sst2(folder: Path) -> None:
    write(folder / "dev.tsv", 'sentence\tlabel\nit \'s a charming journey .\t1\nunflinchingly "bleak" and desperate\t0\n')


def reviews(folder: Path) -> None:
    write(folder / "movieReviewSnippets_GroundTruth.txt", "1\t2.27\tThe Rock is new.\n2\t-0.6\ttoo tepid\n3\t-1.5\tA bore.\n")


def mr(folder: Path) -> None:
    (folder / "rt-polarity.pos").write_bytes("a caf\xe9 of a film\n".encode("latin-1"))
    (folder / "rt-polarity.neg").write_bytes(b"simplistic , silly \x85 and tedious .\n")


def subj(folder: Path) -> None:
    (folder / "quote.tok.gt9.5000").write_bytes(b"smart and alert .\n")
    (folder / "plot.tok.gt9.5000").write_bytes(b"the movie begins in the past .\n")


def sst5(folder: Path) -> None:
    write(folder / "trees/test.txt", "(3 (2 It) (4 (2 works) (2 -LRB-well-RRB-)))\n(0 (1 Dull) (2 .))\n")


def trec(folder: Path) -> None:
    (folder / "TREC_10.label").write_bytes(b"NUM:dist How far is it from Denver to Aspen ?\nLOC:city What county is Modesto in ?\n")


def cb(folder: Path) -> None:
    lines = [
        {"premise": "He left.", "hypothesis": "he is gone", "label": "entailment", "idx": 0},
        {"premise": "She may come.", "hypothesis": "she comes.", "label": "neutral", "idx": 1},
    ]
    write(folder / "val.jsonl", "\n".join(map(json.dumps, lines)))


def boolq(folder: Path) -> None:
    lines = [
        {"question": "is it wet", "title": "Rain", "answer": True, "passage": "Rain is wet."},
        {"question": "is it dry?", "title": "Rain", "answer": False, "passage": "Rain is wet."},
    ]
    write(folder / "dev.jsonl", "\n".join(map(json.dumps, lines)))


def arc(folder: Path) -> None:
    def line(name: str, labels: str, key: str) -> str:
        choices = [{"text": f"option {label}", "label": label} for label in labels]
        return json.dumps({"id": name, "question": {"stem": "Why?", "choices": choices}, "answerKey": key})

    write(folder / "ARC-Challenge-Test.jsonl", f"{line('Mercury_1', 'ABCD', 'C')}\n{line('NYSEDREGENTS_2', '1234', '2')}\n")


def csqa(folder: Path) -> None:
    choices = [{"label": label, "text": text} for label, text in zip("ABCDE", ("bank", "library", "shop", "mall", "york"), strict=True)]
    line = {"answerKey": "A", "id": "075e483d", "question": {"question_concept": "door", "choices": choices, "stem": "Where to?"}}
    write(folder / "dev_rand_split.jsonl", json.dumps(line))


def mmlu(folder: Path) -> None:
    write(
        folder / "test/anatomy_test.csv", 'A lesion of the facial nerve?,"paralysis, of all",of taste,of tears,none,A\nWhich?,1,2,3,4,D\n'
    )
    write(folder / "test/virology_test.csv", '"Which virus, if any?",HIV,HPV,RSV,HBV,B\n')


def aqua(folder: Path) -> None:
    lines = [{"question": "How far?", "options": ["A)5(3) km", "B)6 km", "C)7", "D)8", "E)9"], "rationale": "So E.", "correct": "E"}] * 2
    write(folder / "test.json", "\n".join(map(json.dumps, lines)))


def mathqa(folder: Path) -> None:
    problem = {
        "Problem": "how many ?",
        "Rationale": "x",
        "options": "a ) 1 , 200 , b ) 27.5 , c ) 30 , d ) none , e ) rs . 4",
        "correct": "d",
    }
    write(folder / "test.json", json.dumps([problem, {**problem, "correct": "a"}]))


def logiqa(folder: Path) -> None:
    block = "\nc\nAll A are B.\nWhich follows?\nA.Some A.\nB.No A.\nC.All B.\nD.None.\n"
    write(folder / "Test.txt", block * 2)


def piqa(folder: Path) -> None:
    lines = [{"goal": "To boil water", "sol1": "heat it.", "sol2": "cool it."}, {"goal": "To dry", "sol1": "rain.", "sol2": "sun."}]
    write(folder / "valid.jsonl", "\n".join(map(json.dumps, lines)))
    write(folder / "valid-labels.lst", "0\n1\n")


WRITERS: dict[str, Callable[[Path], None]] = {
    function.__name__: function
    for function in (
        vqav2,
        gqa,
        textvqa,
        vizwiz,
        scienceqa,
        pope,
        mme,
        coco,
        refcoco,
        grounding,
        sst2,
        mr,
        reviews,
        subj,
        sst5,
        trec,
        cb,
        boolq,
        arc,
        mmlu,
        aqua,
        mathqa,
        logiqa,
        csqa,
        piqa,
    )
}
