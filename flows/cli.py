"""The `headwise` command: the same typed parameters as the flows, errors as one line.

Torch, Prefect and MLflow are imported by the commands that need them, so that help and mistakes are answered at once.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from flows.console import console, plain_errors, print_table, show_result
from headwise.observation import EMBEDDED, EMBEDDED_TEXT

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Find the attention heads that look where the question points, and recalibrate a vision-language model through them.",
)
MAX_BAD = 20
CHOSEN = ("images.kind", "images.variant", "selection.seed", "calibration.seed")
"""What `headwise controls` sets in each of its cells."""
SEEDED = ("images.kind", "images.variant", "profile.seed", "profile.pairs", "rah_lora.seed")
"""What `headwise ablations` sets in each of its cells."""

DRAWN = ("zerotuning.seed", "evaluation.closed")
"""What `headwise steering` sets in each of its cells."""

DataOption = Annotated[str, typer.Option(help="`scenes` (drawn), `photos` (composed photographs), or a folder of your own.")]
ModelOption = Annotated[
    str, typer.Option(help="`headwise-smol`, `smollm2-135m-instruct` (text alone), a transformers folder, or a Hub id.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="A field of a section of params.yaml; repeat it."),
]
BenchmarkOption = Annotated[
    list[str] | None,
    typer.Option(
        "--benchmark",
        metavar="NAME[=FOLDER][,FIELD=VALUE]",
        help="A benchmark to ask every model, from the folder of its official files (`pope`, `coco`, `grounding` from the run's own data "
        "too); `lmms-TASK` is a task of lmms-eval; repeat it. Fields: images, limit, seed, and last prompt; see `headwise benchmarks`.",
    ),
]
RunOption = Annotated[str | None, typer.Option("--run", help="The run's name; the latest one if left out.")]


@app.command()
def run(
    data: DataOption = "scenes",
    model: ModelOption = EMBEDDED,
    arms: Annotated[
        str,
        typer.Option(
            help="How to calibrate: a LoRA on the `top`, `bottom`, `random` or `all` layers, RAH-LoRA (`rah`) and its controls (`headwise "
            "ablations`), or ZeroTuning (`zero`) and its (`headwise steering`); the first arm is the candidate, the others its controls."
        ),
    ] = "top,bottom",
    settings: SetOption = None,
    benchmarks: BenchmarkOption = None,
    name: Annotated[
        str | None,
        typer.Option(help="The run's workspace, called after the data if left out; the same name again recomputes only what changed."),
    ] = None,
) -> None:
    """Images, masks, attention, scores, selection, calibration, evaluation, promotion: the whole night in one go.

    Examples:

    - `headwise run`
    - `headwise run --data photos --arms top,bottom,random`
    - `headwise run --data ~/pictures --model ~/models/my-vlm --name mine`
    - `headwise run --set selection.k=6 --set calibration.steps=200`
    - `headwise run --benchmark pope --benchmark gqa=~/gqa,limit=500`
    - `headwise run --benchmark lmms-mmbench_en_dev,limit=500 --benchmark lmms-mine=~/my-task`
    """
    with plain_errors():
        from flows.arguments import read_arguments

        night = read_arguments(data, model, arms, settings, name, benchmarks)
        night.as_params()  # whatever is nowhere is named before any run exists
        ready = _servers()
        from flows.nightly import Result, nightly
        from flows.terminal import without_tracebacks

        ready()
        with without_tracebacks():
            result = nightly(night)
            assert isinstance(result, Result)
        show_result(result)


@app.command()
def annotate(
    data: DataOption = "scenes",
    settings: SetOption = None,
    name: Annotated[str | None, typer.Option(help="The workspace will be masks-NAME; called after the data if left out.")] = None,
) -> None:
    """The masks of the calibration split alone: the data's own, or boxes by Florence-2 and masks in them by SAM 2, and a page of pictures.

    Data without masks of their own get them made; those of data that have some are made anew by `masks.source=generated`, and compared.
    The models are folders or ids on the Hugging Face Hub.

    Examples:

    - `headwise annotate --data ~/pictures`
    - `headwise annotate --data photos --set masks.source=generated`
    - `headwise annotate --data ~/pictures --set masks.grounding.model=~/models/florence-2 --set masks.segmentation.model=~/models/sam2`
    """
    with plain_errors():
        from flows.arguments import read_arguments

        if others := [pair for pair in settings or () if not pair.startswith(("images.", "masks."))]:
            raise ValueError(f"--set {others[0]}: here only fields of images and of masks matter")
        parameters = read_arguments(data, EMBEDDED, "top", settings, name)
        parameters.as_params()
        ready = _servers()
        from flows.annotate import Annotation, Annotations
        from flows.annotate import annotate as annotate_flow
        from flows.terminal import without_tracebacks

        annotation = Annotation(images=parameters.images, masks=parameters.masks, shards=parameters.shards, name=parameters.name)
        ready()
        with without_tracebacks():
            result = annotate_flow(annotation)
            assert isinstance(result, Annotations)
        for title, rows in (("Masks", result.states), ("Key masks against the data's own", result.agreement)):
            if rows:
                print_table(title, tuple(rows[0]), [tuple(map(str, row.values())) for row in rows])
        console().print(f"recomputed: {', '.join(result.recomputed) or 'nothing'}", markup=False, highlight=False)
        console().print(f"report: {result.report}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def controls(
    data: Annotated[str, typer.Option(help="The data sets, in their drift variant.")] = "scenes,photos",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds.")] = 3,
    arms: Annotated[str, typer.Option(help="The arms to compare.")] = "top,bottom,random,all",
    model: ModelOption = EMBEDDED,
    settings: SetOption = None,
) -> None:
    """The paper's question: does it matter which layers are calibrated? Takes hours; stop it and start it again as you like.

    Examples:

    - `headwise controls`
    - `headwise controls --data scenes --seeds 1`
    """
    with plain_errors():
        from flows.arguments import read_arguments, read_kinds, refuse

        refuse(settings or (), CHOSEN, "the controls choose it themselves; see --data and --seeds")
        kinds = read_kinds(data)
        parameters = read_arguments(kinds[0], model, arms, settings)
        parameters.as_params()
        ready = _servers()
        from flows.controls import controls as controls_flow
        from flows.terminal import without_tracebacks

        ready()
        with without_tracebacks():
            page = controls_flow(settings=parameters, data=kinds, seeds=tuple(range(seeds)))
        console().print(page.read_text(encoding="utf-8"), markup=False)
        console().print(f"{page}", soft_wrap=True)


@app.command()
def ablations(
    data: Annotated[str, typer.Option(help="The data sets, in their drift variant; the first gets every arm.")] = "scenes,photos",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds for the main controls.")] = 5,
    arms: Annotated[str | None, typer.Option(help="The arms to compare; every control and ablation of the paper if left out.")] = None,
    model: ModelOption = EMBEDDED,
    settings: SetOption = None,
) -> None:
    """RAH-LoRA's controls and ablations: which heads, from which others, how far? Takes hours; stop it and start it again as you like.

    The arms are `rah` and `rah-` with: `without-caf` (any flow), `random` (as many targets at random), `inverse` (heads with a high I-SAL
    and a high flow), `signed-caf` (the paper's equation with its sign), `one-anchor`, `without-maps`, `without-weights` (likeness by the
    other alone), `output-only` (the anchors' output projections as they are), `aligned-weights` (aligned on all inputs alike), `damped`
    (targets learn nothing and are turned down), `rank-R` (4, 16, 32, full), `percentiles-I-C`, `middle-layers`, `upper-layers`,
    `all-layers` (by default the lower half is calibrated), and, in hundredths, `alpha-A` (longer first steps), `greedy-D` (a step for each
    target within a divergence of D) and `far-D` (greedy, with steps up to 1).

    Examples:

    - `headwise ablations`
    - `headwise ablations --data scenes --seeds 1 --arms rah,rah-random,rah-inverse`
    """
    with plain_errors():
        from flows.arguments import read_arguments, read_kinds, refuse
        from headwise.arms import HEAD_ARMS, known_head_arm

        refuse(settings or (), SEEDED, "the ablations choose it themselves; see --data and --seeds")
        kinds = read_kinds(data)
        parameters = read_arguments(kinds[0], model, arms or ",".join(HEAD_ARMS), settings)
        for arm in parameters.arms:
            known_head_arm(arm)
        parameters.as_params()
        ready = _servers()
        from flows.ablations import FIRST_SEED, FULL
        from flows.ablations import ablations as ablations_flow
        from flows.terminal import without_tracebacks

        ready()
        with without_tracebacks():
            seeded = tuple(range(FIRST_SEED, FIRST_SEED + seeds))
            page = ablations_flow(settings=replace(parameters, measured=(FULL,)), data=kinds, seeds=seeded)
        console().print(page.read_text(encoding="utf-8"), markup=False)
        console().print(f"{page}", soft_wrap=True)


@app.command()
def steering(
    data: Annotated[str, typer.Option(help="A text benchmark (`reviews`, or NAME=FOLDER), `scenes`, `photos`, or a folder.")] = "reviews",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds of the calibration examples.")] = 5,
    arms: Annotated[str | None, typer.Option(help="The arms to compare; ZeroTuning and all that it has to beat if left out.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="As for `run`; the embedded one if left out, for texts that for text alone, asked without its chat template."),
    ] = None,
    settings: SetOption = None,
) -> None:
    """ZeroTuning against its controls on closed questions: is scaling the attention to the first token a gain? Takes hours; resumable.

    1,000 texts are there to draw the calibration examples from and 1,200 are held out, in float32; `--set` says otherwise.

    Examples:

    - `headwise steering`
    - `headwise steering --data sst2=~/glue/SST-2 --arms zero,label-bias --seeds 3 --set images.calibration=300 --set images.evaluation=500`
    - `headwise steering --data scenes --arms zero,label-bias,temperature`
    """
    with plain_errors():
        from flows.arguments import is_text, read_arguments, refuse, steering_settings
        from headwise.arms import STEERING_ARMS

        refuse(settings or (), DRAWN, "the comparison sets it itself; see --seeds")
        named = model or (EMBEDDED_TEXT if is_text(data) else EMBEDDED)
        chosen = [*steering_settings(data, named), *(settings or ())]
        parameters = read_arguments(data, named, arms or ",".join(STEERING_ARMS), chosen)
        parameters.as_params()
        ready = _servers()
        from flows.steering import FIRST_SEED
        from flows.steering import steering as steering_flow
        from flows.terminal import without_tracebacks

        ready()
        with without_tracebacks():
            page = steering_flow(settings=parameters, seeds=tuple(range(FIRST_SEED, FIRST_SEED + seeds)))
        console().print(page.read_text(encoding="utf-8"), markup=False)
        console().print(f"{page}", soft_wrap=True)


@app.command()
def heads(
    name: RunOption = None,
    statistic: Annotated[
        str | None, typer.Option(help="One of the statistics of heads.parquet; `head_impact`, or `isal` of a run of RAH-LoRA alone.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many heads to list.")] = 20,
    png: Annotated[Path | None, typer.Option(help="Also draw the layer-by-head heat map into this file.")] = None,
) -> None:
    """The heads of a run, best first, and their heat map.

    Examples:

    - `headwise heads`
    - `headwise heads --run photos --statistic visual_mass --png heads.png`
    """
    with plain_errors():
        from flows.inspection import best_heads, draw_heat_map

        columns, rows = best_heads(name, statistic, top)
        print_table(f"{columns[2]}, best {len(rows)} heads", columns, rows)
        if png is not None:
            console().print(f"heat map: {draw_heat_map(name, statistic, png)}", soft_wrap=True)


@app.command()
def report(
    name: RunOption = None,
    out: Annotated[Path | None, typer.Option(help="Where to write the page; the run's own folder if left out.")] = None,
) -> None:
    """Write the static HTML report of a run and print where it is.

    Examples:

    - `headwise report`
    - `headwise report --run photos --out /tmp/photos-report`
    """
    with plain_errors():
        from flows.inspection import write_run_report

        console().print(f"{write_run_report(name, out)}", soft_wrap=True)


@app.command()
def export(
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    name: RunOption = None,
    arm: Annotated[str, typer.Option(help="Whose adapter.")] = "top",
) -> None:
    """Write a run's model with an adapter merged into its weights, as a plain transformers folder for software that knows no adapters.

    Examples:

    - `headwise export ~/models/calibrated`
    - `headwise export ~/models/calibrated --run photos --arm random`
    """
    with plain_errors():
        from flows.inspection import export_run

        console().print(f"{export_run(name, arm, out)}", soft_wrap=True)


@app.command()
def data(
    what: Annotated[str, typer.Argument(help="`scenes`, `photos`, or a folder of your own.")] = "scenes",
    settings: SetOption = None,
) -> None:
    """Try out a data set: build it aside with its masks, show its splits, tasks and unusable examples. Nothing is kept.

    A folder of your own holds images and an `index.jsonl` with a line per question, or `index.parquet` with the same columns:

    `{"image": "cat.jpg", "question": "What is this?", "answers": ["a cat"]}`

    Optional: `id`; `phrase` (the object that the answer is about); `task` (`caption` for descriptions: their perplexity is the target;
    any other name groups closed questions); `split` (`calibration`, `evaluation`, `forgetting`; else shared out by image).

    Exact masks of its objects, where there are any, are `objects.parquet`, a row per object: `image` (as in the index), `object` (int32,
    from 0), `phrase` (as in the index, for a caption every object counts), `height` and `width` (int32, of the image), and `rle` (text),
    which pycocotools gives:

    `pycocotools.mask.encode(numpy.asfortranarray(mask.astype("uint8")))["counts"].decode()`

    or COCO's `instances.json` (images by `file_name` as in the index), and beside it, if you like, RefCOCO's expressions as `refs.json`.
    Where there are none of these, Florence-2 and SAM 2 make the masks: see `headwise annotate`.

    Examples:

    - `headwise data scenes`
    - `headwise data ~/pictures`
    """
    with plain_errors():
        from flows.arguments import read_arguments
        from flows.inspection import try_data
        from tasks.progress import progress_bar

        parameters = read_arguments(what, EMBEDDED, "top", settings)
        with progress_bar("images") as progress:
            trial = try_data(parameters, progress)
        print_table(f"{what}: examples by split and task", trial.columns, trial.rows)
        for example_id, reason in sorted(trial.bad.items())[:MAX_BAD]:
            console().print(f"left out: {example_id}: {reason}", markup=False, soft_wrap=True)
        if len(trial.bad) > MAX_BAD:
            console().print(f"left out: {len(trial.bad) - MAX_BAD} more")
        for split, gain in trial.detectable.items():
            console().print(
                f"{split}: shows a gain of {100 * gain:.1f} points of accuracy four times out of five, if a tenth of the answers change"
            )
        for reason in trial.shortfalls:
            console().print(f"no adapter can become champion: {reason}", markup=False, soft_wrap=True)
        for cause, number in trial.maskless.items():
            console().print(f"no usable mask: {number} examples, {cause}", markup=False, soft_wrap=True)
        if trial.refusals:
            raise ValueError("; ".join(trial.refusals))


@app.command()
def leaderboard(
    split: Annotated[str | None, typer.Option(help="`evaluation`, `forgetting` or a benchmark's name; all if left out.")] = None,
    metric: Annotated[str | None, typer.Option(help="`accuracy`, `perplexity`, `iou` or `hallucination`; all if left out.")] = None,
    tasks: Annotated[bool, typer.Option(help="Each task's row too.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write these rows with all columns into this Parquet file.")] = None,
) -> None:
    """Every judged run and arm against the model as it was, the best of each measure first, with 95 % intervals.

    Examples:

    - `headwise leaderboard`
    - `headwise leaderboard --split pope --tasks --out pope.parquet`
    """
    with plain_errors():
        from flows.leaderboard import COLUMNS, ranked

        board, rows = ranked(split, metric, tasks=tasks)
        print_table("Leaderboard", COLUMNS, rows)
        if out is not None:
            board.write_parquet(out)
            console().print(f"{out}", soft_wrap=True)


@app.command()
def benchmarks() -> None:
    """The benchmarks that Headwise reads itself: from which official files, and by which protocol each is judged.

    All others are asked through lmms-eval, as `lmms-TASK`, once `make harness` has installed it; `.harness/bin/lmms-eval tasks list` shows
    its tasks, and `--benchmark lmms-TASK=FOLDER` asks one that you define.
    """
    with plain_errors():
        from headwise.benchmarks.registry import BENCHMARKS, OWN

        rows = [(one.name, ", ".join(one.files), "yes" if one.name in OWN else "", one.protocol) for one in BENCHMARKS.values()]
        rows.append(("lmms-TASK", "", "", "any task of lmms-eval, by its own rules; `make harness` installs it"))
        print_table("Benchmarks", ("name", "official files", "own data too", "protocol"), rows)


@app.command()
def models(
    model: Annotated[
        str | None, typer.Argument(help="A model to look at: `headwise-smol`, a transformers folder, or an id on the Hub.")
    ] = None,
) -> None:
    """The model families that Headwise knows, or what it makes of one model.

    Examples:

    - `headwise models`
    - `headwise models headwise-smol`
    """
    with plain_errors():
        from flows.inspection import describe_model, known_families

        title, columns, rows = describe_model(model) if model else known_families()
        print_table(title, columns, rows)


def _servers() -> Callable[[], None]:
    """Check the servers that the environment names, and start Prefect's while the rest is imported."""
    from flows.environment import checkout
    from flows.server import check_reachable, start_prefect_api
    from flows.tracking import tracking_uri

    checkout()
    check_reachable(tracking_uri(), "MLFLOW_TRACKING_URI")
    ready = start_prefect_api()
    import_module("mlflow")  # takes as long as the server does
    return ready


if __name__ == "__main__":
    app()
