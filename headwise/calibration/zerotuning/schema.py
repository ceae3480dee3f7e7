"""What ZeroTuning records of every head and of every candidate that it tried."""

import pyarrow as pa

HEADS = pa.schema([("layer", pa.int16()), ("head", pa.int16()), ("effect", pa.float64()), ("gamma", pa.float64())])
"""heads.parquet: one row per head, sorted. `effect`: what the mean loss changes by per unit of log gamma, below 0 where more attention to
the first token helps. `gamma`: what its attention to the first token is scaled by; 1 where it was not chosen."""

TRIALS = pa.schema(
    [
        ("direction", pa.string()),
        ("share", pa.float64()),
        ("gamma", pa.float64()),
        ("heads", pa.int32()),
        ("examples", pa.int32()),
        ("accuracy", pa.float64()),
        ("nats", pa.float64()),
        ("entropy", pa.float64()),
        ("kept", pa.bool_()),
    ]
)
"""trials.parquet: the model as it is (share 0, gamma 1, no direction), then the candidates in the order they were tried: the `share` of
heads that was asked for and how many `heads` that came to, on how many examples; `accuracy` and `nats` among the labels, the `entropy` of
the next token; whether the candidate went on, at the end as the winner."""

HEADS_FILE, TRIALS_FILE = "heads.parquet", "trials.parquet"
