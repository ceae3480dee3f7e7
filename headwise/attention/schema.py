"""part.parquet: what is stored of every head's attention; apart from the code that observes, so that reading it loads no model."""

import pyarrow as pa

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

ATTENTION = pa.schema(
    [
        ("example_id", pa.string()),
        ("layer", pa.int16()),
        ("head", pa.int16()),
        ("grid_height", pa.int16()),
        ("grid_width", pa.int16()),
        *((name, type_) for map_ in MAPS for name, type_ in ((map_, pa.list_(pa.float16())), (f"{map_}_max", pa.float32()))),
        *((name, pa.float32()) for name in SCALARS),
    ]
)
"""One row per example, layer and head, sorted by them. A map is divided by its maximum, so that fp16 keeps its small values;
`map * map_max` gives it back. Without an image the maps are empty and the grid is 0 x 0."""

PART = "part.parquet"
