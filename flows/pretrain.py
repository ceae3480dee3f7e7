"""Train the embedded model's projector and LoRA anew: `make pretrain`, or from the UI."""

import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from prefect import flow, get_run_logger, task
from pydantic import TypeAdapter

from flows.environment import state
from headwise import compositions, cutouts, pretraining, scenes, smol
from headwise.files import new_file, sha256_file
from headwise.pretraining import Pretraining, fit
from headwise.smol import WEIGHTS, smol_path, smol_processor, untrained


@flow(name="pretrain", persist_result=False)
def pretrain(settings: Pretraining = Pretraining()) -> Path:  # noqa: B008  frozen
    """Train `headwise-smol` from SmolLM2 and EfficientNet-Lite0, put its weights into the package, and assemble the model.

    A killed run goes on from its last checkpoint, minutes back; other settings, drawing code, photographs or wheels start anew.

    Args:
        settings: Steps, data mixture, LoRA rank, learning rate and seed.
    """
    trained = train(settings, state() / "pretrain" / recipe(settings)[:12])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with new_file(WEIGHTS / name) as temporary:  # a killed copy leaves the weights in use whole
            shutil.copyfile(trained / name, temporary)
    return smol_path()


def recipe(settings: Pretraining) -> str:
    """SHA-256 of all that the weights depend on: the settings, the code that draws and trains, the photographs, and the wheels' pins."""
    code = [sha256_file(Path(str(module.__file__))) for module in (compositions, cutouts, pretraining, scenes, smol)]
    known = [TypeAdapter(Pretraining).dump_json(settings).decode(), *code, cutouts.installed_photographs().digest()]
    return sha256("\n".join(known).encode()).hexdigest()


@task(persist_result=False)
def train(settings: Pretraining, out: Path) -> Path:
    """All steps, or those that a killed run left; the PEFT folder."""
    log: Callable[[str], None] = get_run_logger().info
    fit(untrained(), smol_processor(), settings, cutouts.installed_photographs(), out, log)
    return out


if __name__ == "__main__":
    pretrain()
