"""The registered model as code: MLflow runs this file to load an adapter onto its base model and ask it questions.

`mlflow.pyfunc.load_model("models:/headwise-smol.scenes@champion").predict([{"image": "cat.png", "question": "What is this?"}])`, or
`mlflow models serve --env-manager local --model-uri models:/headwise-smol.scenes@champion`, both where Headwise is installed.
"""

from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

if TYPE_CHECKING:
    from headwise.vlm import VLM

LONGEST_ANSWER = 32
"""Tokens that an answer may have."""


class AdapterModel(PythonModel):
    """A vision-language model with one of our adapters on it."""

    vlm: "VLM"
    lock: Lock

    def load_context(self, context: PythonModelContext) -> None:
        """Load the base model named when the adapter was logged, and the adapter folder that lies in the registry.

        Raises ValueError if that model has got other weights meanwhile.
        """
        from headwise.calibration.adapter import load_calibrated

        assert context.model_config is not None
        self.lock = Lock()
        self.vlm = load_calibrated(str(context.model_config["model"]), Path(context.artifacts["adapter"]))

    # MLflow's short form of predict, whose type hint becomes the signature
    def predict(self, model_input: list[dict[str, str]]) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One greedy answer per row; `image` is the path of a picture, left out for text alone."""
        from headwise.examples import decode_image
        from headwise.vlm import generate

        images = [decode_image(Path(row["image"]).read_bytes(), row["image"]) if row.get("image") else None for row in model_input]
        with self.lock:  # a server asks from several threads, and a steered model holds one batch at a time
            return generate(self.vlm, images, [row["question"] for row in model_input], LONGEST_ANSWER)


set_model(AdapterModel())
