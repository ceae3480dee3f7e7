"""Composed photographs: labelled RGBA cut-outs on background photographs, with exact masks from the alpha channel.

Any folder of cut-outs (a PNG with an alpha channel, its name in a text file beside it or in its file name) goes on any folder of
photographs. `installed_photographs` is the ready recipe for the ones that Debian ships.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image, ImageEnhance

from headwise.compositions import MAX_DRAWS, SIZE, Composition, Question, Thing, article, enumerate_phrases, relight, split_of
from headwise.files import sha256_file

STAMPS = Path("/usr/share/tuxpaint/stamps")
BACKGROUNDS = Path("/usr/share/backgrounds")
DEBIAN_PACKAGES = ("tuxpaint-stamps-default", "lomiri-wallpapers-16.04", "mate-backgrounds")
NOT_PHOTOGRAPHS = re.compile(
    r"cartoon|symbols|flags|people|roadsigns|seasonal|space|naturalforces|hats|abstract|desktop|cosmos|_mirror|_flip"
)
MAX_WORDS = 3
MIN_NAMES = 8
DRIFT_SHARE = 0.15
BACKGROUND_SHARES = {"pretrain": 0.47, "calibration": 0.18, "evaluation": 0.2, "forgetting": 0.15}
"""Shares of the checksums of the file names. The weights in the repository were trained on the `pretrain` photographs of Debian's packages
under exactly these edges: another edge could show them a background that an evaluation holds out."""
SHORTEST_BACKGROUND = 640


@dataclass(frozen=True)
class Cutout:
    """An RGBA picture of one thing, and the thing's name."""

    path: Path
    name: str


@dataclass(frozen=True)
class Photographs:
    """Cut-outs and background photographs, each list sorted and shared out by a checksum of the name, whatever else is installed.

    Held out from a split are the other splits' backgrounds and compositions, and from pretraining the drift's names. Cut-out files are
    not: nearly every name has only one, so all splits that know a name show the same cut-out of it.
    """

    cutouts: tuple[Cutout, ...]
    backgrounds: tuple[Path, ...]

    def names(self, *, drift: bool) -> list[str]:
        """The names that pretraining sees, or the ones kept out of it for the drift."""
        names = sorted({cutout.name for cutout in self.cutouts})
        return [name for name in names if (crc32(name.encode()) % 1000 < DRIFT_SHARE * 1000) is drift]

    def files(self, name: str) -> list[Path]:
        """The cut-outs of that name, the same in every split."""
        return [cutout.path for cutout in self.cutouts if cutout.name == name]

    def split_backgrounds(self, split: str) -> list[Path]:
        """The split's own photographs; no two splits share one."""
        return [path for path in self.backgrounds if background_split(path.name) == split]

    def digest(self) -> str:
        """SHA-256 of all that compositions depend on: the files' bytes, their names, and what the cut-outs show."""
        lines = [f"{sha256_file(cutout.path)}  {cutout.path.name}  {cutout.name}\n" for cutout in self.cutouts]
        lines += [f"{sha256_file(path)}  {path.name}\n" for path in self.backgrounds]
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def background_split(name: str) -> str:
    """The split that a background photograph belongs to, by its file name alone."""
    return split_of(name, BACKGROUND_SHARES)


def read_photographs(cutouts: Path, backgrounds: Path) -> Photographs:
    """Find named cut-outs (PNG) and background photographs (JPEG) below two folders.

    Raises ValueError with the two counts if there are too few to compose from, or naming a split that gets no photograph.
    """
    named = [Cutout(path, name) for path in _pictures(cutouts, ".png") if (name := _name(path))]
    photographs = _pictures(backgrounds, ".jpg", ".jpeg")
    found = Photographs(tuple(named), tuple(photographs))
    known = found.names(drift=False)
    if len(known) < MIN_NAMES or len(photographs) < 2 * len(BACKGROUND_SHARES):
        raise ValueError(
            f"cut-outs of {len(known)} different names below {cutouts} (besides those kept for the drift) and {len(photographs)} "
            f"photographs below {backgrounds}: too few to compose from; on Debian: apt-get install {' '.join(DEBIAN_PACKAGES)}"
        )
    if empty := [split for split in BACKGROUND_SHARES if not found.split_backgrounds(split)]:
        raise ValueError(
            f"{backgrounds}: none of the {len(photographs)} photographs falls to {', '.join(empty)} (by a checksum of the file name); "
            "add photographs, or rename some"
        )
    return found


def installed_photographs() -> Photographs:
    """The Tux Paint stamps and the wallpapers that Debian's packages install, read where they lie."""
    return read_photographs(STAMPS, BACKGROUNDS)


def _pictures(folder: Path, *suffixes: str) -> list[Path]:
    """The files of these types below the folder, sorted, but for those whose path below it says that they show no things."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    return sorted(path for path in found if not NOT_PHOTOGRAPHS.search(path.relative_to(folder).as_posix()))


def _name(path: Path) -> str | None:
    """The short name of the thing, in lower case; None where the caption is a sentence or has other than plain letters."""
    text = path.with_suffix(".txt")
    caption = text.read_text(encoding="utf-8", errors="replace").partition("\n")[0] if text.is_file() else path.stem.replace("_", " ")
    first = re.split(r"[.!?;:(]", caption)[0].strip()
    name, articles = re.subn(r"^(an?|the|some)\s+", "", first, flags=re.IGNORECASE)
    plain = re.fullmatch(r"[a-z][a-z-]*( [a-z][a-z-]*)*", name.lower())
    return name.lower() if plain and len(name.split()) <= (MAX_WORDS if articles else 2) else None


def compose_photograph(photographs: Photographs, split: str, rng: np.random.Generator, *, drift: bool = False) -> Composition:
    """One or two cut-outs on a crop of a photograph of the split. `drift` brings in the names kept out of pretraining and another light."""
    known, unknown = photographs.names(drift=False), photographs.names(drift=True)
    drawn = (_draw_names(rng, known, unknown if drift else []) for _ in range(MAX_DRAWS))
    names = next((names for names in drawn if split_of(" | ".join(names)) == split), None)
    if names is None:
        raise ValueError(f"no composition of the {len(known)} names falls to {split!r}: more cut-outs of other names are needed")
    number, pool = len(names), known + unknown if drift else known
    image = _crop(str(rng.choice([str(path) for path in photographs.split_backgrounds(split)])), rng)
    centres = (SIZE / 2,) if number == 1 else (SIZE * 0.27, SIZE * 0.73)
    things = []
    for name, centre in zip(names, centres, strict=True):
        path = photographs.files(name)[int(rng.integers(len(photographs.files(name))))]
        pasted = _paste(image, str(path), centre, rng)
        for thing in things:
            thing.mask[pasted] = False  # the later cut-out lies on top
        things.append(Thing(name, pasted))
    questions = _questions(names, [name for name in pool if name not in names], rng)
    return Composition(relight(image, rng) if drift else image, tuple(things), tuple(questions))


def _draw_names(rng: np.random.Generator, known: Sequence[str], unknown: Sequence[str]) -> list[str]:
    """One name or two different ones, from left to right; with unknown names to choose from, most often one of those is among them."""
    first = str(rng.choice(unknown if unknown and rng.random() < 0.6 else known))
    others = [name for name in (*known, *unknown) if name != first]
    names = [first] if rng.random() < 0.15 else [first, others[int(rng.integers(len(others)))]]
    return [names[int(i)] for i in rng.permutation(len(names))]


@lru_cache(maxsize=64)
def _background(path: str) -> Image.Image:
    image = Image.open(path)
    image.draft("RGB", (SHORTEST_BACKGROUND, SHORTEST_BACKGROUND))
    image = image.convert("RGB")
    scale = SHORTEST_BACKGROUND / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


@lru_cache(maxsize=1024)
def _cutout(path: str) -> Image.Image:
    image = Image.open(path).convert("RGBA")
    box = image.getchannel("A").point([0] * 128 + [255] * 128).getbbox()
    if box is None:
        raise ValueError(f"{path}: the cut-out is transparent all over")
    image = image.crop(box)
    image.thumbnail((220, 220))
    return image


def _crop(path: str, rng: np.random.Generator) -> Image.Image:
    photograph = _background(path)
    side = int(rng.uniform(0.5, 1.0) * SHORTEST_BACKGROUND)
    x, y = (int(rng.integers(0, extent - side + 1)) for extent in photograph.size)
    image = photograph.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def _paste(image: Image.Image, path: str, centre: float, rng: np.random.Generator) -> np.ndarray:
    """Paste the cut-out around x = `centre` and return the pixels it covers."""
    cutout = _cutout(path)
    scale = rng.uniform(0.8, 1.0) * min(150 / cutout.width, 180 / cutout.height)
    cutout = cutout.resize((max(8, round(cutout.width * scale)), max(8, round(cutout.height * scale))), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    lit = ImageEnhance.Brightness(cutout.convert("RGB")).enhance(rng.uniform(0.85, 1.15))
    x = int(np.clip(centre + rng.uniform(-12, 12) - cutout.width / 2, 0, SIZE - cutout.width))
    y = int(np.clip(SIZE / 2 + rng.uniform(-60, 60) - cutout.height / 2, 0, SIZE - cutout.height))
    alpha = cutout.getchannel("A")
    image.paste(lit, (x, y), alpha)
    mask = np.zeros((SIZE, SIZE), dtype=bool)
    mask[y : y + cutout.height, x : x + cutout.width] = np.asarray(alpha) > 127
    return mask


def _questions(names: Sequence[str], absent: Sequence[str], rng: np.random.Generator) -> list[Question]:
    """The caption, and every question whose answer is beyond doubt, in random order."""
    shown = names[int(rng.integers(len(names)))]
    missing = str(rng.choice(list(absent)))
    asked = Question("exists", f"Is there {article(shown)}?", "yes", shown)
    if rng.random() < 0.5:
        asked = Question("exists", f"Is there {article(missing)}?", "no")
    if len(names) == 1:
        caption = f"a photo of {article(names[0])}."
        questions = [asked, Question("name", "What is in the picture?", names[0], names[0])]
    else:
        placed = [f"{article(name)} on the {side}" for name, side in zip(names, ("left", "right"), strict=True)]
        caption = f"a photo of {enumerate_phrases(placed)}."
        subject = int(rng.integers(2))
        relation = f"Is the {names[subject]} left or right of the {names[1 - subject]}?"
        questions = [
            asked,
            Question("left", "What is on the left?", names[0], names[0]),
            Question("right", "What is on the right?", names[1], names[1]),
            Question("relation", relation, ("left", "right")[subject], names[subject]),
        ]
    return [Question("caption", "Describe the image.", caption), *(questions[int(i)] for i in rng.permutation(len(questions)))]
