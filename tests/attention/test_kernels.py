from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from headwise.attention import kernels
from headwise.attention.kernels import additive, attend

SHAPES = st.fixed_dictionaries(
    {
        **{name: st.integers(1, 3) for name in ("batch", "kv_heads", "group")},
        **{"queries": st.integers(1, 70), "keys": st.integers(0, 40), "width": st.sampled_from([1, 5, 8, 64])},
        **{"kind": st.sampled_from(["causal", "mask", "none"]), "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float64])},
        "seed": st.integers(0, 2**20),
    }
)


def inputs(shape: dict[str, Any], device: str = "cpu") -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(shape["seed"])
    keys = shape["queries"] + (0 if shape["kind"] == "causal" else shape["keys"])
    sizes = ((shape["kv_heads"] * shape["group"], shape["queries"]), (shape["kv_heads"], keys), (shape["kv_heads"], keys))
    heads = [torch.randn(shape["batch"], *size, shape["width"], generator=random).to(device, shape["dtype"]) for size in sizes]
    mask = torch.rand(shape["batch"], 1, shape["queries"], keys, generator=random) < 0.7
    mask[..., 0] = True
    return *heads, mask.to(device)


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> torch.Tensor:
    native = query.device.type == "cpu" or mask is None  # on CUDA transformers repeats the keys where there is a mask
    group = 1 if native else query.shape[1] // key.shape[1]
    key, value = (heads.repeat_interleave(group, dim=1) for heads in (key, value))
    return scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=0.3, enable_gqa=native)


def check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, causal: bool) -> None:
    """The output is SDPA's to the last bit, the log-sum-exp that of the whole matrix in float64."""
    found = attend(query, key, value, mask, 0.3, causal)
    assert found is not None
    assert torch.equal(found[0], sdpa(query, key, value, mask, causal))
    scores = query.double() @ key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(2, 3) * 0.3
    allowed = torch.ones_like(scores[0, 0], dtype=torch.bool).tril() if causal else mask
    scores = scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)
    torch.testing.assert_close(found[1].double(), scores.logsumexp(-1), atol=5e-4 if query.dtype == torch.bfloat16 else 2e-5, rtol=1e-5)


@given(SHAPES)
def test_the_output_is_sdpas_and_the_log_sum_exp_is_exact(shape: dict[str, Any]) -> None:
    query, key, value, mask = inputs(shape)
    check(query, key, value, mask if shape["kind"] == "mask" else None, shape["kind"] == "causal")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch gives a reason for each kernel that does not serve
@pytest.mark.parametrize("kind", ["causal", "mask", "none"])
@pytest.mark.parametrize("width", [64, 72, 128])
@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION])
def test_the_same_on_a_gpu(kind: str, width: int, queries: int, dtype: torch.dtype, backend: SDPBackend) -> None:
    shape = {"batch": 2, "kv_heads": 2, "group": 3, "queries": queries, "keys": 13, "width": width, "kind": kind, "dtype": dtype}
    query, key, value, mask = inputs(shape | {"seed": 0}, "cuda")
    mask = mask if kind == "mask" else None
    with sdpa_kernel(backend):
        try:
            sdpa(query, key, value, mask, kind == "causal")
        except RuntimeError:  # no such kernel for these inputs
            assert attend(query, key, value, mask, 0.3, kind == "causal") is None
        else:
            check(query, key, value, mask, kind == "causal")


@pytest.mark.parametrize(
    ("backend", "masked"), [("flash", False), ("efficient", False), ("efficient", True), ("cudnn", False), ("cudnn", True)]
)
def test_cudas_kernels_are_called_as_torch_declares_them(backend: str, masked: bool) -> None:
    """Without a GPU: shapes and types alone, through torch's own descriptions of the kernels."""
    choice = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[
        backend
    ]
    with FakeTensorMode():
        query, key = (torch.empty(2, heads, 33, 44, dtype=torch.bfloat16, device="cuda") for heads in (6, 3))
        added = additive(torch.ones(2, 1, 33, 33, dtype=torch.bool, device="cuda"), torch.bfloat16) if masked else None
        output, lse = kernels.KERNELS["cuda", choice.value](query, key, key, added, 0.3, added is None)
    assert (output.shape, output.dtype) == (query.shape, query.dtype)
    assert (lse.shape, lse.dtype) == (query.shape[:3], torch.float32)


def test_values_of_another_width_have_no_fused_kernel() -> None:
    query = torch.zeros(1, 2, 3, 4)
    assert attend(query, query, torch.zeros(1, 2, 3, 5), None, 1.0, True) is None
