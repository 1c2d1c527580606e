"""Attention inside a training step: which kernel, in which precision, and nothing left behind."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot_diti.attention import attention_for_training

SHORT, LONG = torch.zeros(1, 4, 8, 16), torch.zeros(1, 4, 64, 64)


def _operations(out: Tensor) -> set[str]:
    """Names of all steps of the backward pass."""
    todo, seen = [out.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return {type(node).__name__ for node in seen}


def _attend(latents: Tensor) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 4, 16, 8, generator=g, dtype=torch.float64) for _ in range(3))
    exact = F.scaled_dot_product_attention(query, key, value)
    with attention_for_training(latents):
        return F.scaled_dot_product_attention(*(x.bfloat16().requires_grad_() for x in (query, key, value))), exact


def test_short_sequences_take_plain_products_in_bfloat16() -> None:
    out, exact = _attend(SHORT)
    names = _operations(out)
    assert any("Bmm" in name for name in names) and not any("ToCopy" in name for name in names)
    torch.testing.assert_close(out.double(), exact, rtol=0.05, atol=0.05)


def test_long_sequences_keep_the_kernel_that_torch_chooses() -> None:
    out, exact = _attend(LONG)
    assert not any("Bmm" in name for name in _operations(out))
    torch.testing.assert_close(out.double(), exact, rtol=0.05, atol=0.05)


def test_torch_is_left_as_it_was_whatever_happens_inside() -> None:
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    with pytest.raises(RuntimeError, match="inside"), attention_for_training(SHORT):
        assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
        raise RuntimeError("inside")
    assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed() == before
    assert torch.backends.cuda.flash_sdp_enabled()
