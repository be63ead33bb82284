"""Small networks of our own, saved and loaded like those of diffusers."""

from __future__ import annotations

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class _Block(nn.Module):
    """h + W2 silu(W1 norm(h) + W3 time)"""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.into, self.time, self.out = nn.LayerNorm(width), *(nn.Linear(width, width) for _ in range(3))

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        return h + self.out(nn.functional.silu(self.into(self.norm(h)) + self.time(time)))


class MLPDenoiser(ModelMixin, ConfigMixin):
    """A residual perceptron that predicts noise from a flattened image and its timestep; for pictures of a few pixels.

    Args:
        sample_size: side of the pictures.
        in_channels: of the pictures.
        width: of a layer.
        layers: residual blocks.
    """

    @register_to_config
    def __init__(self, sample_size: int = 8, in_channels: int = 1, width: int = 128, layers: int = 2):
        super().__init__()
        pixels = in_channels * sample_size**2
        self.into = nn.Linear(pixels, width)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, pixels)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """The predicted noise, shaped like the pictures.

        Args:
            sample: noisy pictures [b, C, H, W].
            timestep: [b].
            return_dict: as networks of diffusers have it; not used.
        """
        frequencies = torch.exp(-math.log(10_000) * torch.arange(32, device=sample.device) / 32)
        angles = (timestep[:, None] * frequencies).to(sample)
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        h = self.into(sample.flatten(1))
        for block in self.blocks:
            h = block(h, time)
        return (self.out(self.norm(h)).reshape(sample.shape),)
