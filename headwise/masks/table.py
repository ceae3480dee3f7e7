"""masks.parquet: one row per example and object, whoever made the mask; an object that was dropped keeps its row with the reason."""

import pyarrow as pa

MASKS = pa.schema(
    [
        ("example_id", pa.string()),
        ("image", pa.string()),
        ("object", pa.int32()),
        ("phrase", pa.string()),
        ("key", pa.bool_()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("box", pa.list_(pa.float32())),
        ("rle", pa.string()),
        ("predicted_iou", pa.float32()),
        ("area", pa.float32()),
        ("source", pa.string()),
        ("reason", pa.string()),
    ]
)
"""`image`: its path in the data set, the unit of the statistics. `key`: the answer is about this object. `height` and `width` in pixels of
the image; `box` = [x0, y0, x1, y1] in pixels, x1 and y1 exclusive; `rle`: COCO run lengths in ascii, column-major; `predicted_iou`: the
segmenter's own estimate, null where the mask is exact; `area`: share of the image in [0, 1]; `source`: who made the mask; `reason`: why the
mask is not to be used, null if it is. An example that is about no object has a single row, all about the object null, with that reason."""

MASKS_FILE = "masks.parquet"
