"""Train the embedded model's projector and LoRA anew: `make pretrain`, or from the UI."""

import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from prefect import flow, get_run_logger, task
from pydantic import TypeAdapter

from flows.environment import state
from headwise.cutouts import installed_photographs
from headwise.files import new_file
from headwise.pretraining import Pretraining, fit
from headwise.smol import WEIGHTS, smol_path, smol_processor, untrained


@flow(name="pretrain", persist_result=False)
def pretrain(settings: Pretraining = Pretraining()) -> Path:  # noqa: B008  frozen
    """Train `headwise-smol` from SmolLM2 and EfficientNet-Lite0, put its weights into the package, and assemble the model.

    A killed run goes on from its last checkpoint, minutes back; other settings start anew.

    Args:
        settings: Steps, data mixture, LoRA rank, learning rate and seed.
    """
    digest = sha256(TypeAdapter(Pretraining).dump_json(settings)).hexdigest()
    trained = train(settings, state() / "pretrain" / digest[:12])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with new_file(WEIGHTS / name) as temporary:  # a killed copy leaves the weights in use whole
            shutil.copyfile(trained / name, temporary)
    return smol_path()


@task(persist_result=False)
def train(settings: Pretraining, out: Path) -> Path:
    """All steps, or those that a killed run left; the PEFT folder."""
    log: Callable[[str], None] = get_run_logger().info
    fit(untrained(), smol_processor(), settings, installed_photographs(), out, log)
    return out


if __name__ == "__main__":
    pretrain()
