"""What whence knows of a family of networks, as one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from diffusers import ModelMixin
from torch import Tensor

from whence.diffusion.forward import Predict
from whence.models.parts import Parts
from whence.types import Call, WhenceError

Config = Mapping[str, Any]  # the content of a config.json
Cond = Mapping[str, Tensor]
Embedding = Callable[[Parts, Sequence[str], int | None], dict[str, Tensor]]
HOOK = "any other model: whence.Custom(predict, target, timesteps) with task_from_module"
CLIP, CLIP_2, T5_3 = ("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"), ("tokenizer_3", "text_encoder_3")


def _no_sizes(height: float, width: float) -> dict[str, Tensor]:
    return {}


def _always(config: Config) -> bool:
    return True


def _same(text: str) -> str:
    return text


def _as_told(parts: Parts, cond: dict[str, Tensor]) -> dict[str, Tensor]:
    return cond


@dataclass(frozen=True)
class Drawing:
    """How diffusers' pipeline of a family draws, so far as it is not as the training script trains.

    Args:
        guidance: its scale of guidance, 1 for none; None where it has no such option.
        tokens: pipeline folder -> length of T5's text; None for that of training.
        prompt: what it makes of a prompt before it is encoded.
        nothing: (parts, conditions of an empty caption) -> what it tells of a picture without a prompt.
        no_class: the entry of the configuration that is the class of a picture without one; "" where there is none.
        scheduler: entries that it sets in the scheduler's configuration.
        even: whether it walks from noise level 1 in even steps, whatever the scheduler's are (flow matching).
        max_shift: of a shift of the noise levels that grows with the picture, by default.
    """

    guidance: float | None = None
    tokens: Callable[[Path], int | None] = lambda folder: None
    prompt: Callable[[str], str] = _same
    nothing: Callable[[Parts, dict[str, Tensor]], dict[str, Tensor]] = _as_told
    no_class: str = ""
    scheduler: Mapping[str, object] = field(default_factory=dict)
    even: bool = False
    max_shift: float = 1.15


@dataclass(frozen=True)
class Family:
    """A class of networks, and everything about them that differs from one to the other.

    Args:
        kind: the class, with diffusers' `from_pretrained`.
        call: how a network with a given configuration is called; mark calls that ask for conditions with `needs`.
        folder: the folder of a pipeline that it lies in.
        name: what people call it, the class where it is "".
        text: (parts of the pipeline, captions, tokens) -> conditions, each [b, ...]; None for networks that read no text.
        masks_text: whether its pipeline heeds `use_attention_mask` of its text encoder.
        parts: without these folders pictures and captions cannot be encoded.
        optional: folders that may be missing.
        without: what follows where an optional folder is missing.
        tokens: length of the text that the network sees, by default.
        sizes: (height, width) of a picture in pixels -> conditions.
        classes: the entry of the configuration that counts the classes.
        packing: channels of the network per channel of the latents; 4 where it sees them in patches of 2x2.
        guidance_is_input: the scale of guidance is an input; it is not drawn from with and without text.
        drawing: how its pipeline draws.
        variants: families of the same class, told apart by their configuration.
        fits: whether a configuration is of this variant.
    """

    kind: type[ModelMixin]
    call: Callable[[Config], Predict]
    folder: str = "unet"
    name: str = ""
    text: Embedding | None = None
    masks_text: bool = False
    parts: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    without: str = ""
    tokens: int = 77
    sizes: Callable[[float, float], dict[str, Tensor]] = _no_sizes
    classes: str = "num_class_embeds"
    packing: int = 1
    guidance_is_input: bool = False
    drawing: Drawing = Drawing()
    variants: tuple[Family, ...] = ()
    fits: Callable[[Config], bool] = _always

    def of(self, config: Config) -> Family:
        """The variant that a configuration is of, or the family itself."""
        return next((variant for variant in self.variants if variant.fits(config)), self)

    def encoder_of(self, part: str, folder: Path) -> str | None:
        """The folder of a text encoder that LoRA files call `part`: kohya counts T5 as the third where it is the second."""
        names = (part, "text_encoder_2") if part == "text_encoder_3" else (part,)
        accepted = [name for name in names if name in (*self.parts, *self.optional)]
        return next((name for name in accepted if (folder / name).is_dir()), None)

    def new(self, config: Config) -> ModelMixin:
        """A network of this class; entries of config.json that are notes of diffusers begin with _."""
        return self.kind(**{name: value for name, value in config.items() if not name.startswith("_")})


WHERE = {
    "class_labels": "this model is class-conditional: the images need class folders or a `label` column",
    "encoder_hidden_states": "this model reads text: the images need captions, a column `text` in metadata.jsonl",
}
"""What is missing where a condition is: said once, as it is for people who have folders."""


@runtime_checkable
class Conditional(Protocol):
    """A call that says which conditions it cannot do without, each [b, ...]."""

    needs: tuple[str, ...]


def needs(*names: str) -> Callable[[Predict], Predict]:
    """Mark a call with the conditions it cannot do without; what is absent is an error before the call."""

    def mark(call: Predict) -> Predict:
        @wraps(call)
        def checked(net: Call, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            present(names, cond)
            return call(net, x_t, t, cond)

        vars(checked)["needs"] = names
        return checked

    return mark


def needs_of(call: Predict) -> tuple[str, ...]:
    """The conditions that a call cannot do without."""
    return call.needs if isinstance(call, Conditional) else ()


def present(names: Sequence[str], cond: Cond) -> None:
    """Refuse conditions of which one is absent, and name it."""
    missing = [name for name in names if name not in cond]
    if missing:
        why = WHERE.get(missing[0], f"this model needs the condition {missing[0]!r}")
        raise WhenceError(f"{why} (cond has {', '.join(cond) or 'nothing'}; needed: {', '.join(names)})")


def refuse(kind: type, config: Config, *names: str) -> None:
    """Refuse entries of a configuration by which the network would take more conditions than we know of."""
    for name in names:
        if config.get(name) is not None:
            raise WhenceError(f"{kind.__name__} with {name} {config[name]!r} is not known; {HOOK}")
