"""What a model with steered heads makes of calibration prompts, and which way each head should go."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from headwise.attention.edits import Edits, editing
from headwise.calibration.readout import Scored
from headwise.calibration.steering import Steering, steered
from headwise.calibration.zerotuning.settings import OperatorName
from headwise.examples import Example, open_image
from headwise.labels import Labels, LabelScores, continued, next_logits, read_labels
from headwise.replay import Replay
from headwise.vlm import VLM, Batch, encode


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
                    found[0, places] = (scores.log_probs.argmax(-1) == self._targets(places)).cpu().numpy()
                    found[1, places] = self._loss("labels", places, scores).double().cpu().numpy()
        return Measured(*found)

    def gradient(self, objective: str, operator: OperatorName) -> Float[np.ndarray, "layer head"]:
        """`d loss / d log gamma` of every head at gamma = 1, by one backward pass for all: mean over the examples, below 0 where a gamma
        above 1 helps.
        """
        total = torch.zeros(self.vlm.num_layers, self.vlm.num_heads, device=self.vlm.device)
        strength = torch.zeros_like(total, requires_grad=True)
        with torch.enable_grad(), self._steered(Steering(operator, strength)):
            for places, scores in self._scored():
                total += torch.autograd.grad(self._loss(objective, places, scores).sum(), strength)[0]
        return (total / len(self.examples)).double().cpu().numpy()

    def exact(self, objective: str, step: float, tried: Callable[[float], object]) -> Float[np.ndarray, "layer head"]:
        """The same of the first token as a difference: the loss with the head's gamma at `step` less that without, over `log step`.

        A pass for each head, of which only the layers from the head's own on are run. `tried` hears what every pass was, as a share of one
        over all examples.
        """
        vlm, total = self.vlm, np.zeros((self.vlm.num_layers, self.vlm.num_heads))
        for places, labels, prompts in self._batches():
            replays = {context: self._replay(continued(vlm, prompts, context)) for context in labels.contexts}
            before = self._loss(objective, places, read_labels({own: replay.logits.float() for own, replay in replays.items()}, labels))
            for head in np.ndindex(total.shape):
                strength = torch.zeros(total.shape, device=vlm.device)
                strength[head] = np.log(step)
                with editing(vlm, Edits(first_bias=strength), prompts.segments):
                    after = read_labels({own: replay.again(head[0]).float() for own, replay in replays.items()}, labels)
                total[head] += float((self._loss(objective, places, after) - before).double().sum())
                tried((1 - head[0] / len(total)) * len(places) / len(self.examples))
        return total / len(self.examples) / np.log(step)

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

    def _replay(self, inputs: Mapping[str, Tensor]) -> Replay:
        rows = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        rows[:, -1] = True
        return Replay(self.vlm, rows, partial(next_logits, self.vlm, inputs), range(self.vlm.num_layers))

    def _loss(self, objective: str, places: Sequence[int], scores: LabelScores) -> Float[Tensor, " example"]:
        """The nats of the right label among all labels, or the entropy of the next token."""
        if objective == "entropy":
            return scores.entropy
        return -scores.log_probs.log_softmax(-1).gather(1, self._targets(places)[:, None])[:, 0]

    def _steered(self, applied: Steering | None) -> AbstractContextManager[None]:
        return nullcontext() if applied is None else steered(self.vlm, applied)

    def _targets(self, places: Sequence[int]) -> Int[Tensor, " example"]:
        """Which label of its task is each example's right one."""
        chosen = [self.examples[place] for place in places]
        return torch.tensor([self.labels[one.task].words.index(one.answers[0]) for one in chosen], device=self.vlm.device)

    def _scored(self) -> Iterator[tuple[list[int], LabelScores]]:
        for places, labels, prompts in self._batches():
            logits = {context: next_logits(self.vlm, continued(self.vlm, prompts, context)) for context in labels.contexts}
            yield places, read_labels(logits, labels)

    def _batches(self) -> Iterator[tuple[list[int], Labels, Batch]]:
        """Of one task each, of like length: the examples' places, their labels and their prompts."""
        for task, labels in self.labels.items():
            own = [place for place, example in enumerate(self.examples) if example.task == task]
            own.sort(key=lambda place: (len(self.examples[place].question), place))
            for start in range(0, len(own), self.batch_size):
                places = own[start : start + self.batch_size]
                chosen = [self.examples[place] for place in places]
                images = [self.image_of(example) for example in chosen]
                yield places, labels, encode(self.vlm, images, [example.question for example in chosen], padding_side="left")
