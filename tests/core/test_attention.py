import math

import pytest
import torch

from ediffi_core.attention import CrossAttention, attend, attend_by_products


def by_the_formula(q, k, v, bias):
    """softmax((q k^T) / sqrt(D) + bias) v, one entry at a time."""
    out = torch.zeros_like(q)
    for b, h, n in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        logits = torch.stack(
            [q[b, h, n] @ k[b, h, token] / math.sqrt(q.shape[-1]) + bias[b, h, n, token] for token in range(k.shape[2])]
        )
        weights = logits.exp() / logits.exp().sum()
        out[b, h, n] = sum(weights[token] * v[b, h, token] for token in range(k.shape[2]))
    return out


def test_attention_with_a_bias_follows_the_formula():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 4, 8, generator=generator)
    k, v = torch.randn(2, 2, 3, 5, 8, generator=generator)
    bias = torch.randn(2, 3, 4, 5, generator=generator)
    torch.testing.assert_close(attend(q, k, v, bias), by_the_formula(q, k, v, bias), atol=1e-5, rtol=1e-5)


def test_a_token_at_minus_infinity_is_not_there():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 4, 8, generator=generator)
    k, v = torch.randn(2, 1, 2, 5, 8, generator=generator)
    hidden = torch.zeros(1, 1, 1, 5)
    hidden[..., 3:] = -math.inf
    torch.testing.assert_close(attend(q, k, v, hidden), attend(q, k[:, :, :3], v[:, :, :3]))


@pytest.mark.parametrize("shape", [(4, 4), (3, 5), (1, 7)])
def test_cross_attention_keeps_the_shape_of_the_image(shape):
    block = CrossAttention(16, 12, head_channels=8, norm_groups=4)
    x = torch.randn(2, 16, *shape)
    assert block(x, torch.randn(2, 9, 12), None).shape == x.shape


def test_attention_by_products_is_the_same_attention():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 4, 8, generator=generator)
    k, v = torch.randn(2, 2, 3, 5, 8, generator=generator)
    bias = torch.randn(2, 1, 1, 5, generator=generator)
    for one in (bias, None):
        torch.testing.assert_close(attend_by_products(q, k, v, one), attend(q, k, v, one), atol=1e-5, rtol=1e-5)
