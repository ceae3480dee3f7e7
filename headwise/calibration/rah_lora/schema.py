"""What RAH-LoRA records of every target and of every step size that it tried."""

import pyarrow as pa

ANCHOR = pa.struct(
    [("layer", pa.int16()), ("head", pa.int16()), *((name, pa.float64()) for name in ("similarity", "maps", "values", "outputs"))]
)
TARGETS = pa.schema(
    [
        ("layer", pa.int16()),
        ("head", pa.int16()),
        ("isal", pa.float64()),
        ("caf", pa.float64()),
        ("gap", pa.float64()),
        ("outcome", pa.string()),
        ("reason", pa.string()),
        ("anchors", pa.list_(ANCHOR)),
        ("singular_values", pa.list_(pa.float64())),
        ("effective_rank", pa.float64()),
        ("damping", pa.float64()),
        ("projections", pa.list_(pa.string())),
        ("alpha", pa.float64()),
        ("kl_before", pa.float64()),
        ("kl_after", pa.float64()),
    ]
)
"""targets.parquet: one row per target, sorted. `gap`: z(CAF) - z(I-SAL), each within the layer. `outcome`: accepted, rolled back or
skipped, and the `reason` of the last two. `singular_values`: of the whole change of its output projection at step size 1; `damping`: the
cosine of that change with `-W`, 1 where the head is only turned down. `kl_before` and `kl_after`: the divergence with all that was accepted
before it was tried, and after; null where it was not tried."""

TRIALS = pa.schema([("layer", pa.int16()), ("head", pa.int16()), ("alpha", pa.float64()), ("kl", pa.float64()), ("accepted", pa.bool_())])
"""trials.parquet: the step sizes in the order they were tried, and the divergence of each; no head where it was all targets at once."""

CURVE = pa.schema([("scale", pa.float64()), ("kl", pa.float64())])
"""curve.parquet: the divergence of the accepted change times each scale, 1 the change itself; no row where nothing was accepted."""

NEGLIGIBLE = 0.01
"""The least scale: the divergence there is what a coarse number type makes of any change at all."""

GAINS = pa.schema(
    [
        ("layer", pa.int16()),
        ("head", pa.int16()),
        ("gain", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("examples", pa.int32()),
    ]
)
"""gains.parquet: nats that the reference answers lose by an accepted head's change alone, above 0 if it helps; no head: by the whole
adapter."""

TARGETS_FILE, TRIALS_FILE, CURVE_FILE, GAINS_FILE = "targets.parquet", "trials.parquet", "curve.parquet", "gains.parquet"
