"""Similarity: which training images look like the query. The baseline that every other method has to beat."""

from __future__ import annotations

from whence.encoders import Pixels
from whence.features import Encoded
from whence.inner_product import InnerProduct
from whence.normalize import cosine


def pixel_dot(center: bool = False) -> InnerProduct:
    """<x_q, x_i> of the flattened images in [-1, 1]. Bright images dominate it; prefer the cosine."""
    return InnerProduct("pixel_dot", Encoded(Pixels(center)))


def pixel_cosine(center: bool = False) -> InnerProduct:
    """cos(x_q, x_i) of the flattened images in [-1, 1]."""
    return InnerProduct("pixel_cosine", Encoded(Pixels(center)), normalize=cosine)
