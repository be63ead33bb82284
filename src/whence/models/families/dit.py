"""DiT: latents and a class."""

from __future__ import annotations

from diffusers import DiTTransformer2DModel
from torch import Tensor

from whence.models.families.family import Cond, Drawing, Family, needs
from whence.types import Call


@needs("class_labels")
def call_dit(call: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """DiTTransformer2DModel(hidden_states, timestep, class_labels).sample; class_labels [b] int64."""
    return call(x_t, timestep=t, class_labels=cond["class_labels"], return_dict=False)[0]


DIT = Family(
    DiTTransformer2DModel,
    lambda config: call_dit,
    folder="transformer",
    name="DiT",
    parts=("vae",),
    classes="num_embeds_ada_norm",
    drawing=Drawing(guidance=4.0, no_class="num_embeds_ada_norm"),
)
