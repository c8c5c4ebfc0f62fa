"""Conditioning: what the denoiser is told about the image it makes.

Three embeddings, each of which may be absent: CLIP text, T5 text and a CLIP image embedding (the style). An absent
embedding is all zeros and hidden by its mask, exactly as training drops it (eDiff-I, Sec. 4.2), so any subset works. The
style's mask is a number, its strength: it may also be there in part. A super-resolution stage also sees the low-res image.
Axis letters: B batch, L tokens, E embedding width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CLIP_LENGTH = 77  # tokens (eDiff-I, App. A)
T5_LENGTH = 113
EMBEDDINGS = ("clip", "t5", "image")


@dataclass(frozen=True)
class Conditioning:
    """Embeddings of B requests. Masks are True where a token counts; padding and dropped embeddings are False.

    image_strength: 0 is a style that is absent, whatever `image` holds, 1 is one as in training; `UNet` says what is between.
    low_res and augmentation_sigma are None for the base stage. They are no embedding: nothing drops them.
    """

    clip_tokens: Tensor  # (B, 77, E_clip) hidden states of CLIP's text encoder
    clip_mask: Tensor  # (B, 77) bool
    clip_pooled: Tensor  # (B, E_pooled)
    t5_tokens: Tensor  # (B, 113, E_t5)
    t5_mask: Tensor  # (B, 113) bool
    image: Tensor  # (B, E_image) CLIP image embedding
    image_strength: Tensor  # (B,) float, 0 or more
    low_res: Tensor | None = None  # (B, 3, H, W) in [-1, 1], at the size of the image that is made
    augmentation_sigma: Tensor | None = None  # (B,) noise that was added to low_res; 0 is none

    @classmethod
    def of_text(
        cls, text, image: Tensor | None = None, image_width: int | None = None, image_strength: float | Tensor = 1.0
    ) -> "Conditioning":
        """From the text embeddings of `encoders` and, for a style, an image embedding (B, E_image) and its strength."""
        batch = text.clip_tokens.shape[0]
        if image is None:
            width = image_width if image_width is not None else text.clip_pooled.shape[1]
            image, image_strength = text.clip_pooled.new_zeros(batch, width), 0.0
        strength = torch.as_tensor(image_strength, dtype=torch.float32, device=image.device).expand(batch)
        return cls(text.clip_tokens, text.clip_mask, text.clip_pooled, text.t5_tokens, text.t5_mask, image, strength)

    def with_low_res(self, low_res: Tensor, augmentation_sigma: Tensor) -> "Conditioning":
        """The same requests for a super-resolution stage. low_res: (B, 3, H, W); augmentation_sigma: (B,)."""
        return replace(self, low_res=low_res, augmentation_sigma=augmentation_sigma)

    def __len__(self) -> int:
        return self.image.shape[0]

    def map(self, function) -> "Conditioning":
        """Apply `function` to each tensor."""
        present = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return Conditioning(**{name: function(tensor) for name, tensor in present.items()})

    def rows(self, index) -> "Conditioning":
        """The requests selected by `index`, a slice or a list of rows."""
        return self.map(lambda tensor: tensor[index])

    def to(self, device=None, dtype: torch.dtype | None = None) -> "Conditioning":
        """Move all tensors to `device`; only the floating ones take `dtype`."""
        return self.map(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def drop(self, clip: Tensor | None = None, t5: Tensor | None = None, image: Tensor | None = None) -> "Conditioning":
        """Zero and hide whole embeddings of the rows marked True, (B,) bool each (eDiff-I, Sec. 4.2).

        Without CLIP text neither its tokens nor its pooled vector remain.
        """
        changed = {}
        if clip is not None:
            changed["clip_tokens"] = self.clip_tokens * ~clip[:, None, None]
            changed["clip_pooled"] = self.clip_pooled * ~clip[:, None]
            changed["clip_mask"] = self.clip_mask & ~clip[:, None]
        if t5 is not None:
            changed["t5_tokens"] = self.t5_tokens * ~t5[:, None, None]
            changed["t5_mask"] = self.t5_mask & ~t5[:, None]
        if image is not None:
            changed["image"] = self.image * ~image[:, None]
            changed["image_strength"] = self.image_strength * ~image
        return replace(self, **changed)

    def only(self, *kept: str) -> "Conditioning":
        """Keep the named embeddings of `EMBEDDINGS` and drop the others: `only("t5")` is the paper's T5-only ablation."""
        unknown = set(kept) - set(EMBEDDINGS)
        if unknown:
            raise ValueError(f"Unknown embedding {sorted(unknown)[0]!r}. The embeddings are {', '.join(EMBEDDINGS)}.")
        everything = torch.ones_like(self.image_strength, dtype=torch.bool)
        return self.drop(**{name: everything for name in EMBEDDINGS if name not in kept})


def null_conditioning(conditioning: Conditioning) -> Conditioning:
    """Nothing is known: all three embeddings dropped. The unconditional branch of guidance (eDiff-I, Sec. 4.2)."""
    return conditioning.only()


def joined(parts: Sequence[Conditioning]) -> Conditioning:
    """Several requests as one batch; all of one stage."""
    present = [name for name, tensor in vars(parts[0]).items() if tensor is not None]
    return Conditioning(**{name: torch.cat([getattr(part, name) for part in parts]) for name in present})
