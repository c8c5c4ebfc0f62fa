"""Attention with an additive bias, and the two attention blocks of the U-Net.

The attention function is an argument (`attend`) so that a host program can bring its own kernel; paint-with-words adds
to the bias. Axis letters: B batch, C channels, H W image, N image tokens (H W), L text tokens, D channels per head.
"""

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v.

    q: (B, heads, N, D); k, v: (B, heads, L, D); bias: broadcastable to (B, heads, N, L), added to the scaled logits;
    minus infinity hides a token. Returns (B, heads, N, D).
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """`attend` with the score matrix written out: the backward pass of PyTorch's fused one is slow in bfloat16 on CPUs."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores if bias is None else scores + bias).softmax(-1) @ v


class SelfAttention(nn.Module):
    """x + Attention(x, x), as in ADM's U-Net (Dhariwal & Nichol 2021)."""

    def __init__(self, channels: int, head_channels: int, norm_groups: int, operations=nn, **factory) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.norm = operations.GroupNorm(norm_groups, channels, **factory)
        self.qkv = operations.Linear(channels, 3 * channels, **factory)
        self.out = operations.Linear(channels, channels, **factory)

    def forward(self, x: Tensor, attend: Attend = attend) -> Tensor:
        """x: (B, C, H, W). Returns the same shape."""
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = rearrange(self.qkv(tokens), "b n (three k d) -> three b k n d", three=3, k=self.heads)
        attended = rearrange(attend(q, k, v, None), "b k n d -> b n (k d)")
        return x + rearrange(self.out(attended), "b (h w) c -> b c h w", h=x.shape[2])


class CrossAttention(nn.Module):
    """x + Attention(x, context), placed after each self-attention block (eDiff-I, App. A)."""

    def __init__(
        self, channels: int, context_width: int, head_channels: int, norm_groups: int, operations=nn, **factory
    ) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.norm = operations.GroupNorm(norm_groups, channels, **factory)
        self.q = operations.Linear(channels, channels, **factory)
        self.kv = operations.Linear(context_width, 2 * channels, **factory)
        self.out = operations.Linear(channels, channels, **factory)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None, attend: Attend = attend) -> Tensor:
        """x: (B, C, H, W); context: (B, L, E); bias: broadcastable to (B, heads, N, L). Returns the shape of x."""
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q = rearrange(self.q(tokens), "b n (k d) -> b k n d", k=self.heads)
        k, v = rearrange(self.kv(context), "b l (two k d) -> two b k l d", two=2, k=self.heads)
        attended = rearrange(attend(q, k, v, bias), "b k n d -> b n (k d)")
        return x + rearrange(self.out(attended), "b (h w) c -> b c h w", h=x.shape[2])
