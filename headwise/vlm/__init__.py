"""Vision-language models: load, encode, generate."""

from headwise.vlm.encoding import Batch, decode_new, encode, generate, generate_ids, stop_ids
from headwise.vlm.families import FAMILIES, VLM, Family
from headwise.vlm.loading import adapt, load_vlm, model_path, revision, with_adapter

__all__ = [
    "FAMILIES",
    "VLM",
    "Batch",
    "Family",
    "adapt",
    "decode_new",
    "encode",
    "generate",
    "generate_ids",
    "load_vlm",
    "model_path",
    "revision",
    "stop_ids",
    "with_adapter",
]
