"""Perceptrons on pictures of a few pixels, without classes."""

from __future__ import annotations

from whence.models.families.family import Family
from whence.models.families.unet import call_unet
from whence.models.mlp import MLPDenoiser

PERCEPTRON = Family(MLPDenoiser, lambda config: call_unet, name="a denoiser of pixels")
