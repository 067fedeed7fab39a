"""A tiny autoencoder of diffusers with random weights: 3 channels, 4 of latents, half the sides."""

import torch
from diffusers import AutoencoderKL


def tiny_kl(**settings):
    torch.manual_seed(0)
    settings = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        "norm_num_groups": 2,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
    } | settings
    return AutoencoderKL(**settings).requires_grad_(False)
