"""What reading attention costs: a plain forward pass with SDPA, the same observed, and what is used instead of Headwise, in one run.

`python benchmarks/attention.py [TOKENS ...]` prints one JSON line last. Variants: plain; answer_rows and all = Headwise with the statistics
of the answer's rows, and with all; eager = transformers' `output_attentions`; nnsight = hooks that keep the mean of the answer's rows. On a
CPU the decoder of SmolLM2-135M's shape in fp32; on a GPU one of a 7B model's shape in bfloat16. Random weights, no output matrix. Of the
prompt 5 % are the answer, 20 % text with it, the rest visual tokens; another row has 50 % text. Times are medians of runs, each
divided by the mean of the plain runs right before and after it; the last two variants, which take long, run once. Memory is each variant's
peak in a process of its own. A variant that does not fit into memory is null.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headwise.attention.observe import ANSWER_ROWS, STORED, observing
from headwise.attention.seam import set_implementation
from headwise.layout import View
from headwise.segments import Kind, Segments, segments
from headwise.vlm import FAMILIES, VLM

SHAPES = {
    "cpu": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
    "cuda": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
TOKENS = {"cpu": (512, 1024, 2048, 4096), "cuda": (512, 1024, 2048, 4096, 8192)}
VARIANTS = ("plain", "answer_rows", "all", "eager", "nnsight")
SLOW = ("eager", "nnsight")
RUNS, SLOW_RUNS = 7, 1
ANSWER, SYSTEM = 0.05, 16
VOCABULARY = 1_000
ALLOCATION = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""glibc gives large blocks back at once; else the holes between them move the same variant's peak by 13 % from run to run."""
LOADING = 1_024
"""Tokens of a pass that is made for the code that it loads, all of it."""


def model(device: str, dtype: torch.dtype) -> VLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=16_384, initializer_range=0.1, **SHAPES[device])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with torch.device(device):
        return VLM(LlamaForCausalLM(config).to(dtype).eval(), tokenizer, FAMILIES["llama"])


def prompt(tokens: int, text: float, device: str) -> tuple[torch.Tensor, Segments]:
    answer, all_text = round(ANSWER * tokens), round(text * tokens)
    visual = tokens - all_text
    kinds = [Kind.SYSTEM] * SYSTEM + [Kind.VISUAL] * visual + [Kind.QUESTION] * (all_text - answer - SYSTEM) + [Kind.ANSWER] * answer
    ids = torch.randint(0, VOCABULARY, (1, tokens), device=device)
    return ids, segments(torch.tensor([kinds], device=device), ((View(1, visual),),))


def passes(vlm: VLM, tokens: int, text: float) -> dict[str, Callable[[], object]]:
    """Each variant's forward pass of the decoder; every one leaves its statistics."""
    ids, kinds = prompt(tokens, text, vlm.device.type)
    decoder: Any = vlm.decoder
    rows = kinds.answer[0].nonzero()[:, 0]

    def plain(**options: object) -> Any:
        return decoder(input_ids=ids, use_cache=False, **options)

    def observed(wanted: tuple[str, ...]) -> object:
        with observing(vlm, kinds, wanted) as layers:
            plain()
        return layers

    def eager() -> object:
        set_implementation(vlm, "eager")
        try:
            return [weights[:, :, rows].mean(2) for weights in plain(output_attentions=True).attentions]
        finally:
            set_implementation(vlm, "sdpa")

    def hooked() -> object:
        from nnsight import NNsight  # imported here: it changes torch's classes, which would slow the others

        set_implementation(vlm, "eager")
        try:
            traced = NNsight(decoder)
            with traced.trace(input_ids=ids, use_cache=False):
                found = list().save()  # noqa: C408
                for layer in traced.layers:
                    found.append(layer.self_attn.output[1][:, :, rows].mean(2))
            return found
        finally:
            set_implementation(vlm, "sdpa")

    every = (plain, partial(observed, ANSWER_ROWS), partial(observed, STORED), eager, hooked)
    return dict(zip(VARIANTS, every, strict=True))


def seconds(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def fits(variant: str, vlm: VLM, tokens: int) -> bool:
    """Eager attention holds a row of weights per layer and head of every token, in the model's type, and while it works in fp32."""
    if variant not in SLOW:
        return True
    layers = vlm.num_layers if variant == "eager" else 1
    needed = tokens**2 * vlm.num_heads * (layers * vlm.dtype.itemsize + 3 * 4)
    free = torch.cuda.mem_get_info()[0] if vlm.device.type == "cuda" else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return needed < 0.8 * free


def time_ratios(vlm: VLM, tokens: int, text: float, variants: tuple[str, ...], runs: int) -> dict[str, float]:
    """Each variant's time over the mean of the plain passes right before and right after it, median of the runs."""
    every, device = passes(vlm, tokens, text), vlm.device.type
    for variant in ("plain", *variants):
        if variant not in SLOW:
            every[variant]()
    order = [name for variant in variants * runs for name in ("plain", variant)] + ["plain"]
    times = [seconds(every[name], device) for name in order]
    ratios = [(order[at], 2 * times[at] / (times[at - 1] + times[at + 1])) for at in range(1, len(order), 2)]
    return {variant: statistics.median(ratio for name, ratio in ratios if name == variant) for variant in variants}


def peak_bytes(variant: str, tokens: int, text: float, dtype: str) -> int:
    """The variant's peak of memory in a process of its own that has loaded all code: resident on a CPU (Linux), allocated on a GPU."""
    own = [sys.executable, __file__, str(tokens), "--text", str(text), "--dtype", dtype, "--peak", variant]
    done = subprocess.run(own, check=True, capture_output=True, text=True, env=os.environ | ALLOCATION)
    return int(done.stdout.splitlines()[-1])


def print_peak(vlm: VLM, variant: str, tokens: int, text: float) -> None:
    run = passes(vlm, tokens, text)[variant]
    passes(vlm, LOADING, text)["all"]()  # the compiled kernels take 120 MB once, which is no part of a pass
    if vlm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        print(torch.cuda.max_memory_allocated())
        return
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of what came before
    run()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    print(int(peak.split()[1]) * 1024)


def measure(vlm: VLM, tokens: int, text: float, runs: int, dtype: str) -> list[dict[str, object]]:
    possible = [variant for variant in VARIANTS if fits(variant, vlm, tokens)]
    fast = tuple(variant for variant in possible if variant not in SLOW)
    ratios = time_ratios(vlm, tokens, text, fast, runs)
    for variant in (v for v in possible if v in SLOW):
        ratios |= time_ratios(vlm, tokens, text, (variant,), SLOW_RUNS)
    peaks = {variant: peak_bytes(variant, tokens, text, dtype) for variant in possible}
    rows: list[dict[str, object]] = []
    for variant in VARIANTS:
        found = variant in ratios
        rows.append(
            {
                "tokens": tokens,
                "text": text,
                "variant": variant,
                "time_ratio": round(ratios[variant], 3) if found else None,
                "memory_ratio": round(peaks[variant] / peaks["plain"], 3) if found else None,
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", nargs="*", type=int, default=TOKENS[device], help="lengths of the prompt")
    parser.add_argument("--text", type=float, nargs="*", default=(0.2, 0.5), help="shares of text, the answer included")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32" if device == "cpu" else "bfloat16")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--peak", choices=VARIANTS, help="print one variant's peak of memory in bytes, nothing else")
    given = parser.parse_args()
    vlm = model(device, getattr(torch, given.dtype))
    with torch.no_grad():
        if given.peak:
            print_peak(vlm, given.peak, given.tokens[0], given.text[0])
            return
        rows = [row for text in given.text for tokens in given.tokens for row in measure(vlm, tokens, text, given.runs, given.dtype)]
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(json.dumps({"device": f"{device}, {name}", "dtype": given.dtype, "rows": rows}))


if __name__ == "__main__":
    main()
