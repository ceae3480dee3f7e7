"""Drawn scenes: shapes, colours, sizes, textures, counts, positions and a word to read, with exact masks, captions and questions."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import product

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from headwise.compositions import MAX_DRAWS, SIZE, Composition, Question, Thing, article, enumerate_phrases, relight, split_of

COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (245, 215, 40),
    "orange": (245, 140, 20),
    "purple": (130, 50, 160),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
DRIFT_COLOURS = {"pink": (250, 130, 180), "brown": (120, 70, 30), "grey": (128, 128, 128)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "diamond", "ring")
DRIFT_SHAPES = ("hexagon", "arrow", "moon")
TEXTURES = ("plain", "striped", "dotted")
WORDS = ("BOOK", "CAKE", "DOOR", "FISH", "GOLD", "HAND", "KING", "LAMP", "MILK", "NOSE", "PARK", "RAIN", "SHIP", "TREE", "WIND", "ZERO")
DRIFT_WORDS = ("BIRD", "FIRE", "MOON", "SNOW")
DIAMETERS = {"small": 54, "large": 98}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
CELL = SIZE / 3
MAX_COUNT = 5

BACKGROUNDS = ((235, 228, 210), (214, 232, 240), (226, 240, 214), (240, 220, 232), (222, 222, 236))
DRIFT_BACKGROUNDS = ((96, 112, 104), (84, 84, 120), (140, 108, 92))


@dataclass(frozen=True)
class Figure:
    """One drawn shape and where it stands on the three-by-three grid."""

    shape: str
    colour: str
    size: str
    texture: str
    row: int
    column: int

    @property
    def phrase(self) -> str:
        """What names it: colour and shape."""
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """Where it stands, in words."""
        row, column = ROWS[self.row], COLUMNS[self.column]
        return "in the middle" if row == column == "middle" else f"at the {row if column == 'middle' else f'{row} {column}'}"

    def description(self, alike: int = 1) -> str:
        """What can be seen of it without its size and place, and how many of its kind there are."""
        named = f"{self.texture} {self.phrase}"
        return named if alike == 1 else f"{alike} {plural(named)}"

    @property
    def clause(self) -> str:
        """Its part of the caption."""
        texture = "" if self.texture == "plain" else f"{self.texture} "
        return f"a {self.size} {texture}{self.phrase} {self.place}"


@dataclass(frozen=True)
class Plan:
    """What stands where: the figures, and a word with its cell (row, column) or none."""

    figures: tuple[Figure, ...]
    word: tuple[str, int, int] | None

    @property
    def alike(self) -> int:
        """How many figures of a kind there are."""
        return len(self.figures) - len({figure.shape for figure in self.figures}) + 1

    @property
    def split(self) -> str:
        """The split that this composition belongs to."""
        return split_of(repr((sorted(astuple(figure) for figure in self.figures), self.word)))


def plural(noun: str) -> str:
    """`stars`, `crosses`."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def descriptions() -> list[str]:
    """How every thing of the scenes that pretraining sees is described."""
    kinds = product(SHAPES, COLOURS, TEXTURES, range(1, MAX_COUNT + 1))
    return [*(Figure(shape, colour, "", texture, 0, 0).description(alike) for shape, colour, texture, alike in kinds), *map(_word, WORDS)]


def compose_scene(rng: np.random.Generator, split: str, *, drift: bool = False) -> Composition:
    """Draw one scene of the split. `drift` adds colours, shapes and words that pretraining never saw, darker grounds, another light.

    No white figure stands beside a word, whose card is a white shape too.
    """
    palette = COLOURS | DRIFT_COLOURS if drift else COLOURS
    shapes, words = ((*SHAPES, *DRIFT_SHAPES), (*WORDS, *DRIFT_WORDS)) if drift else (SHAPES, WORDS)
    plans = (_plan(rng, list(palette), shapes, words) for _ in range(MAX_DRAWS))
    plan = next(plan for plan in plans if plan.split == split)
    image = _ground(rng, DRIFT_BACKGROUNDS if drift else BACKGROUNDS)
    things = [
        Thing(figure.phrase, _draw_figure(image, figure, palette[figure.colour], rng), figure.description(plan.alike))
        for figure in plan.figures
    ]
    word = None
    if plan.word is not None:
        word, *cell = plan.word
        things.append(Thing(_word(word), _draw_word(image, word, (cell[0], cell[1]), rng)))
    figures, colours = list(plan.figures), [colour for colour in palette if word is None or colour != "white"]
    questions = [Question("caption", "Describe the image.", _caption(figures, word)), *_questions(rng, figures, word, colours)]
    return Composition(relight(image, rng) if drift else image, tuple(things), tuple(questions))


def _word(word: str) -> str:
    """The phrase that names a word's card."""
    return f"word {word}"


def _plan(rng: np.random.Generator, colours: Sequence[str], shapes: Sequence[str], words: Sequence[str]) -> Plan:
    """Either some figures of distinct shapes and colours, or several alike to count; in half of the scenes a word."""
    cells = [divmod(int(cell), 3) for cell in rng.permutation(9)]
    counting, has_word = rng.random() < 0.4, rng.random() < 0.5
    number = int(rng.integers(1, MAX_COUNT + 1)) if counting else int(rng.integers(2, 4))
    picked_shapes, picked_colours = rng.permutation(shapes), rng.permutation([c for c in colours if not has_word or c != "white"])
    figures = [
        Figure(
            shape=str(picked_shapes[0 if counting else i]),
            colour=str(picked_colours[0 if counting else i]),
            size=str(rng.choice(list(DIAMETERS))),
            texture=str(rng.choice(TEXTURES, p=[0.5, 0.25, 0.25])),
            row=cells[i][0],
            column=cells[i][1],
        )
        for i in range(number)
    ]
    if counting:
        figures = [replace(figure, size=figures[0].size, texture=figures[0].texture) for figure in figures]
    return Plan(tuple(figures), (str(rng.choice(words)), *cells[number]) if has_word else None)


def _ground(rng: np.random.Generator, colours: tuple[tuple[int, int, int], ...]) -> Image.Image:
    first, second = (np.array(colours[int(i)], dtype=np.float32) for i in rng.integers(0, len(colours), size=2))
    ramp = np.linspace(0, 1, SIZE, dtype=np.float32)[:, None, None]
    gradient = np.broadcast_to(first * (1 - ramp) + second * ramp, (SIZE, SIZE, 3))
    return Image.fromarray((gradient.transpose(1, 0, 2) if rng.random() < 0.5 else gradient).astype(np.uint8).copy())


def _draw_figure(image: Image.Image, figure: Figure, colour: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """Paint the figure into the image and return its exact pixels."""
    radius = DIAMETERS[figure.size] / 2 * rng.uniform(0.92, 1.04)
    slack = max(0.0, CELL / 2 - radius - 1)
    x, y = ((cell + 0.5) * CELL + rng.uniform(-slack, slack) for cell in (figure.column, figure.row))
    mask = _outline(figure.shape, x, y, radius)
    inner = _outline(figure.shape, x, y, radius - 3)
    pixels = np.asarray(image).copy()
    pixels[mask] = (235, 235, 235) if sum(colour) < 200 else (30, 30, 30)
    pixels[inner] = colour
    rows, columns = np.mgrid[:SIZE, :SIZE]
    lighter = sum(colour) < 380
    second = tuple(int(c * 0.35 + 255 * 0.65) if lighter else int(c * 0.45) for c in colour)
    if figure.texture == "striped":
        pixels[inner & ((rows + columns) % 22 < 9)] = second
    elif figure.texture == "dotted":
        pixels[inner & (((rows - y) % 18 - 9) ** 2 + ((columns - x) % 18 - 9) ** 2 < 22)] = second
    image.paste(Image.fromarray(pixels))
    return mask


def _outline(shape: str, x: float, y: float, radius: float) -> np.ndarray:
    canvas = Image.new("1", (SIZE, SIZE))
    _PAINTERS[shape](ImageDraw.Draw(canvas), x, y, radius)
    return np.asarray(canvas)


Painter = Callable[[ImageDraw.ImageDraw, float, float, float], None]


def _polygon(*corners: tuple[float, float]) -> Painter:
    """A painter of the polygon with these corners, in units of the radius around the centre (y down)."""
    return lambda draw, x, y, r: draw.polygon([(x + a * r, y + b * r) for a, b in corners], fill=1)


def _regular(corners: int, start: float, inner: float | None = None) -> Painter:
    """A painter of a regular polygon, or of a star whose inner corners lie at `inner` of the radius."""
    number = corners * 2 if inner else corners
    angles = np.radians(start) + 2 * np.pi * np.arange(number) / number
    radii = np.where(np.arange(number) % 2, inner or 1.0, 1.0)
    return _polygon(*zip(radii * np.cos(angles), radii * np.sin(angles), strict=True))


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    draw.ellipse((x - r, y - r, x + r, y + r), fill=1)


def _ring(draw: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    _disc(draw, x, y, r)
    hole = r * 0.5
    draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)


def _moon(draw: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    _disc(draw, x, y, r)
    draw.ellipse((x - r * 0.35, y - r * 0.8, x + r * 1.25, y + r * 0.8), fill=0)


def _heart(draw: ImageDraw.ImageDraw, x: float, y: float, r: float) -> None:
    angle = np.linspace(0, 2 * np.pi, 60)
    a = np.sin(angle) ** 3
    b = -(13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)) / 17
    draw.polygon([(x + i * r, y + j * r) for i, j in zip(a, b, strict=True)], fill=1)


_PAINTERS: dict[str, Painter] = {
    "circle": _disc,
    "square": _polygon((-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)),
    "triangle": _regular(3, -90),
    "star": _regular(5, -90, inner=0.42),
    "cross": _polygon(
        *((-0.32, -1), (0.32, -1), (0.32, -0.32), (1, -0.32), (1, 0.32), (0.32, 0.32)),
        *((0.32, 1), (-0.32, 1), (-0.32, 0.32), (-1, 0.32), (-1, -0.32), (-0.32, -0.32)),
    ),
    "heart": _heart,
    "diamond": _polygon((0, -1), (0.7, 0), (0, 1), (-0.7, 0)),
    "ring": _ring,
    "hexagon": _regular(6, 0),
    "arrow": _polygon((-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)),
    "moon": _moon,
}


def _draw_word(image: Image.Image, word: str, cell: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Paint a white card with the word into its cell and return the card's pixels."""
    font = ImageFont.load_default(size=int(rng.integers(27, 31)))
    left, top, right, bottom = font.getbbox(word)
    width, height = right - left + 12, bottom - top + 14
    x = np.clip((cell[1] + 0.5) * CELL - width / 2 + rng.uniform(-4, 4), 1, SIZE - width - 1)
    y = np.clip((cell[0] + 0.5) * CELL - height / 2 + rng.uniform(-20, 20), 1, SIZE - height - 1)
    card = (int(x), int(y), int(x + width), int(y + height))
    draw = ImageDraw.Draw(image)
    draw.rectangle(card, fill=(255, 255, 255), outline=(60, 60, 60))
    draw.text((int(x) + 6 - left, int(y) + 7 - top), word, fill=(10, 10, 10), font=font)
    canvas = Image.new("1", (SIZE, SIZE))
    ImageDraw.Draw(canvas).rectangle(card, fill=1)
    return np.asarray(canvas)


def _caption(figures: list[Figure], word: str | None) -> str:
    if len({figure.shape for figure in figures}) < len(figures):
        parts = [f"{len(figures)} {figures[0].size} {plural(figures[0].phrase)}"]
    else:
        parts = [figure.clause for figure in sorted(figures, key=lambda f: (f.row, f.column))]
    return enumerate_phrases([*parts, *([f"the word {word}"] if word else [])]) + "."


def _questions(rng: np.random.Generator, figures: list[Figure], word: str | None, colours: list[str]) -> list[Question]:
    """Every question whose answer is beyond doubt, in random order."""
    questions = [_exists(rng, figures, colours)]
    if len({figure.shape for figure in figures}) == len(figures) > 1:
        figure, other = (figures[int(i)] for i in rng.permutation(len(figures))[:2])
        questions += [
            Question("colour", f"What colour is the {figure.shape}?", figure.colour, figure.phrase),
            Question("shape", f"What shape is {figure.colour}?", figure.shape, figure.phrase),
            Question("size", f"Is the {figure.shape} small or large?", figure.size, figure.phrase),
            Question("texture", f"Is the {figure.shape} plain, striped or dotted?", figure.texture, figure.phrase),
        ]
        if figure.column != other.column:
            answer = "left" if figure.column < other.column else "right"
            questions.append(Question("relation", f"Is the {figure.shape} left or right of the {other.shape}?", answer, figure.phrase))
        questions += _positions(figures)
    else:
        first = figures[0]
        questions += [
            Question("count", f"How many {plural(counted)} are there?", str(len(figures)), first.phrase)
            for counted in (first.shape, first.phrase, f"{first.colour} shape")
        ]
    if word:
        questions.append(Question("word", "What word is written?", word, _word(word)))
    return [questions[int(i)] for i in rng.permutation(len(questions))]


def _exists(rng: np.random.Generator, figures: list[Figure], colours: list[str]) -> Question:
    """Is there such a figure? The `no` keeps the shape and changes the colour, so that neither word alone tells."""
    figure = figures[int(rng.integers(len(figures)))]
    if rng.random() < 0.5:
        return Question("exists", f"Is there {article(figure.phrase)}?", "yes", figure.phrase)
    absent = [colour for colour in colours if colour != figure.colour]
    return Question("exists", f"Is there {article(str(rng.choice(absent)))} {figure.shape}?", "no", figure.phrase)


def _positions(figures: list[Figure]) -> list[Question]:
    """What is at each side where one figure alone is the outermost."""
    questions = []
    for side, place in (
        ("left", lambda f: f.column),
        ("right", lambda f: -f.column),
        ("top", lambda f: f.row),
        ("bottom", lambda f: -f.row),
    ):
        first, second = sorted(figures, key=place)[:2]
        if place(first) != place(second):
            where = f"on the {side}" if side in ("left", "right") else f"at the {side}"
            questions.append(Question("position", f"What shape is {where}?", first.shape, first.phrase))
    return questions
