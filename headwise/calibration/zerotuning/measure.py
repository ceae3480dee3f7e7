"""What a model with steered heads makes of calibration prompts, and which way each head should go."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from headwise.calibration.readout import Scored
from headwise.calibration.steering import Steering, steered
from headwise.calibration.zerotuning.settings import OperatorName
from headwise.examples import Example, open_image
from headwise.labels import Labels, LabelScores, score_labels
from headwise.vlm import VLM


@dataclass(frozen=True)
class Measured:
    """Per example, in the order they were given: whether the likeliest label is right, the negative log-likelihood of the right label among
    all labels, and the entropy of the next token, both in nats. The first two are NaN where no answer may be read.
    """

    right: Float[np.ndarray, " example"]
    nats: Float[np.ndarray, " example"]
    entropy: Float[np.ndarray, " example"]


@dataclass(frozen=True)
class Prompts:
    """The calibration examples as a model is asked them. labels: of each task. answered: whether their answers may be read."""

    vlm: VLM
    folder: Path
    examples: Sequence[Example]
    labels: Mapping[str, Labels]
    batch_size: int
    answered: bool = True

    def first(self, number: int) -> "Prompts":
        """The first of the examples."""
        return replace(self, examples=self.examples[:number])

    def measure(self, applied: Steering | None) -> Measured:
        """One pass over all of them (more where labels have several tokens)."""
        found = np.full((3, len(self.examples)), np.nan)
        with torch.no_grad(), self._steered(applied):
            for places, scores in self._scored():
                found[2, places] = scores.entropy.double().cpu().numpy()
                if self.answered:
                    targets, likely = self._targets(places), scores.log_probs.log_softmax(-1)
                    found[0, places] = (likely.argmax(-1) == targets).cpu().numpy()
                    found[1, places] = -likely.gather(1, targets[:, None])[:, 0].double().cpu().numpy()
        return Measured(*found)

    def gradient(self, objective: str, operator: OperatorName) -> Float[np.ndarray, "layer head"]:
        """`d loss / d log gamma` of every head at gamma = 1, by one backward pass for all: mean over the examples, below 0 where a gamma
        above 1 helps. loss: the nats of the right label among the labels, or the entropy.
        """
        total = torch.zeros(self.vlm.num_layers, self.vlm.num_heads, device=self.vlm.device)
        strength = torch.zeros_like(total, requires_grad=True)
        with torch.enable_grad(), self._steered(Steering(operator, strength)):
            for places, scores in self._scored():
                likely = scores.log_probs.log_softmax(-1)
                loss = scores.entropy if objective == "entropy" else -likely.gather(1, self._targets(places)[:, None])
                total += torch.autograd.grad(loss.sum(), strength)[0]
        return (total / len(self.examples)).double().cpu().numpy()

    def exact(self, objective: str, operator: OperatorName, step: float, tried: Callable[[], object]) -> Float[np.ndarray, "layer head"]:
        """The same as a difference: the loss with the head's gamma at `step` less that without, over `log step`; a pass for each head.

        `tried` is called after every pass.
        """
        shape, before = (self.vlm.num_layers, self.vlm.num_heads), self._loss(objective, None)
        tried()
        found = np.zeros(shape)
        for head in np.ndindex(shape):
            strength = torch.zeros(shape, device=self.vlm.device)
            strength[head] = np.log(step)
            found[head] = (self._loss(objective, Steering(operator, strength)) - before) / np.log(step)
            tried()
        return found

    def scored(self) -> dict[str, Scored]:
        """By task its labels' log-likelihoods, as the model is, and which of them are right."""
        found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {task: [] for task in self.labels}
        with torch.no_grad():
            for places, scores in self._scored():
                own = scores.log_probs.double().cpu().numpy(), self._targets(places).cpu().numpy()
                found[self.examples[places[0]].task].append(own)
        parts = {task: [np.concatenate(part) for part in zip(*own, strict=True)] for task, own in found.items() if own}
        return {task: (self.labels[task].words, log_probs, right) for task, (log_probs, right) in parts.items()}

    def image_of(self, example: Example) -> Image.Image | None:
        """The example's picture; none where it asks about text alone. Raises BadExample if it cannot be read."""
        return None if example.image is None else open_image(self.folder, example)

    def _loss(self, objective: str, applied: Steering | None) -> float:
        measured = self.measure(applied)
        return float((measured.entropy if objective == "entropy" else measured.nats).mean())

    def _steered(self, applied: Steering | None) -> AbstractContextManager[None]:
        return nullcontext() if applied is None else steered(self.vlm, applied)

    def _targets(self, places: Sequence[int]) -> Tensor:
        """Which label of its task is each example's right one."""
        chosen = [self.examples[place] for place in places]
        return torch.tensor([self.labels[one.task].words.index(one.answers[0]) for one in chosen], device=self.vlm.device)

    def _scored(self) -> Iterator[tuple[list[int], LabelScores]]:
        """Batches of one task each, of like length: the examples' places and their scores."""
        for task, labels in self.labels.items():
            own = [place for place, example in enumerate(self.examples) if example.task == task]
            own.sort(key=lambda place: (len(self.examples[place].question), place))
            for start in range(0, len(own), self.batch_size):
                places = own[start : start + self.batch_size]
                chosen = [self.examples[place] for place in places]
                images = [self.image_of(example) for example in chosen]
                yield places, score_labels(self.vlm, images, [example.question for example in chosen], labels)
