import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headwise.attention.fused import column_sums, row_sums
from headwise.attention.layer import Part

SHAPES = st.fixed_dictionaries(
    {
        **{name: st.integers(1, 3) for name in ("kv_heads", "group", "threads")},
        **{"rows": st.integers(1, 70), "keys": st.integers(1, 600), "width": st.integers(1, 9), "closed": st.integers(0, 600)},
        **{"seed": st.integers(0, 2**20), "spread": st.sampled_from([0.1, 1.0, 5.0])},
    }
)


SMALL = dict.fromkeys(("kv_heads", "group", "spread"), 1) | {"rows": 5, "keys": 9, "width": 4, "closed": 0, "seed": 0}


def inputs(shape: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Random queries, keys, their log-sum-exps, closed last keys, visual keys."""
    random = torch.Generator().manual_seed(shape["seed"])
    query = torch.randn(shape["kv_heads"] * shape["group"], shape["rows"], shape["width"], generator=random)
    key = torch.randn(shape["kv_heads"], shape["keys"], shape["width"], generator=random)
    query *= shape["spread"]
    closed = torch.rand(shape["rows"], min(shape["closed"], shape["keys"] - 1), generator=random) < 0.5
    visual = torch.rand(shape["keys"], generator=random) < 0.7
    return query, key, scores(query, key, closed).logsumexp(-1).float(), closed, visual


def scores(query: torch.Tensor, key: torch.Tensor, closed: torch.Tensor) -> torch.Tensor:
    """Every one, in float64."""
    found = query.double() @ key.double().repeat_interleave(len(query) // len(key), dim=0).transpose(1, 2)
    found[..., found.shape[2] - closed.shape[1] :].masked_fill_(closed, -torch.inf)
    return found


@given(SHAPES)
def test_sums_equal_those_of_the_whole_matrix(shape: dict[str, Any]) -> None:
    query, key, lse, closed, visual = inputs(shape)
    before = torch.get_num_threads()
    torch.set_num_threads(shape["threads"])
    try:
        columns = column_sums(Part(query, key, lse, closed, 1.0))
        keys, elsewhere, highest = row_sums(Part(query, key, lse, closed, 1.0), visual)
    finally:
        torch.set_num_threads(before)
    A = (scores(query, key, closed) - lse.double()[..., None]).exp()
    share = (A * ~visual).sum(-1, keepdim=True)
    for found, expected in (
        (columns, A.sum(1)),
        (keys, A.sum(1)),
        (elsewhere, (A * ~visual / share.clamp_min(2.0**-126)).sum(1)),
        (highest, (A * visual).amax(-1).sum(1)),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_broken_in_the_model_shows(broken: float) -> None:
    query, key, _, closed, visual = inputs(SMALL)
    key[0, 3, 2] = broken
    lse = scores(query, key, closed).logsumexp(-1).float()
    assert not column_sums(Part(query, key, lse, closed, 1.0)).isfinite().all()
    keys, _, highest = row_sums(Part(query, key, lse, closed, 1.0), visual)
    assert not keys.isfinite().all()
    assert not highest.isfinite().all()


def test_a_forked_process_has_threads_of_its_own() -> None:
    script = """
import os, torch
from headwise.attention.fused import column_sums
from headwise.attention.layer import Part
torch.set_num_threads(2)
part = Part(torch.zeros(1, 4, 4), torch.zeros(1, 300, 4), torch.zeros(1, 4), torch.zeros(4, 0, dtype=torch.bool), 1.0)
column_sums(part)
child = os.fork()
if not child:
    os._exit(0 if bool((column_sums(part) == 4).all()) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=120)


def test_compiled_kernels_are_kept_in_the_cache_folder(tmp_path: Path) -> None:
    script = "import tests.attention.test_fused as t; t.column_sums(t.Part(*t.inputs(t.SMALL)[:4], 1.0))"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, env=os.environ | {"HEADWISE_CACHE": str(tmp_path)})
    assert list((tmp_path / "numba").rglob("*._add_columns-*.nbc"))


def test_several_threads_may_ask_at_once() -> None:
    given_ = Part(*inputs({"kv_heads": 3, "group": 3, "rows": 64, "keys": 600, "width": 64, "closed": 0, "seed": 1, "spread": 1})[:4], 1.0)
    expected, found = column_sums(given_), []
    threads = [threading.Thread(target=lambda: found.append(column_sums(given_))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(one, expected) for one in found)
