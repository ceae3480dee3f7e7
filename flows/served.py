"""The registered model as code: MLflow runs this file to load an adapter onto its base model and ask it questions.

`mlflow.pyfunc.load_model("models:/headwise@champion").predict([{"image": "cat.png", "question": "What is this?"}])`
"""

from pathlib import Path
from typing import TYPE_CHECKING

from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image

if TYPE_CHECKING:
    from headwise.vlm import VLM

LONGEST_ANSWER = 32
"""Tokens that an answer may have."""


class AdapterModel(PythonModel):
    """A vision-language model with one of our adapters on it."""

    vlm: "VLM"

    def load_context(self, context: PythonModelContext) -> None:
        """Load the base model named when the adapter was logged, and the adapter folder that lies in the registry."""
        from headwise.vlm import load_vlm

        assert context.model_config is not None
        self.vlm = load_vlm(str(context.model_config["model"]), adapter=Path(context.artifacts["adapter"]))

    # MLflow's short form of predict, whose type hint becomes the signature
    def predict(self, model_input: list[dict[str, str]]) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One greedy answer per row; `image` is the path of a picture, left out for text alone."""
        from headwise.vlm import generate

        images = [Image.open(row["image"]).convert("RGB") if row.get("image") else None for row in model_input]
        return generate(self.vlm, images, [row["question"] for row in model_input], LONGEST_ANSWER)


set_model(AdapterModel())
