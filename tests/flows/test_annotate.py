"""The masks alone, through Prefect, DVC and MLflow, on real models with random weights."""

from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from flows.annotate import Annotation, Annotations, annotate
from headwise.data import DataSource
from headwise.masks.settings import Grounding, MaskQuality, Masks, Segmentation
from headwise.masks.table import read_masks, written_shards
from tests.mask_models import save_florence, save_sam2
from tests.test_nightly import _checkout as checkout

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("prefect_server")]
IMAGES = DataSource(calibration=4, evaluation=2, forgetting=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Masks:
    root = tmp_path_factory.mktemp("models")
    return Masks(
        source="generated",
        grounding=Grounding(model=str(save_florence(root / "florence", places=True)), max_new_tokens=24, num_beams=1, dtype="float32"),
        segmentation=Segmentation(model=str(save_sam2(root / "sam2")), dtype="float32"),
        quality=MaskQuality(min_area=0, max_area=1, min_predicted_iou=0, min_stability=0, min_box_iou=0),
    )


def run(settings: Annotation) -> Annotations:
    result = annotate(settings)
    assert isinstance(result, Annotations)
    return result


def test_masks_are_made_once_and_compared_and_shown(tmp_path: Path, models: Masks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout(tmp_path / "checkout"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    exact = run(Annotation(images=IMAGES, name="exact"))
    assert exact.recomputed == ("images", "masks@0", "masks@1") and exact.agreement == []
    assert {row["state"] for row in exact.states} >= {"usable"} and exact.folder.name == "masks-exact"
    made = run(Annotation(images=IMAGES, masks=models, name="made"))
    assert made.recomputed == ("masks@0", "masks@1"), "the images were restored"
    masks = read_masks(written_shards(made.folder / "data/masks"))
    assert set(masks["source"]) == {"florence2+sam2"} and masks["image"].n_unique() == 4
    assert len(made.agreement) == 1 and made.agreement[0]["objects"]
    assert "Key masks against the exact ones" in made.report.read_text()
    again = run(Annotation(images=IMAGES, masks=models, name="made"))
    assert again.recomputed == () and again.agreement == made.agreement
    with get_client(sync_client=True) as client:
        keys = ArtifactFilter(key=ArtifactFilterKey(any_=["masks", "masks-0", "masks-1", "agreement"]))
        assert {artifact.key for artifact in client.read_artifacts(artifact_filter=keys)} == {"masks", "masks-0", "masks-1", "agreement"}
