import threading

import pytest
import torch

from headwise.attention.layer import Attention, _closed, _every
from headwise.attention.observe import forward, observe
from headwise.attention.seam import NAME, visiting
from headwise.vlm import VLM, Batch, encode
from tests.tiny import NUM_LAYERS, image, new_tiny_vlm, tiny_lm, tiny_vlm


def logits(vlm: VLM) -> torch.Tensor:
    batch = encode(vlm, [image(0) if vlm.visual_id is not None else None], ["What colour?"], ["red"])
    return forward(vlm, batch, logits_to_keep=0).logits


@pytest.mark.parametrize("model", [tiny_vlm, tiny_lm])
def test_only_the_decoder_is_visited_and_its_implementation_restored(model) -> None:
    vlm = model()
    plain = logits(vlm)
    seen: list[int] = []
    with visiting(vlm, lambda attention, output: seen.append(attention.layer)):
        assert vlm.text_config._attn_implementation == NAME
        if vlm.visual_id is not None:
            assert vlm.base.config.vision_config._attn_implementation == "sdpa"
        assert torch.equal(logits(vlm), plain)
    assert seen == list(range(NUM_LAYERS))
    assert vlm.text_config._attn_implementation == "sdpa"
    assert torch.equal(logits(vlm), plain)
    assert len(seen) == NUM_LAYERS


def test_nothing_is_kept_of_a_pass() -> None:
    observe(tiny_vlm(), encode(tiny_vlm(), [image(0)], ["What?"], ["red"]))
    assert _closed.cache_info().currsize == _every.cache_info().currsize == 0


def test_the_implementation_is_restored_after_an_error() -> None:
    def fail(attention: Attention, output: torch.Tensor) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), visiting(tiny_vlm(), fail):
        logits(tiny_vlm())
    assert tiny_vlm().text_config._attn_implementation == "sdpa"
    assert logits(tiny_vlm()).isfinite().all()


def test_what_a_visitor_returns_takes_the_outputs_place() -> None:
    with visiting(tiny_vlm(), lambda attention, output: torch.zeros_like(output) if attention.layer == 1 else None):
        assert not torch.allclose(logits(tiny_vlm()), logits_plain())


def logits_plain() -> torch.Tensor:
    return logits(new_tiny_vlm())


def test_visitors_inside_one_another_all_see_and_end_with_their_blocks() -> None:
    outer: list[int] = []
    inner: list[int] = []
    with visiting(tiny_vlm(), lambda attention, output: outer.append(attention.layer)):
        with visiting(tiny_vlm(), lambda attention, output: inner.append(attention.layer)):
            logits(tiny_vlm())
        logits(tiny_vlm())
    assert inner == list(range(NUM_LAYERS))
    assert outer == 2 * inner


def test_a_compiled_model_is_refused() -> None:
    vlm = new_tiny_vlm()
    vlm.decoder.layers[0].compile()
    with pytest.raises(ValueError, match=r"the model is compiled \(torch.compile\)"), visiting(vlm, lambda attention, output: None):
        pass


def test_a_visitor_does_not_see_other_threads() -> None:
    other, seen = new_tiny_vlm(), []
    with visiting(tiny_vlm(), lambda attention, output: seen.append(attention.layer)):
        thread = threading.Thread(target=lambda: observe(other, encode(other, [image(0)], ["What?"], ["red"])))
        thread.start()
        thread.join()
    assert seen == []


def test_attention_sinks_are_refused() -> None:
    vlm = tiny_lm()
    hook = vlm.decoder.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"s_aux": torch.zeros(1)}), with_kwargs=True
    )
    try:
        with pytest.raises(ValueError, match="LlamaAttention changes its attention scores by s_aux"):
            observe(vlm, encode(vlm, [None], ["What?"], ["red"]))
    finally:
        hook.remove()


def test_an_example_without_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match="without an answer"):
        observe(tiny_vlm(), encode(tiny_vlm(), [image(0)], ["What?"]))


def test_a_dropped_attention_and_a_mask_of_numbers_are_refused() -> None:
    vlm = new_tiny_vlm()
    batch = encode(vlm, [image(0)], ["What?"], ["red"])
    four = torch.zeros(1, 1, *[batch.inputs["input_ids"].shape[1]] * 2)
    with pytest.raises(ValueError, match=r"an attention mask of torch.float32 in four dimensions"):
        observe(vlm, Batch(batch.inputs | {"attention_mask": four}, batch.segments))
    for layer in vlm.decoder.layers:
        layer.self_attn.attention_dropout = 0.1
    vlm.base.train()
    with pytest.raises(ValueError, match=r"drops attention at random \(dropout 0.1\)"):
        observe(vlm, batch)


def test_a_model_that_another_thread_visits_is_refused() -> None:
    vlm, refused = new_tiny_vlm(), []

    def visit() -> None:
        try:
            observe(vlm, encode(vlm, [image(0)], ["What?"], ["red"]))
        except ValueError as error:
            refused.append(str(error))

    with visiting(vlm, lambda attention, output: None):
        thread = threading.Thread(target=visit)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert "another thread reads or edits" in refused[0]
    assert vlm.text_config._attn_implementation == "sdpa"


def test_under_autocast_the_output_is_the_models_own_and_what_is_read_stays_exact() -> None:
    vlm = tiny_vlm()
    seen: list[Attention] = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = logits(vlm)
        with visiting(vlm, lambda attention, output: seen.append(attention)):
            assert torch.equal(logits(vlm), plain)
        found = observe(vlm, encode(vlm, [image(0)], ["What colour?"], ["red"]))
    assert seen[0].query.dtype == torch.bfloat16
    assert seen[0].probabilities(seen[0].every_row()).dtype == torch.float32
    assert abs(sum(found.scalars[name] for name in ("visual_mass", "text_mass", "system_mass")) - 1).max() < 1e-3
