"""Vision-language models: load, encode, generate."""

from headwise.vlm.encoding import Batch, encode, generate
from headwise.vlm.families import FAMILIES, VLM, Family
from headwise.vlm.loading import adapt, load_vlm, model_path, quiet, revision, with_adapter

__all__ = [
    "FAMILIES",
    "VLM",
    "Batch",
    "Family",
    "adapt",
    "encode",
    "generate",
    "load_vlm",
    "model_path",
    "quiet",
    "revision",
    "with_adapter",
]
