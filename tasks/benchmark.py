"""The benchmark step, one shard of it: a benchmark's files, data/adapters/ARM -> data/benchmarks/NAME/ARM/shard=NN.

Run it with `python -m tasks.benchmark --name pope --arm top --shard 0`.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from pydantic import TypeAdapter

from headwise.benchmarks.benchmark import Source, of_shard
from headwise.benchmarks.registry import BENCHMARKS, files_digest, read_questions
from headwise.evaluation.settings import Evaluation
from headwise.evaluation.table import BASE, CHAMPION
from headwise.examples import INDEX, OBJECTS_FILE, read_examples
from headwise.leakage import CALIBRATION, check_leaks, fingerprints, leaks
from headwise.observation import Observation
from headwise.selection import Arm
from tasks.asking import adapter_of, write_answers
from tasks.command import plain_errors, read_settings, shard_place

IMAGES, OUTPUT = Path("data/images"), Path("data/benchmarks")


def write_benchmark(
    source: Source, own: Path, adapter: Path | None, output: Path, observed: Observation, settings: Evaluation, shard: tuple[int, int]
) -> None:
    """Write the answers to the questions about every n-th image of the benchmark, as `write_answers` does; shard: the place to begin, n.

    own: the run's own data. Raises ValueError if the benchmark's files are missing or broken, the shard has no question, or an image of it
    is one to calibrate with.
    """
    found = read_questions(source, own)
    examples = of_shard(found.examples, *shard)
    if not examples:
        few = f"{len(found.examples)} questions are too few for {shard[1]} shards"
        raise ValueError(f"benchmark {source.name!r}: {few}; set fewer `shards`, or a higher limit")
    if (own / INDEX).is_file():
        calibration = fingerprints(own, [example for example in read_examples(own) if example.split == CALIBRATION])
        check_leaks(leaks(calibration, fingerprints(found.images, examples), source.min_distance), f"of the benchmark {source.name}")
    place, number = shard
    files = {"files": files_digest(source)} if source.path else {"index": own / INDEX, "objects": own / OBJECTS_FILE}
    write_answers(
        output,
        observed,
        adapter,
        found.images,
        examples,
        found.askings,
        settings,
        stage="benchmark",
        title=f"{source.name}, {output.parent.name}, shard {place}",
        inputs=files,
        extra={
            "source": TypeAdapter(Source).dump_python(source, mode="json"),
            "protocol": BENCHMARKS[source.name].protocol,
            "questions": len(found.examples),
            "shard": place,
            "shards": number,
        },
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask the model with the adapter of the arm that the command line names a shard of a benchmark."""
    parser = ArgumentParser(prog="python -m tasks.benchmark", description=__doc__)
    parser.add_argument("--name", choices=list(BENCHMARKS), required=True)
    parser.add_argument("--arm", choices=[BASE, CHAMPION, *get_args(Arm)], required=True, help=f"whose adapter; {BASE}: none")
    parser.add_argument("--shard", type=int, required=True, help="one of params.yaml's `shards`")
    given = parser.parse_args(arguments)
    source = read_settings(f"benchmarks.{given.name}", Source)
    output = OUTPUT / given.name / given.arm / f"shard={given.shard:02d}"
    observed, settings = read_settings("attention", Observation), read_settings("evaluation", Evaluation)
    write_benchmark(source, IMAGES, adapter_of(given.arm), output, observed, settings, shard_place(given.shard))


if __name__ == "__main__":
    with plain_errors():
        main()
