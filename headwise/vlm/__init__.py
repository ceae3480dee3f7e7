"""Vision-language models: load, encode, generate."""

from headwise.vlm.encoding import TOKEN_TYPES, Batch, answer_ids, decode_new, encode, generate, generate_ids, stop_ids
from headwise.vlm.families import FAMILIES, VLM, Family
from headwise.vlm.loading import load_observed, load_vlm, model_path, revision, with_adapter

__all__ = [
    "FAMILIES",
    "TOKEN_TYPES",
    "VLM",
    "Batch",
    "Family",
    "answer_ids",
    "decode_new",
    "encode",
    "generate",
    "generate_ids",
    "load_observed",
    "load_vlm",
    "model_path",
    "revision",
    "stop_ids",
    "with_adapter",
]
