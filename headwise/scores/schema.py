"""heads.parquet and examples.parquet: the scores of every head, over the examples and example by example."""

import pyarrow as pa

HEADS = pa.schema(
    [
        ("layer", pa.int16()),
        ("head", pa.int16()),
        ("statistic", pa.string()),
        ("value", pa.float64()),
        ("n", pa.int32()),
        ("low", pa.float64()),
        ("high", pa.float64()),
    ]
)
"""One row per layer, head and statistic: its mean over `n` examples. `low` and `high` bound the 95 % bootstrap interval over images (all
questions of an image are drawn together); null where the statistic has none, and `value` too where no example has the statistic.
The statistics are `IMPACTS`, unless the visual tokens have no place in the image, and the scalars of the attention table, which are means
over all observed examples."""

EXAMPLE_SCORES = pa.schema(
    [
        ("example_id", pa.string()),
        ("image", pa.string()),
        ("layer", pa.int16()),
        ("head", pa.int16()),
        ("head_impact", pa.float32()),
        ("chance", pa.float32()),
        ("head_impact_nosink", pa.float32()),
    ]
)
"""One row per example, layer and head, sorted by them; each score an IoU in [0, 1]. `image` is the unit that intervals resample; `chance`:
the mean IoU with masks of other images of the same layout, null if there is none; `head_impact_nosink`: null if the mask lies on sink
tokens alone."""

IMPACTS = ("head_impact", "head_impact_adjusted", "head_impact_nosink")
"""The statistics of heads.parquet that compare the map with the mask; they have a bootstrap interval."""

HEADS_FILE, EXAMPLES_FILE, TESTS_FILE = "heads.parquet", "examples.parquet", "tests.json"
