"""Ask a task of lmms-eval, inside its environment: `python -m headwise.harness.run REQUEST OUTPUT`, REQUEST a `Request` as JSON."""

import json
import random
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lmms_eval.api.task import Task  # pyright: ignore[reportMissingImports]
from lmms_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]
from lmms_eval.tasks import TaskManager, get_task_dict  # pyright: ignore[reportMissingImports]

from headwise.harness.plugin import Headwise
from headwise.harness.request import IMAGES, RESULTS, SAMPLES, Request


def run(request: Request, output: Path) -> None:
    """Write the samples, the figures and the images. Raises ValueError if there is no such task, or it did not answer for each document."""
    manager = TaskManager("ERROR", include_path=request.folder or None, model_name="headwise")
    if request.task not in manager.all_tasks:
        raise ValueError(
            f"lmms-eval has no task {request.task!r}" + (f", and none is defined in {request.folder}" if request.folder else "")
        )
    tasks = list(_leaves(get_task_dict([request.task], manager)))
    documents = {task.config.task: _draw(task, request) for task in tasks}
    if not any(documents.values()):
        raise ValueError(
            f"{request.task}: its documents are too few for {request.num_shards} shards; set fewer `shards`, or a higher limit"
        )
    (output / IMAGES).mkdir()
    model = Headwise(
        request.model,
        request.adapter or "",
        request.dtype,
        batch_size=request.batch_size,
        images=str(output / IMAGES),
        progress=lambda done, total: print(f"{request.split}, shard {request.shard}: {done} of {total}", flush=True),
    )
    asked = [task for task in tasks if documents[task.config.task]]
    found = simple_evaluate(model=model, tasks=asked, task_manager=manager, bootstrap_iters=0, verbosity="ERROR")
    samples = [sample for task in asked for sample in _samples(task, documents[task.config.task], found, model)]
    judged = {task.config.task: sorted({str(s["metric"]) for s in samples if s["task"] == task.config.task}) for task in asked}
    versions = {
        "lmms_eval": version("lmms_eval"),
        **{f"task {name}": f"{found['versions'][name]} by {' and '.join(metrics)}" for name, metrics in judged.items()},
    }
    (output / SAMPLES).write_text(json.dumps(samples), encoding="utf-8")
    results = {"figures": _numbers(found["results"]), "versions": versions, "dtype": str(model.vlm.dtype)}
    (output / RESULTS).write_text(json.dumps(results), encoding="utf-8")


def _leaves(tasks: Mapping[Any, Any]) -> Iterator[Task]:
    for task in tasks.values():
        if isinstance(task, Mapping):
            yield from _leaves(task)
        else:
            yield task


def _draw(task: Task, request: Request) -> list[int]:
    """The places of the documents that the shard asks, in the task's own order; the task then holds these alone."""
    split = task.config.test_split if task.has_test_docs() else task.config.validation_split
    number = len(task.dataset[split])
    places = list(range(number))
    if request.limit and request.limit < number:
        places = sorted(random.Random(request.seed).sample(places, request.limit))
    places = places[request.shard :: request.num_shards]
    for documents in {id(found): found for found in (task.dataset, task.dataset_no_image)}.values():  # one and the same in some tasks
        documents[split] = documents[split].select(places)
    task.task_docs = task.eval_docs  # what filters read beside the answers
    return places


def _samples(task: Task, places: list[int], found: Mapping[str, Any], model: Headwise) -> list[dict[str, Any]]:
    """One per document, judged by the first of the task's metrics that gives single documents a number. Raises ValueError if one lacks."""
    name, metrics = task.config.task, list(task._metric_fn_list)
    if falling := [metric for metric in metrics if not task._higher_is_better.get(metric, True)]:
        raise ValueError(f"{name}: {falling[0]} is better where it is lower, which a share of right answers is not")
    logged: dict[int, dict[str, Any]] = {}
    for sample in found["samples"][name]:
        logged.setdefault(sample["doc_id"], sample)  # of several filters the first
    if lacking := sorted(set(range(len(places))) - logged.keys()):
        raise ValueError(f"{name}: {len(lacking)} of {len(places)} documents were not judged, such as document {places[lacking[0]]}")
    samples = []
    for number, place in enumerate(places):
        sample = logged[number]
        figures = {metric: value for metric in metrics if (value := _number(sample.get(metric))) is not None}
        metric = next(iter(figures), None)
        samples.append(
            {
                "task": name,
                "document": place,
                "image": model.image_names.get((name, number)),
                "content": sample["doc_hash"],
                "answer": _said(sample["filtered_resps"]),
                "metrics": metrics,
                "metric": metric,
                "right": figures[metric] if metric else None,
            }
        )
    return samples


def _said(responses: list[Any]) -> str:
    """The answer, or the place of the choice with the least nats."""
    if responses and not isinstance(responses[0], str) and len(responses[0]) == 2:
        return str(min(range(len(responses)), key=lambda place: responses[place][0]))
    return str(responses[0]) if responses else ""


def _number(value: Any) -> float | None:
    """What a metric gives a single document: a number, or a record with the number as its `score`."""
    if isinstance(value, Mapping):
        value = value.get("score")
    return float(value) if isinstance(value, bool | int | float) else None


def _numbers(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """lmms-eval's own figures of each task."""
    return {task: {name: value for name, value in own.items() if isinstance(value, int | float)} for task, own in results.items()}


if __name__ == "__main__":
    run(Request(**json.loads(sys.argv[1])), Path(sys.argv[2]))
