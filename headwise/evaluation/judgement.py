"""How an answer is judged: what every rule gives, and what a task says about how its questions are put."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image

from headwise.examples import Example


@dataclass(frozen=True)
class Judgement:
    """How right an answer is, in [0, 1] (None: the rule does not say), and whether it is an answer of the form asked for.

    `part` of `whole`: what a rule counts beside that, to be summed over examples before it is divided (an IoU of 1; hallucinated of all
    objects mentioned).
    """

    right: float | None
    valid: bool
    part: float | None = None
    whole: float | None = None


Rule = Callable[[str, Example], Judgement]
"""Judges the text that a model answered to an example."""


@dataclass(frozen=True)
class Asking:
    """How the questions of a task are put. rule: None where nothing is to be answered, as for a caption's perplexity. read: whether the
    first reference is read for its nats.
    """

    rule: Rule | None
    read: bool = True


READ_ONLY = Asking(rule=None)


ObjectMask = Callable[[Example, Image.Image], Bool[np.ndarray, "height width"]]
"""The pixels of the object that an example is about. Raises BadExample if they are not known."""


@dataclass(frozen=True)
class Questions:
    """What a model is asked: the examples, how each task's are put, and the folder that their images' names are relative to.

    mask: given where the question is what the model looks at while it reads the reference.
    """

    examples: Sequence[Example]
    askings: Mapping[str, Asking]
    images: Path
    mask: ObjectMask | None = None
