"""Where visual tokens lie on an image; apart from the segments, so that reading stored attention and drawing it load no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class View:
    """A grid of visual tokens, in reading order, that shows one region of the image.

    top, left, bottom, right: the region's borders as fractions of the image's height and width; beyond 0 or 1 where the image processor
    pads. The whole image by default.
    """

    rows: int
    columns: int
    top: float = 0.0
    left: float = 0.0
    bottom: float = 1.0
    right: float = 1.0

    @property
    def cells(self) -> int:
        """Visual tokens of the view."""
        return self.rows * self.columns

    @property
    def area(self) -> float:
        """The region's size in images."""
        return (self.bottom - self.top) * (self.right - self.left)

    def __str__(self) -> str:
        """Rows and columns, and the region unless it is the whole image."""
        borders = (self.top, self.left, self.bottom, self.right)
        region = "" if borders == (0, 0, 1, 1) else f" at {' '.join(f'{border:g}' for border in borders)}"
        return f"{self.rows} x {self.columns}{region}"


Layout = tuple[View, ...]
"""Where the visual tokens of one prompt lie on the image: the views in the order of their tokens (tiles, a global view, or one grid).
Empty if the tokens have no place (the queries of a Q-Former)."""


def layout_name(layout: Layout) -> str:
    """The views one after the other, for messages and as a key: "2 x 2 at 0 0 1 0.5 + 2 x 2"."""
    return " + ".join(map(str, layout))
