"""The page as a reader and a browser meet it: complete, self-contained, safe, and calm where something is missing."""

import re
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from headwise.files import sha256_file, sha256_tree
from headwise.report import write_report
from headwise.report.page import ABSENT, CONTENTS
from headwise.report.themes import DARK, LIGHT, Theme
from tests.report.artefacts import Size, write_workspace
from tests.report.conftest import QUESTION, RUN
from tests.report.html_page import read_page


def test_every_section_is_there_and_linked(page: Path) -> None:
    found = read_page(page.read_text(encoding="utf-8"))
    sections = [element["id"] for element in found.all("section")]
    assert sections == [section for section, _ in CONTENTS]
    assert [element["href"] for element in found.all("a")][: len(sections)] == [f"#{section}" for section in sections]
    assert not any(sentence in found.text for sentence in ABSENT.values())
    assert RUN["verdict"] in found.text and RUN["commit"] in found.text


def test_every_image_exists_and_is_described(page: Path) -> None:
    found = read_page(page.read_text(encoding="utf-8"))
    images = found.all("img")
    assert len(images) == 3 + 4 + Size().examples + 3 * Size().examples, "charts, the contact sheet, and three pictures of each example"
    for image in images:
        assert image["alt"]
        with Image.open(page.parent / str(image["src"])) as opened:
            opened.load()
    for source in found.all("source"):
        assert source["media"] == "(prefers-color-scheme: dark)" and (page.parent / str(source["srcset"])).is_file()


def test_the_folder_holds_what_the_page_shows_and_nothing_else(page: Path) -> None:
    found = read_page(page.read_text(encoding="utf-8"))
    shown = {str(image["src"]) for image in found.all("img")} | {str(source["srcset"]) for source in found.all("source")}
    assert {file.relative_to(page.parent).as_posix() for file in page.parent.rglob("*") if file.is_file()} == shown | {"index.html"}


def test_the_page_asks_nobody_else(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script", text)
    assert not read_page(text).all("script")


def test_what_others_wrote_is_text(page: Path) -> None:
    found = read_page(page.read_text(encoding="utf-8"))
    for written in (QUESTION, RUN["Prefect flow run"], "images/9999.png: the file is <empty>"):
        assert written in found.text


def test_tables_name_their_rows_and_columns(page: Path) -> None:
    found = read_page(page.read_text(encoding="utf-8"))
    assert all(header.get("scope") in ("row", "col", "rowgroup") for header in found.all("th"))
    assert all(region.get("aria-label") for region in found.all("div") if region.get("role") == "region")


def test_digests_are_those_of_the_manifests(workspace: Path, page: Path) -> None:
    rows = {row[0]: row for row in read_page(page.read_text(encoding="utf-8")).rows if row}
    for manifest in (workspace / "data").rglob("manifest.json"):
        folder = manifest.parent.relative_to(workspace / "data").as_posix()
        assert rows[folder][1] == sha256_file(manifest)
    assert "max_new_tokens = 12" in rows["evaluations/base"][2]


def test_examples_left_out_are_listed_with_their_reason(page: Path) -> None:
    rows = read_page(page.read_text(encoding="utf-8")).rows
    assert ["scene-9999", "attention/shard=01", "images/9999.png: the file is <empty>"] in rows
    assert any(row[1:2] == ["masks"] and row[2].endswith(": smaller than min_area") for row in rows)


def test_calibrated_heads_are_shown_with_their_anchors_and_reasons(page: Path) -> None:
    found = read_page(page.read_text(encoding="utf-8"))
    assert "calibrated 1 of 3 target heads" in found.text and "rank correlation of I-SAL and CAF is −0.25" in found.text
    rows = {row[0]: row for row in found.rows if row}
    assert rows["layer 0, head 1"][4:] == ["1.0 (0.88)", "1.89", "0.15", "0.02", "accepted"]
    assert rows["layer 1, head 2"][-1] == "rolled back: too <far>"
    assert rows["layer 2, head 0"][4:] == [
        "–",
        "–",
        "–",
        "–",
        "skipped: no anchor",
    ]
    assert rows["rah"] == ["rah", "3", "1", "1", "1", "0.8", "0.02", "2e−06", "96", "5.5"]


def test_the_same_artefacts_give_the_same_bytes(workspace: Path, page: Path, tmp_path: Path) -> None:
    assert sha256_tree(write_report(workspace, tmp_path / "again", RUN).parent) == sha256_tree(page.parent)


def test_an_empty_workspace_gives_a_page_of_plain_sentences(tmp_path: Path) -> None:
    page = write_report(tmp_path, tmp_path / "report", {})
    found = read_page(page.read_text(encoding="utf-8"))
    assert all(sentence in found.text for sentence in ABSENT.values())
    assert not found.all("img")


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (("images", "selections"), ["masks", "overlays"]),
        (("scores", "evaluations/top"), ["heads", "tests", "overlays"]),
        (("attention", "adapters", "evaluations", "scores/tests.json"), ["results", "tests", "overlays", "losses", "targets"]),
    ],
)
def test_missing_folders_are_sentences(workspace: Path, tmp_path: Path, missing: tuple[str, ...], said: list[str]) -> None:
    copy = shutil.copytree(workspace, tmp_path / "workspace")
    for name in missing:
        target = copy / "data" / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    text = read_page(write_report(copy, tmp_path / "report", {}).read_text(encoding="utf-8")).text
    assert [name for name, sentence in ABSENT.items() if sentence in text] == [*said, "run"]


def test_a_report_is_replaced_and_anything_else_is_not(tmp_path: Path) -> None:
    out = tmp_path / "report"
    write_report(tmp_path, out, {})
    (out / "charts" / "left-over.png").write_text("old")
    write_report(tmp_path, out, {})
    assert not (out / "charts" / "left-over.png").exists()
    (out / "notes.md").write_text("what I saw in it")
    with pytest.raises(ValueError, match="neither empty nor a report"):
        write_report(tmp_path, out, {})
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="neither empty nor a report"):
        write_report(tmp_path, precious, {})
    with pytest.raises(ValueError, match="neither empty nor a report"):
        write_report(tmp_path, precious / "thesis.txt", {})
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_a_broken_artefact_leaves_the_old_report(workspace: Path, page: Path, tmp_path: Path) -> None:
    copy, out = shutil.copytree(workspace, tmp_path / "workspace"), shutil.copytree(page.parent, tmp_path / "report")
    (copy / "data/scores/heads.parquet").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"heads\.parquet"):
        write_report(copy, out, {})
    assert sha256_tree(out) == sha256_tree(page.parent)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report", "workspace"]


def test_fifty_overlays_in_seconds(tmp_path: Path) -> None:
    workspace = write_workspace(tmp_path / "workspace", Size(examples=55, layers=12, heads=4, images=100))
    start = time.process_time()
    page = write_report(workspace, tmp_path / "report", {})
    assert time.process_time() - start < 15
    assert len(read_page(page.read_text(encoding="utf-8")).all("img")) == 3 + 4 + 24 + 3 * 50


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_colours_can_be_read(theme: Theme) -> None:
    for ground in (theme.paper, theme.card):
        for text in (theme.ink, theme.muted, theme.chosen, theme.control, theme.gain, theme.loss):
            assert contrast(text, ground) >= 4.5, (theme.name, text, ground)
        for arm in ("top", "bottom", "random", "all", "another"):
            assert contrast(theme.arm(arm), ground) >= 3, (theme.name, arm, ground)


def contrast(first: str, second: str) -> float:
    """The ratio of relative luminances (WCAG 2.2)."""
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
