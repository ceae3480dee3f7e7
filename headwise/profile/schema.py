"""What the profile of the heads holds: heads.parquet (in the form of the scores), the calibration set, and how alike heads look."""

import pyarrow as pa

SAMPLE = pa.schema(
    [
        ("example_id", pa.string()),
        ("image", pa.string()),
        ("sha256", pa.string()),
        ("task", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("blank", pa.bool_()),
    ]
)
"""sample.parquet: the calibration set as it was asked, with the model's own answers; `blank`: about a grey image of the image's size."""

PROFILED = ("text_to_image", "image_to_text", "saliency", "isal", "caf_signed", "caf")
"""The statistics of heads.parquet: the two halves of the saliency, their mean, its z-score within the layer, and the causal flow, with the
sign that eq. 5 gives it and as a strength."""

SAMPLE_FILE, COSINES_FILE, PROFILE_FILE = "sample.parquet", "cosines.safetensors", "profile.json"
