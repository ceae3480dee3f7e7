"""Small real models of masks, built in memory from configurations: Florence-2 with its processor, SAM 2 behind both libraries."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TypeVar

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from torch import nn
from transformers import (
    BartConfig,
    CLIPImageProcessor,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    Florence2VisionConfig,
    PreTrainedTokenizerFast,
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2ImageProcessor,
    Sam2MaskDecoderConfig,
    Sam2Model,
    Sam2PromptEncoderConfig,
    Sam2VisionConfig,
)

from headwise.masks.florence2 import Florence2
from tests import tiny

FLORENCE_PIXELS, SAM_PIXELS = 64, 256
POSITIONS = 256
T = TypeVar("T", bound=nn.Module)
CUT = "<cut>"
"""At the end of a recorded answer: it was longer than allowed."""
BANNED = ["the image"]
PARSERS = ("pure_text", "description_with_bboxes", "phrase_grounding", "description_with_bboxes_or_polygons")


def drawn(build: Callable[[], T], seed: int = 0) -> T:
    """What it builds, with seeded weights of a size at which what goes in decides what comes out."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model.eval()


@cache
def florence_tokenizer(positions: int = POSITIONS) -> PreTrainedTokenizerFast:
    places = [f"<loc_{place}>" for place in range(1000)]
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<image>", "<poly>", "</poly>", "<sep>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny.byte_pairs([*marks, *places]),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_specific_special_tokens={"image_token": "<image>"},
        model_max_length=positions,
    )


def florence_processor(pixels: int = FLORENCE_PIXELS, positions: int = POSITIONS) -> Florence2Processor:
    image_processor = CLIPImageProcessor(
        size={"height": pixels, "width": pixels}, do_center_crop=False, image_seq_length=(pixels // 32) ** 2 + 1
    )
    return Florence2Processor(
        image_processor,
        florence_tokenizer(positions),
        post_processor_config={name: {} for name in PARSERS} | {"phrase_grounding": {"banned_grounding_tokens": BANNED}},
    )


def florence_config(width: int, layers: int, heads: int, vision: Florence2VisionConfig, vocab_size: int, positions: int) -> Florence2Config:
    """Of a Florence-2 whose language model has as many layers and heads in its encoder as in its decoder; the names are the tokenizer's."""
    tokenizer = florence_tokenizer()
    text = BartConfig(
        vocab_size=vocab_size,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=None,
    )
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    return Florence2Config(text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_id=image_token_id)


def florence_model() -> Florence2ForConditionalGeneration:
    heads = (1, 1, 2, 2)
    vision = Florence2VisionConfig(
        depths=(1, 1, 1, 1), embed_dim=(8, 8, 16, 16), num_heads=heads, num_groups=heads, window_size=2, projection_dim=32
    )
    config = florence_config(32, 1, 2, vision, len(florence_tokenizer()), POSITIONS)
    return drawn(lambda: Florence2ForConditionalGeneration(config))


def save_florence(folder: Path, *, places: bool = False) -> Path:
    """places: with embeddings of the places so large that the model writes hardly anything else, where random weights find nothing."""
    model = florence_model()
    if places:
        first = florence_tokenizer().convert_tokens_to_ids("<loc_0>")
        with torch.no_grad():
            model.get_input_embeddings().weight[first : first + 1000] *= 6
        assert model.generation_config is not None
        model.generation_config.no_repeat_ngram_size = 1  # else it writes one place again and again
    model.save_pretrained(folder)
    florence_processor().save_pretrained(folder)
    return folder


SAM_YAML = f"""
model:
  _target_: sam2.modeling.sam2_base.SAM2Base
  image_encoder:
    _target_: sam2.modeling.backbones.image_encoder.ImageEncoder
    scalp: 1
    trunk:
      _target_: sam2.modeling.backbones.hieradet.Hiera
      embed_dim: 8
      num_heads: 1
      stages: [1, 1, 2, 1]
      global_att_blocks: [3]
      window_pos_embed_bkg_spatial_size: [7, 7]
    neck:
      _target_: sam2.modeling.backbones.image_encoder.FpnNeck
      position_encoding:
        _target_: sam2.modeling.position_encoding.PositionEmbeddingSine
        num_pos_feats: 32
        normalize: true
        scale: null
        temperature: 10000
      d_model: 32
      backbone_channel_list: [64, 32, 16, 8]
      fpn_top_down_levels: [2, 3]
      fpn_interp_model: nearest
  memory_attention:
    _target_: sam2.modeling.memory_attention.MemoryAttention
    d_model: 32
    pos_enc_at_input: true
    layer:
      _target_: sam2.modeling.memory_attention.MemoryAttentionLayer
      activation: relu
      dim_feedforward: 64
      dropout: 0.1
      pos_enc_at_attn: false
      self_attention:
        _target_: sam2.modeling.sam.transformer.RoPEAttention
        rope_theta: 10000.0
        feat_sizes: [16, 16]
        embedding_dim: 32
        num_heads: 1
        downsample_rate: 1
        dropout: 0.1
      d_model: 32
      pos_enc_at_cross_attn_keys: true
      pos_enc_at_cross_attn_queries: false
      cross_attention:
        _target_: sam2.modeling.sam.transformer.RoPEAttention
        rope_theta: 10000.0
        feat_sizes: [16, 16]
        rope_k_repeat: True
        embedding_dim: 32
        num_heads: 1
        downsample_rate: 1
        dropout: 0.1
        kv_in_dim: 16
    num_layers: 1
  memory_encoder:
    _target_: sam2.modeling.memory_encoder.MemoryEncoder
    in_dim: 32
    out_dim: 16
    position_encoding:
      _target_: sam2.modeling.position_encoding.PositionEmbeddingSine
      num_pos_feats: 16
      normalize: true
      scale: null
      temperature: 10000
    mask_downsampler:
      _target_: sam2.modeling.memory_encoder.MaskDownSampler
      embed_dim: 32
      kernel_size: 3
      stride: 2
      padding: 1
    fuser:
      _target_: sam2.modeling.memory_encoder.Fuser
      layer:
        _target_: sam2.modeling.memory_encoder.CXBlock
        dim: 32
        kernel_size: 7
        padding: 3
        layer_scale_init_value: 1e-6
        use_dwconv: True
      num_layers: 1
  num_maskmem: 7
  image_size: {SAM_PIXELS}
  sigmoid_scale_for_mem_enc: 20.0
  sigmoid_bias_for_mem_enc: -10.0
  use_mask_input_as_output_without_sam: true
  directly_add_no_mem_embed: true
  no_obj_embed_spatial: true
  use_high_res_features_in_sam: true
  multimask_output_in_sam: true
  iou_prediction_use_sigmoid: True
  use_obj_ptrs_in_encoder: true
  pred_obj_scores: true
  pred_obj_scores_mlp: true
  fixed_no_obj_ptr: true
  multimask_output_for_tracking: true
  use_multimask_token_for_obj_ptr: true
  multimask_min_pt_num: 0
  multimask_max_pt_num: 1
  use_mlp_for_obj_ptr_proj: true
  compile_image_encoder: False
"""


def save_sam2(folder: Path) -> Path:
    """As whoever trained one with Meta's package would: its configuration and the weights."""
    folder.mkdir(parents=True)
    model = drawn(lambda: instantiate(OmegaConf.create(SAM_YAML).model, _recursive_=True), seed=3)
    (folder / "own.yaml").write_text(SAM_YAML)
    torch.save({"model": model.state_dict()}, folder / "own.pt")
    return folder


def save_sam2_transformers(folder: Path) -> Path:
    widths = [8, 16, 32, 64]
    sides = [SAM_PIXELS // stride for stride in (4, 8, 16)]
    backbone = Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[SAM_PIXELS, SAM_PIXELS],
        blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[1, 2, 4, 8],
        global_attention_blocks=[3],
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=widths[::-1], backbone_feature_sizes=[[s, s] for s in sides], fpn_hidden_size=32
    )
    config = Sam2Config(
        vision_config=vision,
        prompt_encoder_config=Sam2PromptEncoderConfig(hidden_size=32, image_size=SAM_PIXELS),
        mask_decoder_config=Sam2MaskDecoderConfig(hidden_size=32, mlp_dim=64, num_attention_heads=2, iou_head_hidden_dim=32),
    )
    drawn(lambda: Sam2Model(config)).save_pretrained(folder)
    Sam2ImageProcessor(size={"height": SAM_PIXELS, "width": SAM_PIXELS}).save_pretrained(folder)
    return folder


def digest(image: Image.Image) -> str:
    return sha256(image.tobytes()).hexdigest()


@dataclass(frozen=True)
class Recorded(Florence2):
    """A Florence-2 that writes what was recorded for an image and a prompt, and nothing for any other, in place of what its random weights
    would; all else is real.
    """

    written: Mapping[tuple[str, str], str]

    def _write_batch(self, images: list[Image.Image], prompts: list[str]) -> list[str]:
        found = (self.written.get((digest(image), prompt), "") for image, prompt in zip(images, prompts, strict=True))
        return [f"</s><s>{text.removesuffix(CUT)}{'' if text.endswith(CUT) else '</s><pad>'}" for text in found]
