"""part.parquet: what is stored of every head's attention; apart from the code that observes, so that reading it loads no model."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from headwise.layout import Layout, View, layout_name

MAPS = ("map", "text_image_map")

SCALARS = (
    "visual_mass",
    "text_mass",
    "system_mass",
    "initial_mass",
    "max_visual",
    "nonvisual_entropy",
    "text_to_image",
    "image_to_text",
    "key_variance",
)
"""The scalar statistics of `reducers`, in the order of their columns."""

BORDERS = ("top", "left", "bottom", "right")
VIEW = pa.struct([("rows", pa.int16()), ("columns", pa.int16()), *((border, pa.float64()) for border in BORDERS)])
"""A `View` with its fields' names, exactly."""

ATTENTION = pa.schema(
    [
        ("example_id", pa.string()),
        ("layer", pa.int16()),
        ("head", pa.int16()),
        ("views", pa.list_(VIEW)),
        *((name, type_) for map_ in MAPS for name, type_ in ((map_, pa.list_(pa.float16())), (f"{map_}_max", pa.float32()))),
        *((name, pa.float32()) for name in SCALARS),
    ]
)
"""One row per example, layer and head, sorted by them. A map is divided by its maximum, so that fp16 keeps its small values;
`map * map_max` gives it back. `views`: the layout of the visual tokens on the image, the same in all rows of an example; none where they
have no place (the queries of a Q-Former), nor without an image, where the maps are empty."""

PART = "part.parquet"


def read_layout(views: Sequence[Mapping[str, Any]], tokens: int) -> Layout | None:
    """The layout that is stored with maps of so many visual tokens; None without an image.

    Raises ValueError with both numbers if the views have more or fewer cells.
    """
    layout = tuple(View(**view) for view in views)
    cells = sum(view.cells for view in layout)
    if layout and cells != tokens:
        raise ValueError(f"maps of {tokens} visual tokens, its views have {cells} cells ({layout_name(layout)})")
    return layout if tokens else None
