"""CAF, the causal attention flow of a head: how much the model's certainty hangs on the head's output (RAH-LoRA eq. 5), without labels."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headwise.attention.edits import Edits, editing
from headwise.checkpoints import frozen
from headwise.vlm import VLM, Batch


def gate_gradients(vlm: VLM, batch: Batch) -> Float[Tensor, "batch layer head"]:
    """dL/dgamma at gamma = 1 of every example and head, by one backward pass; gamma multiplies the head's output before o_proj.

    L = -mean over the question's tokens t of log(p_t1 / p_t2), p_t1 and p_t2 the model's two likeliest next tokens: negative where the head
    supports what the model says. The batch: prompts, with answers or without.
    """
    segments = batch.segments
    gates = torch.ones(len(segments.first), vlm.num_layers, vlm.num_heads, device=vlm.device, dtype=_precise(vlm), requires_grad=True)
    rows = segments.question.any(0).nonzero()[:, 0]
    asked = segments.question[:, rows]
    with torch.enable_grad(), frozen(vlm.base), editing(vlm, Edits(gates=gates), segments):
        logits = vlm.model(**batch.inputs, logits_to_keep=rows, use_cache=False).logits
        first, second = logits.to(gates.dtype).topk(2, dim=-1).values.unbind(-1)
        losses = -((first - second) * asked).sum(1) / asked.sum(1)  # the softmax's normaliser cancels
        (gradients,) = torch.autograd.grad(losses.sum(), gates)
    return gradients


def _precise(vlm: VLM) -> torch.dtype:
    return torch.promote_types(vlm.dtype, torch.float32)


def signed_flow(gradients: Float[np.ndarray, "example layer head"], curvature: float) -> Float[np.ndarray, "layer head"]:
    """`E[dL/dgamma] + lambda E[(dL/dgamma)^2]`, as RAH-LoRA's eq. 5 has it: lowest for heads that support the output."""
    return gradients.mean(axis=0) + curvature * (gradients**2).mean(axis=0)


def absolute_flow(gradients: Float[np.ndarray, "example layer head"], curvature: float) -> Float[np.ndarray, "layer head"]:
    """`E|dL/dgamma| + lambda E[(dL/dgamma)^2]`: how strongly the output hangs on the head, either way, as RAH-LoRA's text reads CAF."""
    return np.abs(gradients).mean(axis=0) + curvature * (gradients**2).mean(axis=0)
