"""Vision-language models: load, encode, generate."""

from headwise.vlm.encoding import Batch, encode, generate
from headwise.vlm.families import FAMILIES, VLM, Family
from headwise.vlm.loading import EMBEDDED, adapt, load_vlm, model_path, quiet, revision

__all__ = ["EMBEDDED", "FAMILIES", "VLM", "Batch", "Family", "adapt", "encode", "generate", "load_vlm", "model_path", "quiet", "revision"]
