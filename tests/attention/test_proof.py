from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from headwise.attention import fused, proof, seam
from headwise.attention.layer import Attention
from headwise.attention.observe import Observed, forward
from headwise.attention.proof import BOUNDS, prove, proved
from headwise.observation import EMBEDDED
from headwise.vlm import FAMILIES, VLM, Batch, load_vlm
from tests import zoo
from tests.attention.oracle import eager_attentions, probe
from tests.tiny import new_tiny_vlm, processor, tiny_lm, tiny_vlm


@pytest.mark.parametrize("model", [tiny_vlm, tiny_lm])
def test_the_proof_holds(model) -> None:
    figures = prove(model())
    assert set(figures) == set(BOUNDS)
    assert figures["observed_logits"] == 0
    assert figures["replaced_logits"] > 0.1


@pytest.mark.parametrize("name", [*zoo.VISUAL_FAMILIES, *zoo.TEXT_FAMILIES])
def test_the_proof_holds_for_every_family(name: str) -> None:
    prove(zoo.vlm(name))


@pytest.mark.parametrize("side", ["left", "right"])
def test_observed_attention_equals_eager_attention_everywhere(side: str) -> None:
    """Element by element over the rows of real tokens, within 1e-5 in fp32."""
    vlm = tiny_vlm()
    batch = probe(vlm, side)
    A = torch.from_numpy(eager_attentions(vlm, batch))
    seen: list[torch.Tensor] = []
    with seam.visiting(vlm, lambda attention, output: seen.append(attention.probabilities(attention.every_row()))):
        forward(vlm, batch)
    difference = (torch.stack(seen, dim=1) - A).abs().amax(dim=(1, 2, 4))
    assert float(difference[batch.segments.real].max()) < 1e-5


def test_the_proof_holds_in_bfloat16() -> None:
    vlm = new_tiny_vlm()
    prove(VLM(vlm.base.to(torch.bfloat16), vlm.processor, vlm.family))


def test_the_proof_holds_with_an_adapter() -> None:
    lora = LoraConfig(r=2, target_modules=r".*language_model\.layers\.\d+\.self_attn\.[qkv]_proj", init_lora_weights=False)
    prove(VLM(get_peft_model(new_tiny_vlm().base, lora).eval(), processor(), FAMILIES["fast_vlm"]))


def wrong_scale(A: torch.Tensor) -> torch.Tensor:
    return (A.log() * 1.01).softmax(-1)


def not_normalised(A: torch.Tensor) -> torch.Tensor:
    return A * 1.001


def heads_in_another_order(A: torch.Tensor) -> torch.Tensor:
    return A.flip(1)


def no_number(A: torch.Tensor) -> torch.Tensor:
    return A * torch.nan


def one_token_ahead(A: torch.Tensor) -> torch.Tensor:
    return A.roll(1, dims=3)


@pytest.mark.parametrize(
    ("fault", "figure"),
    [
        (wrong_scale, "layer_eager"),
        (not_normalised, "row_sums"),
        (heads_in_another_order, "layer_eager"),
        (one_token_ahead, "looking_ahead"),
        (no_number, "row_sums"),
    ],
)
def test_a_wrong_reading_is_found_and_named(fault, figure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Attention.probabilities
    monkeypatch.setattr(Attention, "probabilities", lambda *arguments: fault(right(*arguments)))
    with pytest.raises(ValueError, match=f"{figure} = .*at most .* is needed.*cannot be trusted"):
        prove(tiny_vlm())


def test_an_ignored_padding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that forgets the padding on the left: eager attention and single examples disagree."""
    encode = proof.encode
    monkeypatch.setattr(proof, "encode", lambda *args: encode(*args, padding_side="left"))
    right = seam.attend

    def forgetful(query, key, value, mask, scaling, causal):
        return right(query, key, value, None, scaling, True)

    prove(tiny_vlm())
    monkeypatch.setattr(seam, "attend", forgetful)
    with pytest.raises(ValueError, match="cannot be trusted"):
        prove(tiny_vlm())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_proof_holds_for_the_embedded_model(dtype: Literal["float32", "bfloat16"]) -> None:
    prove(load_vlm(EMBEDDED, dtype=dtype))


def test_a_model_is_proved_once_for_each_revision_and_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path))
    runs: list[torch.dtype] = []
    right = proof.prove
    monkeypatch.setattr(proof, "prove", lambda vlm: runs.append(vlm.dtype) or right(vlm))
    vlm = new_tiny_vlm()
    figures = proved(vlm, "one")
    assert proved(vlm, "one") == figures == right(vlm)
    proved(vlm, "two")
    proved(VLM(vlm.base.to(torch.bfloat16), vlm.processor, vlm.family), "one")
    assert runs == [torch.float32, torch.float32, torch.bfloat16]


def test_a_model_that_failed_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path))
    right = Attention.probabilities
    with monkeypatch.context() as fault, pytest.raises(ValueError, match="row_sums"):
        fault.setattr(Attention, "probabilities", lambda *arguments: not_normalised(right(*arguments)))
        proved(tiny_vlm(), "one")
    assert proved(tiny_vlm(), "one")["row_sums"] < 1e-5


def test_statistics_that_are_no_numbers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = proof.observe

    def broken(vlm: VLM, batch: Batch) -> Observed:
        found = right(vlm, batch)
        return Observed(found.maps, found.scalars | {"key_variance": found.scalars["key_variance"] * np.nan}, found.layouts)

    monkeypatch.setattr(proof, "observe", broken)
    with pytest.raises(ValueError, match="padding = nan"):
        prove(tiny_vlm())


@pytest.mark.parametrize("place", range(4))
def test_compiled_sums_that_are_wrong_are_found(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    of_columns, of_rows = fused.column_sums, fused.row_sums
    factors = [1.001 if place == at else 1.0 for at in range(4)]
    monkeypatch.setattr(fused, "column_sums", lambda part: of_columns(part) * factors[3])
    monkeypatch.setattr(fused, "row_sums", lambda *given: tuple(f * s for f, s in zip(factors, of_rows(*given), strict=False)))
    with pytest.raises(ValueError, match="compiled_sums = "):
        prove(tiny_vlm())
