from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model

from headwise.attention import proof, seam
from headwise.attention.observe import forward
from headwise.attention.proof import BOUNDS, prove
from headwise.attention.seam import Attention, Rows
from headwise.observation import EMBEDDED
from headwise.vlm import FAMILIES, VLM, load_vlm
from tests import zoo
from tests.attention.oracle import eager_attentions, probe
from tests.tiny import new_tiny_vlm, processor, tiny_lm, tiny_vlm


@pytest.mark.parametrize("model", [tiny_vlm, tiny_lm])
def test_the_proof_holds(model) -> None:
    figures = prove(model())
    assert set(figures) == set(BOUNDS)
    assert figures["observed_logits"] == 0
    assert figures["replaced_logits"] > 0.1


CAPPED = {"gemma2", "paligemma2"}


@pytest.mark.parametrize("name", sorted({*zoo.VISUAL_FAMILIES, *zoo.TEXT_FAMILIES} - CAPPED))
def test_the_proof_holds_for_every_family(name: str) -> None:
    prove(zoo.vlm(name))


@pytest.mark.parametrize("name", sorted(CAPPED))
def test_a_capped_family_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="gemma2 caps"):
        prove(zoo.vlm(name))


@pytest.mark.parametrize("side", ["left", "right"])
def test_observed_attention_equals_eager_attention_everywhere(side: str) -> None:
    """Element by element over the rows of real tokens, within 1e-5 in fp32."""
    vlm = tiny_vlm()
    batch = probe(vlm, side)
    A = torch.from_numpy(eager_attentions(vlm, batch))
    seen: list[torch.Tensor] = []
    with seam.visiting(vlm, lambda attention, output: seen.append(torch.cat([r.probabilities for r in attention.rows(5)], dim=2))):
        forward(vlm, batch)
    difference = (torch.stack(seen, dim=1) - A).abs().amax(dim=(1, 2, 4))
    assert float(difference[batch.segments.real].max()) < 1e-5


def test_the_proof_holds_in_bfloat16() -> None:
    vlm = new_tiny_vlm()
    prove(VLM(vlm.base.to(torch.bfloat16), vlm.processor, vlm.family))


def test_the_proof_holds_with_an_adapter() -> None:
    lora = LoraConfig(r=2, target_modules=r".*language_model\.layers\.\d+\.self_attn\.[qkv]_proj", init_lora_weights=False)
    prove(VLM(get_peft_model(new_tiny_vlm().base, lora).eval(), processor(), FAMILIES["fast_vlm"]))


def wrong_scale(attention: Attention, rows: Rows) -> Rows:
    return Rows(rows.start, (rows.probabilities.log() * 1.01).softmax(-1), rows.keys)


def not_normalised(attention: Attention, rows: Rows) -> Rows:
    return Rows(rows.start, rows.probabilities * 1.001, rows.keys)


def heads_in_another_order(attention: Attention, rows: Rows) -> Rows:
    return Rows(rows.start, rows.probabilities.flip(1), rows.keys)


@pytest.mark.parametrize(
    ("fault", "figure"), [(wrong_scale, "layer_eager"), (not_normalised, "row_sums"), (heads_in_another_order, "layer_eager")]
)
def test_a_wrong_reading_is_found_and_named(fault, figure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Attention.rows

    def rows(self: Attention, block: int = 128) -> Iterator[Rows]:
        return (fault(self, rows) for rows in right(self, block))

    monkeypatch.setattr(Attention, "rows", rows)
    with pytest.raises(ValueError, match=f"{figure} = .*at most 1e-05 is needed.*cannot be trusted"):
        prove(tiny_vlm())


def test_an_ignored_padding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that forgets the padding on the left: eager attention and single examples disagree."""
    encode = proof.encode
    monkeypatch.setattr(proof, "encode", lambda *args: encode(*args, padding_side="left"))
    right = seam.sdpa_attention_forward

    def forgetful(module, query, key, value, attention_mask, **kwargs):
        return right(module, query, key, value, None, **kwargs)

    prove(tiny_vlm())
    monkeypatch.setattr(seam, "sdpa_attention_forward", forgetful)
    with pytest.raises(ValueError, match="cannot be trusted"):
        prove(tiny_vlm())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_proof_holds_for_the_embedded_model(dtype: Literal["float32", "bfloat16"]) -> None:
    prove(load_vlm(EMBEDDED, dtype=dtype))
