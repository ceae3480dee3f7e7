"""A small model of every family that Headwise knows, built in memory from transformers' own classes, with seeded random weights.

Their weights are wide enough for attention that is far from uniform; sliding windows are shorter than the prompts, and the settings of
tiling image processors give several tiles for `tests.tiny.image`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BlipImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InstructBlipConfig,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from headwise.vlm import FAMILIES, VLM
from headwise.vlm.families import TEXT_ONLY
from tests.tiny import byte_pairs, new_tiny_vlm, text_config, tokenizer

SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
LENGTH = 512
WIDE = 0.2
SIDE, PATCH = 32, 8
"""Pixels of a tile or of a whole image, and of a patch."""

EXTRA: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    "qwen3": {},
    "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": False},
    "gemma": {"num_key_value_heads": 1},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
    "gemma3_text": {
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
}
"""What the language models have of their own: windows, caps, layers without positions, one KV head for all."""

TEXT_FAMILIES = tuple(EXTRA)


def language_config(model_type: str, words: PreTrainedTokenizerFast, **changes: object) -> PreTrainedConfig:
    """A language model of 4 layers, 6 query and 3 KV heads."""
    own = text_config()
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    values = {name: getattr(own, name) for name in SHARED} | ids | {"vocab_size": len(words), "max_position_embeddings": LENGTH}
    values |= {"num_key_value_heads": 3, "initializer_range": WIDE}
    return AutoConfig.for_model(model_type, **(values | EXTRA.get(model_type, {}) | changes))


def language_model(model_type: str, **changes: object) -> VLM:
    """A fresh text-only model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(language_config(model_type, tokenizer(), **changes))
    return VLM(model.eval(), tokenizer(), FAMILIES.get(model_type, TEXT_ONLY))


BODY = (
    "{{ begin }}{% for turn in messages %}{{ user if turn['role'] == 'user' else assistant + lead }}"
    "{% if turn['content'] is string %}{{ turn['content'] }}{% else %}{% for part in turn['content'] %}"
    "{{ image if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{{ end if turn['role'] == 'user' else close }}{% endfor %}{% if add_generation_prompt %}{{ assistant }}{% endif %}"
)


def template(*, begin: str = "", user: str, image: str, end: str, assistant: str, lead: str = "", close: str) -> str:
    """A chat template. user, assistant: what opens a turn; end, close: what follows a question and an answer; lead: before an answer."""
    pieces = {"begin": begin, "user": user, "image": image, "end": end, "assistant": assistant, "lead": lead, "close": close}
    return "".join(f"{{% set {name} = {piece!r} %}}" for name, piece in pieces.items()) + BODY


def words_of(
    special: Sequence[str] = (), named: Mapping[str, str] | None = None, *, bos: str = "<s>", eos: str = "</s>", adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """A tokenizer with a family's special tokens. named: those that its processor asks the tokenizer for."""
    every = list(dict.fromkeys([bos, eos, *special, *(named or {}).values()]))
    core = byte_pairs(every)
    if adds_bos:
        core.post_processor = TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, every.index(bos))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        extra_special_tokens=list(special),
        model_specific_special_tokens=dict(named or {}),
    )


def assembled(config: PreTrainedConfig, processor: ProcessorMixin) -> VLM:
    """The model of the configuration. What families start from zero, so that an image would make no difference, is drawn."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("query_tokens", "mm_input_projection_weight", "position_embedding", "cls_token", "position_embeddings")):
                nn.init.normal_(parameter, std=WIDE)
    return VLM(model, processor, FAMILIES[config.model_type])


def clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(**TOWER, projection_dim=16)


def siglip() -> SiglipVisionConfig:
    return SiglipVisionConfig(**TOWER, vision_use_head=False)


TOWER = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"image_size": SIDE, "patch_size": PATCH, "initializer_range": WIDE},
}
SQUARE = {"height": SIDE, "width": SIDE}
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [SIDE, 3 * SIDE], [3 * SIDE, SIDE]]
CHATML = {"user": "<|im_start|>user\n", "end": "<|im_end|>\n", "assistant": "<|im_start|>assistant\n", "close": "<|im_end|>\n"}


def llava() -> VLM:
    words = words_of(["<image>"], adds_bos=True)
    chat = template(user="USER: ", image="<image>\n", end=" ", assistant="ASSISTANT:", lead=" ", close="</s>")
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    processor = LlavaProcessor(images, words, PATCH, "default", chat_template=chat, num_additional_image_tokens=1)
    text = language_config("llama", words)
    return assembled(
        LlavaConfig(vision_config=clip(), text_config=text, image_token_index=words.convert_tokens_to_ids("<image>")), processor
    )


def llava_next() -> VLM:
    words = words_of(["<image>"], adds_bos=True)
    chat = template(user="[INST] ", image="<image>\n", end=" [/INST]", assistant="", lead=" ", close="</s>")
    images = LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS)
    processor = LlavaNextProcessor(images, words, PATCH, "default", chat_template=chat, num_additional_image_tokens=1)
    text, image_id = language_config("mistral", words, sliding_window=24), words.convert_tokens_to_ids("<image>")
    return assembled(
        LlavaNextConfig(vision_config=clip(), text_config=text, image_token_index=image_id, image_grid_pinpoints=PINPOINTS), processor
    )


def llava_onevision() -> VLM:
    words = words_of(["<image>", "<video>"], bos="<|im_start|>", eos="<|im_end|>")
    chat = template(user="<|im_start|>user ", image="<image>\n", end="<|im_end|>", assistant="<|im_start|>assistant\n", close="<|im_end|>")
    images = LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS)
    tokens = (SIDE // PATCH) ** 2
    processor = LlavaOnevisionProcessor(images, words, LlavaOnevisionVideoProcessor(), tokens, "full", chat_template=chat)
    image_id, video_id = words.convert_tokens_to_ids(["<image>", "<video>"])
    text = language_config("qwen2", words)
    config = LlavaOnevisionConfig(
        vision_config=siglip(),
        text_config=text,
        image_token_index=image_id,
        video_token_index=video_id,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
    )
    return assembled(config, processor)


def qwen_vl(config: type, processor: type, video: type, vision: dict[str, object], **rope: object) -> VLM:
    """Qwen's three: one sequence of patches, 2 x 2 of them merged into a token, and positions of three axes."""
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = words_of(special, bos="<|im_start|>", eos="<|im_end|>")
    begin = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    chat = template(begin=begin, image="<|vision_start|><|image_pad|><|vision_end|>", **CHATML)
    images = Qwen2VLImageProcessor(patch_size=PATCH, min_pixels=4 * PATCH**2, max_pixels=64 * PATCH**2)
    ids = dict(zip(("vision_start", "vision_end", "image", "video"), words.convert_tokens_to_ids(special), strict=True))
    parameters = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], **rope}
    text = language_config(f"{config.model_type}_text", words, rope_parameters=parameters)
    tower = {"depth": 2, "num_heads": 4, "patch_size": PATCH, "initializer_range": WIDE} | vision
    found = config(text_config=text.to_dict(), vision_config=tower, **{f"{name}_token_id": value for name, value in ids.items()})
    return assembled(found, processor(images, words, video(), chat_template=chat))


def qwen2_vl() -> VLM:
    vision = {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
    return qwen_vl(Qwen2VLConfig, Qwen2VLProcessor, Qwen2VLVideoProcessor, vision)


def qwen2_5_vl() -> VLM:
    vision = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 48, "window_size": 32, "fullatt_block_indexes": [1]}
    return qwen_vl(Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor, vision)


def qwen3_vl() -> VLM:
    vision = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 48, "num_position_embeddings": 16}
    vision["deepstack_visual_indexes"] = [0, 1]
    return qwen_vl(Qwen3VLConfig, Qwen3VLProcessor, Qwen3VLVideoProcessor, vision, mrope_interleaved=True)


def paligemma(language: str = "gemma", **changes: object) -> VLM:
    words = words_of(["<image>"], {"image_token": "<image>"}, bos="<bos>", eos="<eos>")
    images = SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = (SIDE // PATCH) ** 2
    processor = PaliGemmaProcessor(images, words)
    text = language_config(language, words, **changes)  # after the processor, which adds tokens
    config = PaliGemmaConfig(
        vision_config=siglip(),
        text_config=text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=48,
        hidden_size=48,
    )
    return assembled(config, processor)


def paligemma2() -> VLM:
    return paligemma("gemma2")


def idefics3(config: type = Idefics3Config, end: str = "<end_of_utterance>\n") -> VLM:
    """Idefics3 and SmolVLM: tiles of a grid and then the whole image, each with marks around it."""
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    special = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *places]
    is_smol = config is SmolVLMConfig
    words = words_of(special, bos="<|im_start|>" if is_smol else "<|begin_of_text|>", eos="<end_of_utterance>" if is_smol else "<eos>")
    chat = template(begin=words.bos_token, user="User:", image="<image>", end=end, assistant="Assistant:", lead=" ", close=end)
    sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    if is_smol:
        images = SmolVLMImageProcessor(**sizes)
        processor = SmolVLMProcessor(images, words, SmolVLMVideoProcessor(), image_seq_len=4, chat_template=chat)
    else:
        processor = Idefics3Processor(Idefics3ImageProcessor(**sizes), words, image_seq_len=4, chat_template=chat)
    text, image_id = language_config("llama", words), words.convert_tokens_to_ids("<image>")
    vision = TOWER | {"model_type": f"{config.model_type}_vision"}
    return assembled(config(text_config=text, vision_config=vision, image_token_id=image_id, scale_factor=2), processor)


def smolvlm() -> VLM:
    return idefics3(SmolVLMConfig)


def internvl() -> VLM:
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    words = words_of([], named, bos="<|im_start|>", eos="<|im_end|>")
    images = GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=6)
    chat = template(image="<IMG_CONTEXT>\n", **CHATML)
    processor = InternVLProcessor(images, words, InternVLVideoProcessor(), image_seq_length=4, chat_template=chat)
    vision = InternVLVisionConfig(**(TOWER | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}))
    text, image_id = language_config("qwen2", words), words.convert_tokens_to_ids("<IMG_CONTEXT>")
    return assembled(
        InternVLConfig(vision_config=vision, text_config=text, image_token_id=image_id, image_seq_length=4, tie_word_embeddings=False),
        processor,
    )


def gemma3() -> VLM:
    named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    words = words_of(["<start_of_turn>", "<end_of_turn>"], named, bos="<bos>", eos="<eos>", adds_bos=True)
    end = "<end_of_turn>\n"
    turns = {"user": "<start_of_turn>user\n", "assistant": "<start_of_turn>model\n", "end": end, "close": end}
    chat = template(begin="<bos>", image="<start_of_image>", **turns)
    processor = Gemma3Processor(Gemma3ImageProcessor(size=SQUARE), words, chat_template=chat, image_seq_length=4)
    ids = {f"{name.removesuffix('_token')}_token_index": words.convert_tokens_to_ids(token) for name, token in named.items()}
    text = language_config("gemma3_text", words)
    return assembled(
        Gemma3Config(text_config=text, vision_config=siglip(), mm_tokens_per_image=4, initializer_range=WIDE, **ids), processor
    )


def instructblip() -> VLM:
    words = words_of(["<image>"], adds_bos=True)
    asked = words_of(bos="[CLS]", eos="[SEP]", adds_bos=True)
    processor = InstructBlipProcessor(BlipImageProcessor(size=SQUARE), words, asked, num_query_tokens=4)
    sizes = {name: TOWER[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    qformer = InstructBlipQFormerConfig(vocab_size=len(asked), cross_attention_frequency=1, initializer_range=WIDE, **sizes)
    text, vision = language_config("llama", words), InstructBlipVisionConfig(**TOWER)
    ids = {"num_query_tokens": 4, "image_token_index": words.convert_tokens_to_ids("<image>"), "initializer_range": WIDE}
    return assembled(InstructBlipConfig(vision_config=vision, qformer_config=qformer, text_config=text, **ids), processor)


VISUAL: dict[str, Callable[[], VLM]] = {
    "fast_vlm": new_tiny_vlm,
    **{f.__name__: f for f in (llava, llava_next, llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, paligemma, paligemma2)},
    **{f.__name__: f for f in (smolvlm, idefics3, internvl, gemma3, instructblip)},
}
VISUAL_FAMILIES = tuple(VISUAL)
"""The families that read images, and `paligemma2`, which transformers calls `paligemma` as well."""


def fresh(name: str) -> VLM:
    """A small model of a family, to be changed at will."""
    return VISUAL[name]() if name in VISUAL else language_model(name)


@cache
def vlm(name: str) -> VLM:
    """The shared small model of a family; leave its weights as they are."""
    return fresh(name)
