"""One static page about a run: what the heads scored, what they look at, what calibrating them changed, and where it all came from."""

from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from headwise.files import new_folder
from headwise.report.contact_sheet import masks_section
from headwise.report.head_targets import targets_section
from headwise.report.records import bad_examples, manifest_table, statistical_tests, words
from headwise.report.results import read_results, read_statistics
from headwise.report.sections import heads_section, losses_section, overlays_section, read_scores, summary
from headwise.report.steered_heads import steering_section
from headwise.report.themes import DARK, LIGHT

GENERATOR = "Headwise report"
PAGE, PICTURES = "index.html", ("charts", "masks", "overlays")
CONTENTS = (
    ("results", "Before and after"),
    ("heads", "Where the heads look"),
    ("tests", "Statistical tests"),
    ("masks", "The masks"),
    ("overlays", "Attention over the images"),
    ("losses", "The calibrations"),
    ("targets", "The calibrated heads"),
    ("bad", "Examples left out"),
    ("origin", "Where it comes from"),
)
ABSENT = {
    "results": "There is no evaluation of both the uncalibrated model and a calibrated one yet.",
    "heads": "No head has been scored: not yet, or no arm of this run chooses layers by its heads.",
    "tests": "No statistical test has been made: not yet, or no arm of this run chooses layers by its heads.",
    "masks": "No mask has been made: not yet, or no arm of this run needs one.",
    "overlays": "No calibration example has an image, a usable mask and attention over the image yet.",
    "losses": "No layer has been trained: not yet, or no arm of this run trains.",
    "targets": "No single heads have been calibrated, by RAH-LoRA or ZeroTuning: not yet, or no arm of this run does that.",
    "bad": "No step that came to its end left an example out.",
    "run": "No run has come to its end here yet, so there are no ids to show.",
    "manifests": "No step has written its manifest yet.",
}


def write_report(workspace: Path, out: Path, run: Mapping[str, str]) -> Path:
    """Write the folder `out` (index.html and its images) about the artefacts in `workspace/data`, made with the parameters in its
    params.yaml; returns the path of the page.

    `run` holds the ids to show; its entry `verdict` becomes the sentence at the top. What the workspace does not hold yet is left out with
    a plain sentence. The same artefacts give the same bytes. Raises ValueError if `out` is a file or a folder that holds anything but a
    report, as it would be replaced, or if an artefact is there but broken.
    """
    out = out.resolve()
    if out.exists() and not _replaceable(out):
        raise ValueError(f"{out}: neither empty nor a report alone, so it is not replaced; name a new folder")
    with new_folder(out) as folder:
        for name in PICTURES:
            (folder / name).mkdir()
        (folder / PAGE).write_text(_render(_context(workspace / "data", folder, run)), encoding="utf-8")
    return out / PAGE


def _replaceable(out: Path) -> bool:
    """An empty folder, or one that holds a page that was written here, its pictures and nothing else."""
    if not out.is_dir():
        return False
    page, found = out / PAGE, {path.name for path in out.iterdir()}
    written = page.is_file() and f'content="{GENERATOR}"' in page.read_text(encoding="utf-8", errors="replace")
    return not found or (written and found <= {PAGE, *PICTURES})


def _context(data: Path, folder: Path, run: Mapping[str, str]) -> dict[str, object]:
    scores, statistics = read_scores(data), read_statistics(data.parent / "params.yaml")
    return {
        "generator": GENERATOR,
        "light": LIGHT,
        "dark": DARK,
        "contents": CONTENTS,
        "absent": ABSENT,
        "verdict": run.get("verdict"),
        "run": {name: value for name, value in run.items() if name != "verdict"},
        "summary": summary(data, scores),
        "results": read_results(data, statistics),
        "statistics": statistics,
        "heads": heads_section(scores, folder / "charts") if scores else None,
        "tests": statistical_tests(data / "scores" / "tests.json"),
        "overlays": overlays_section(data, scores, folder / "overlays") if scores else None,
        "masks": masks_section(data, folder / "masks"),
        "losses": losses_section(data / "adapters", folder / "charts"),
        "targets": [found for section in (targets_section, steering_section) if (found := section(data, folder / "charts"))],
        "bad": bad_examples(data),
        "manifests": manifest_table(data),
    }


def _render(context: Mapping[str, object]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["words"] = words
    environment.filters["share"] = lambda value: f"{100 * value:.0f}\N{NO-BREAK SPACE}%"
    return environment.get_template("page.html.j2").render(context)
