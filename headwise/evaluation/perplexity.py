"""Corpus perplexity: two sums, divided once at the end."""

import math

import polars as pl


def perplexity(nats: float, tokens: int) -> float:
    """`exp(sum of nats / sum of tokens)`, at least 1.

    Raises ValueError without a token, or where the nats are not finite.
    """
    if tokens < 1 or not math.isfinite(nats):
        raise ValueError(f"perplexity of {nats} nats over {tokens} tokens: it needs finite nats and at least one token")
    return math.exp(nats / tokens)


def corpus_perplexity(answers: pl.DataFrame) -> float:
    """The perplexity of all reference answers of the table (columns `nats`, `tokens`), end-of-turn tokens included."""
    return perplexity(float(answers["nats"].sum()), int(answers["tokens"].sum()))
