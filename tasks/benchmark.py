"""The benchmark step, one shard of it: a benchmark's files, data/adapters/ARM -> data/benchmarks/NAME/ARM/shard=NN.

Run it with `python -m tasks.benchmark --name pope --arm top --shard 0`.
"""

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import polars as pl
from pydantic import TypeAdapter

from headwise.attention.proof import proved
from headwise.benchmarks.benchmark import Source, of_shard
from headwise.benchmarks.registry import BENCHMARKS, files_digest, read_questions
from headwise.evaluation.conditions import library_versions
from headwise.evaluation.grounding import ground
from headwise.evaluation.judgement import Questions
from headwise.evaluation.responses import Responses
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.table import BASE
from headwise.examples import INDEX, OBJECTS_FILE, Example, read_examples
from headwise.harness.request import IMAGES as ASKED_IMAGES
from headwise.harness.request import Request, ask_harness
from headwise.leakage import CALIBRATION, check_leaks, check_text_leaks, fingerprints, leaks
from headwise.observation import Observation
from headwise.vlm import VLM, revision
from tasks.asking import Asked, adapter_of, save_answers, write_answers
from tasks.command import plain_errors, read_settings, shard_place

IMAGES, OUTPUT = Path("data/images"), Path("data/benchmarks")


def write_benchmark(
    source: Source, own: Path, adapter: Path | None, output: Path, observed: Observation, settings: Evaluation, shard: tuple[int, int]
) -> None:
    """Write the answers to the questions about every n-th image of the benchmark, or where the model looks; shard: the place to begin, n.

    own: the run's own data. Raises ValueError if the benchmark's files are missing or broken, the shard has no question, or an image of it
    is one to calibrate with.
    """
    place, number = shard
    found = read_questions(source, own)
    questions = replace(found, examples=of_shard(found.examples, place, number))
    if not questions.examples:
        few = f"{len(found.examples)} questions are too few for {number} shards"
        raise ValueError(f"benchmark {source.name!r}: {few}; set fewer `shards`, or a higher limit")
    _check_leaks(source, own, questions.images, questions.examples)
    benchmark = BENCHMARKS[source.name]
    settings = replace(settings, max_new_tokens=benchmark.max_new_tokens or settings.max_new_tokens)
    asked = _asked(source, own, output, shard, {"protocol": benchmark.protocol, "questions": len(found.examples)})
    if questions.mask:
        write_answers(output, observed, adapter, questions, settings, asked, _look, partial(_prove, observed.model))
    else:
        write_answers(output, observed, adapter, questions, settings, asked)


def write_harnessed(
    source: Source, own: Path, adapter: Path | None, output: Path, observed: Observation, settings: Evaluation, shard: tuple[int, int]
) -> None:
    """Write what lmms-eval makes of the answers to every n-th question of its task; shard: the place to begin, n.

    Raises ValueError if lmms-eval fails, does not judge every single question, or asks about an image to calibrate with.
    """
    assert source.harnessed is not None
    request = Request(
        split=source.name,
        task=source.harnessed,
        folder=source.path,
        model=observed.model,
        adapter=str(adapter) if adapter else None,
        dtype=observed.dtype,
        batch_size=settings.batch_size,
        limit=source.limit,
        seed=source.seed,
        shard=shard[0],
        num_shards=shard[1],
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent) as temporary:
        found = ask_harness(request, Path(temporary), lambda line: print(line, flush=True))
        rows = found.answers.filter(pl.col("image") != pl.col("example_id")).iter_rows(named=True)
        shown = [Example(row["example_id"], row["image"], None, "", (), None, row["task"], source.name) for row in rows]
        _check_leaks(source, own, Path(temporary) / ASKED_IMAGES, shown)
    protocol = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    asked = _asked(source, own, output, shard, {"protocol": protocol, "lmms_eval": found.figures})
    made = {"model": revision(observed.model), "dtype": found.dtype, "versions": library_versions(), "asked": found.documents}
    save_answers(output, found.answers, {}, adapter, settings, asked, made)


def _prove(model: str, vlm: VLM) -> None:
    figures = proved(vlm, revision(model))
    print("proved:", ", ".join(f"{name} {figure:.1e}" for name, figure in figures.items()), flush=True)


def _look(
    vlm: VLM, questions: Questions, settings: Evaluation, _: Responses, progress: Callable[[int, int], object]
) -> tuple[pl.DataFrame, dict[str, str]]:
    return ground(vlm, questions, settings, progress)


def _asked(source: Source, own: Path, output: Path, shard: tuple[int, int], more: dict[str, object]) -> Asked:
    place, number = shard
    made_here = not source.path and not source.harnessed
    inputs = {"index": own / INDEX, "objects": own / OBJECTS_FILE} if made_here else {"files": files_digest(source)}
    extra = {"source": TypeAdapter(Source).dump_python(source, mode="json"), **more, "shard": place, "shards": number}
    return Asked("benchmark", f"{source.name}, {output.parent.name}, shard {place}", inputs, extra)


def _check_leaks(source: Source, own: Path, folder: Path, examples: Sequence[Example]) -> None:
    if (own / INDEX).is_file():
        calibration = [example for example in read_examples(own) if example.split == CALIBRATION]
        where = f"of the benchmark {source.name}"
        check_text_leaks(calibration, examples, where)
        check_leaks(leaks(fingerprints(own, calibration), fingerprints(folder, examples), source.min_distance), where)


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask the model with the adapter of the arm that the command line names a shard of a benchmark."""
    parser = ArgumentParser(prog="python -m tasks.benchmark", description=__doc__)
    parser.add_argument("--name", required=True, help="one of params.yaml's `benchmarks`")
    parser.add_argument("--arm", required=True, help=f"whose adapter; {BASE}: none")
    parser.add_argument("--shard", type=int, required=True, help="one of params.yaml's `shards`")
    given = parser.parse_args(arguments)
    source = read_settings(f"benchmarks.{given.name}", Source)
    output = OUTPUT / given.name / given.arm / f"shard={given.shard:02d}"
    observed, settings = read_settings("attention", Observation), read_settings("evaluation", Evaluation)
    write = write_harnessed if source.harnessed else write_benchmark
    write(source, IMAGES, adapter_of(given.arm), output, observed, settings, shard_place(given.shard))


if __name__ == "__main__":
    with plain_errors():
        main()
