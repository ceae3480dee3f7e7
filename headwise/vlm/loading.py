"""Load a model with its processor from a folder, from the Hub, or the embedded one."""

import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
)

from headwise.checkpoints import Dtype, quiet, torch_device, torch_dtype
from headwise.files import sha256_tree
from headwise.observation import EMBEDDED, EMBEDDED_TEXT, Observation
from headwise.vlm.families import FAMILIES, VLM, Family


def load_vlm(source: str | Path, *, dtype: Dtype = "auto", device: str = "auto", chat_template: bool = True) -> VLM:
    """Load a transformers folder, a model of the Hugging Face Hub, `headwise-smol`, or `smollm2-135m-instruct`.

    chat_template: whether it writes the prompts; a text-only model can do without, and goes on with the prompt's text. dtype `auto` is
    bfloat16 where the hardware multiplies it (CUDA, CPUs with AMX or AVX512-BF16), else float32. Code that comes with a model is never run.
    Raises ValueError if the source cannot be read, its family is unknown, its processor lacks a setting, or the model sees and is to do
    without its chat template.
    """
    path = model_path(source)
    where = torch_device(device)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        family = _family(config, str(source))
        loader: Any = AutoModelForImageTextToText if family.layout else AutoModelForCausalLM
        with quiet():
            model, loaded = loader.from_pretrained(path, dtype=torch_dtype(dtype, where), trust_remote_code=False, output_loading_info=True)
        processor = (AutoProcessor if family.layout else AutoTokenizer).from_pretrained(path, trust_remote_code=False)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{source}: neither a folder with a model nor one that can be downloaded ({reason})") from error
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"{source}: the weights lack {len(missing)} tensors of the model, the first is {missing[0]}")
    if getattr(processor, "patch_size", 0) is None:
        side = getattr(config.vision_config, "patch_size", "the vision tower's stride")
        raise ValueError(f"{source}: its processor does not know how many tokens an image takes: save it with patch_size={side}")
    if not chat_template and processor.chat_template:
        if family.layout:
            raise ValueError(f"{source}: chat_template = false is for text alone; what this model makes of images its template says")
        processor.chat_template = None
    model.to(where).eval()
    return VLM(model, processor, family)


def load_observed(observed: Observation) -> VLM:
    """The model of a run. Raises ValueError as `load_vlm`."""
    return load_vlm(observed.model, dtype=observed.dtype, chat_template=observed.chat_template)


def with_adapter(model: nn.Module, adapter: Path) -> PeftModel:
    """The model with the PEFT adapter on it. Raises ValueError unless every tensor of it finds its place and every place its tensor: PEFT
    would warn of the one, ignore the other, and go on with an adapter that does little or nothing.
    """
    with quiet():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            adapted = PeftModel.from_pretrained(model, str(adapter))
        except (UserWarning, SafetensorError, RuntimeError) as error:  # the last one: other shapes
            raise ValueError(f"{adapter}: the adapter does not fit the model ({str(error).splitlines()[0][:200]})") from error
    placed = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if left := sorted(set(load_peft_weights(str(adapter), device="cpu")) - set(placed)):
        raise ValueError(f"{adapter}: {len(left)} tensors belong to no module that adapter_config.json names, the first is {left[0]}")
    return adapted


def model_path(source: str | Path) -> str:
    """The source as transformers takes it; the embedded model becomes its folder. Raises ValueError on a path where nothing is."""
    if source in (EMBEDDED, EMBEDDED_TEXT):
        from headwise.smol import smol_path, text_path  # unpack and check the weights, which other sources do not need

        return str(smol_path() if source == EMBEDDED else text_path())
    if Path(source).is_dir():
        if not (Path(source) / "config.json").is_file():
            raise ValueError(f"{source}: no config.json here, so it is no transformers folder")
        return str(source)
    if isinstance(source, Path) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(
            f"{source}: no such folder; give a transformers folder, a model of the Hugging Face Hub, {EMBEDDED!r} or {EMBEDDED_TEXT!r}"
        )
    return str(source)


def revision(source: str | Path) -> str:
    """What exactly is loaded from the source: the SHA-256 of the folder's files, or the commit on the Hub."""
    path = model_path(source)
    return sha256_tree(Path(path)) if Path(path).is_dir() else str(AutoConfig.from_pretrained(path, trust_remote_code=False)._commit_hash)


def _family(config: PreTrainedConfig, source: str) -> Family:
    if config.model_type not in FAMILIES:
        raise ValueError(f"{source}: the family {config.model_type!r} is unknown; Headwise knows {', '.join(sorted(FAMILIES))}")
    if config.get_text_config().is_encoder_decoder:
        raise ValueError(f"{source}: its language model is an encoder with a decoder; Headwise reads decoders alone")
    return FAMILIES[config.model_type]
