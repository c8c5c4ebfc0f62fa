"""What is smaller in a stand-in than in the file it stands for, where that file's own shapes do not say it."""

import comfy.ops
import torch

KEY = "stand_in"  # of the metadata: JSON of what the real file's U-Net would be recognised by, {} where nothing is changed
TOKENS = 512  # rows of the text encoders' tables

CLIP = {"num_hidden_layers": 3, "intermediate_size": 64}  # three: SDXL reads the last but one
T5 = {"num_layers": 2, "num_heads": 2, "d_kv": 16, "d_ff": 32}
CLIP_VISION = {"num_hidden_layers": 2, "intermediate_size": 64}


class TextOperations(comfy.ops.manual_cast):
    """Layers of the text encoders: the real tokenizers' ids share the rows of a short table."""

    class Embedding(comfy.ops.manual_cast.Embedding):
        def __init__(self, rows, *args, **kwargs):
            super().__init__(min(rows, TOKENS), *args, **kwargs)

        def forward(self, ids, *args, **kwargs):
            return super().forward(ids % self.num_embeddings, *args, **kwargs)


TEXT_OPTIONS = {
    "custom_operations": TextOperations,
    "model_config": CLIP,  # what ComfyUI starts from when it reads the number of positions from a file
    "clip_l_model_config": CLIP,
    "clip_g_model_config": CLIP,
    "clip_h_model_config": CLIP,
    "t5xxl_model_config": T5,
    "umt5xxl_model_config": T5,
}


def autoencoder(channels: int, levels: int = 4) -> dict:
    """Arguments of the AutoencoderKL for latents of so many channels, 8 times smaller than the picture, or 4 at three levels.

    Without its attention in the middle, which alone takes ten seconds for a picture of 1024 on a processor.
    """
    levels = dict(
        double_z=True, z_channels=channels, resolution=256, in_channels=3, out_ch=3, ch=32, ch_mult=[1] * levels,
        num_res_blocks=0, attn_resolutions=[], dropout=0.0, attn_op=torch.nn.Identity,
    )  # fmt: skip
    return {"embed_dim": channels, "ddconfig": levels}
