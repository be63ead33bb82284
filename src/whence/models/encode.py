"""What latent and text-conditional networks see of pictures and captions, computed once and kept in the run folder.

latents    z = (mode or sample of the VAE's q(z | x) - shift_factor) * scaling_factor
text       what the tokenizers and text encoders of the family make of it (see `families`)

as diffusers' training scripts compute them. Everything runs in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from whence.data.images import ImageFolder, fingerprint
from whence.data.layout import some
from whence.diffusion.noise import key_of
from whence.models.autoencoders import missing_autoencoder
from whence.models.families.family import CLIP, CLIP_2, T5_3, Embedding
from whence.models.networks import NETWORKS
from whence.models.parts import READY, Parts, refuse_missing
from whence.models.pipeline import Model
from whence.storage.arrays import Rows, Store
from whence.storage.files import progress, read_json, write_json
from whence.types import Batch, Engine, Images, WhenceError, digest

PICTURES_PER_SHARD, CAPTIONS_PER_SHARD = 256, 32
TEXT_FOLDERS = (*CLIP, *CLIP_2, *T5_3)


@dataclass(frozen=True)
class Kept:
    """Arrays [count, *shape] on disk."""

    rows: Rows
    shape: tuple[int, ...]

    def __getitem__(self, numbers: Sequence[int]) -> Tensor:
        return self.rows.take(numbers).reshape(len(numbers), *self.shape)


@dataclass(frozen=True, eq=False)
class EncodedImages:
    """Pictures as their network sees them. Satisfies `whence.types.Images`: same names, digests and noise keys.

    Args:
        pictures: as they look.
        latents: in place of the pixels; None where the network takes those.
        texts: condition -> one row per distinct caption.
        captions: the caption of each picture, as its row in `texts` [n].
        same: conditions that are equal for all pictures.
        how: what all this was made by.
        unconditional: () -> the conditions of an empty caption; None where the network reads none.
    """

    pictures: Images
    latents: Kept | None
    texts: Mapping[str, Kept | Tensor]
    captions: Sequence[int]
    same: Mapping[str, Tensor]
    how: Mapping[str, object]
    unconditional: Callable[[], Mapping[str, Tensor]] | None = None

    @cached_property
    def empty_caption(self) -> Mapping[str, Tensor] | None:
        """The conditions of an empty caption, None where the network reads none."""
        return None if self.unconditional is None else self.unconditional()

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def ids(self) -> Sequence[str]:
        return self.pictures.ids

    @property
    def digests(self) -> Sequence[str]:
        return self.pictures.digests

    @property
    def meta(self) -> Mapping[str, Sequence[object]]:
        return self.pictures.meta

    @property
    def labels(self) -> Tensor | None:
        return self.pictures.labels

    @property
    def preprocess(self) -> dict[str, object]:
        return {**self.pictures.preprocess, **self.how}

    def describe(self) -> dict[str, object]:
        return {"is": "encoded", "count": len(self), **self.preprocess, "fingerprint": fingerprint(self)}

    def batch(self, rows: Sequence[int]) -> Batch:
        rows = [int(row) for row in rows]
        seen = self.pictures.batch(rows) if self.latents is None else _without_pixels(self.pictures, rows)
        cond = {**seen.cond, **{name: value.expand(len(rows), *value.shape) for name, value in self.same.items()}}
        cond |= {name: kept[[self.captions[row] for row in rows]] for name, kept in self.texts.items()}
        return Batch(seen.x0 if self.latents is None else self.latents[rows], seen.keys, cond)


def _without_pixels(pictures: Images, rows: Sequence[int]) -> Batch:
    """Keys and labels of some pictures, no file opened."""
    labels = pictures.labels
    keys = torch.tensor([key_of(pictures.digests[row]) for row in rows], dtype=torch.int64)
    return Batch(torch.empty(len(rows), 0), keys, {} if labels is None else {"class_labels": labels[list(rows)]})


def encode_images(
    model: Model,
    pictures: Images,
    root: Path,
    engine: Engine = Engine(),
    caption_column: str | None = None,
    sample: int | None = None,
    tokens: int | None = None,
) -> Images:
    """The pictures as the model's network sees them; the pictures themselves where it takes pixels and no text.

    Args:
        model: whose network it is.
        pictures: as they look.
        root: the run folder that keeps the result.
        engine: how the work is carried out.
        caption_column: the column of the pictures' metadata that is their text; "text" by default.
        sample: None for the mode of the VAE's posterior, a seed for a sample of it (which training scripts draw anew in
            each epoch); noise keyed by the picture.
        tokens: length that T5's text is brought to; that of the training script by default (SD3 77, Flux 512, PixArt 120).

    Raises:
        WhenceError: the folder has no VAE or tokenizer, or the pictures no captions.
    """
    reads_text = model.reads_text
    check_conditions(model, pictures, caption_column)
    check_parts(model, *pictures.batch([0]).x0.shape[-2:])
    if model.vae is None and not reads_text:
        return pictures
    column = caption_column or "text"
    parts = model.parts(engine)
    made: dict[str, object] = {}
    latents, made = (None, made) if model.vae is None else _latents(model, parts, pictures, Store(root), engine, sample)
    texts: Mapping[str, Kept | Tensor] = {}
    captions: list[int] = []
    same = _sizes(model, *(float(side) for side in pictures.batch([0]).x0.shape[-2:]))
    if model.token is not None:
        texts, captions, read_by = _token_ids(parts, _captions(pictures, column))
        made |= read_by
    elif reads_text:
        texts, captions, read_by = _texts(model, parts, pictures, Store(root), column, tokens)
        made |= read_by
    unconditional = partial(_unconditional, model, parts, texts, tokens) if reads_text else None
    encoded = EncodedImages(pictures, latents, texts, captions, same, made, unconditional)
    missing = [name for name in model.needs if name not in encoded.batch([0]).cond]
    if missing:
        raise WhenceError(f"{model.folder}: the network needs the condition {missing[0]!r}; {READY}")
    return encoded


def check_parts(model: Model, height: int, width: int) -> None:
    """Refuse a pipeline whose parts do not make what its network takes of pictures of a size, by configuration alone.

    Args:
        model: the pipeline.
        height: of the pictures.
        width: of the pictures.
    """
    where, vae, absent = str(model.folder), model.vae, missing_autoencoder(model.folder)
    if vae is None and (absent or model.in_channels not in (1, 3)):
        told = f"{absent or 'vae'}/ is missing, but the network takes latents (in_channels is {model.in_channels})"
        raise WhenceError(told, where, f"the VAE it was trained with; {READY}")
    _check_channels(model)
    if vae is not None:
        at = str(model.folder / vae.part / "config.json")
        if vae.config.get("latents_mean") is not None:
            raise WhenceError("latents_mean is set", at, f"a VAE with shift and scaling_factor; {READY}")
        if height % vae.shrink or width % vae.shrink:
            accepted = f"a --resolution that {vae.shrink} divides"
            raise WhenceError(f"pictures of {width}x{height} do not fit this VAE", at, accepted)
    refuse_missing(model.folder, [part for part in model.family.parts if part != "vae"])


def _check_channels(model: Model) -> None:
    """Whether the network takes what the VAE makes, and makes something of its size."""
    seen, vae = model.in_channels // model.family.packing, model.vae
    if vae is not None and seen != vae.latents:
        told = f"the VAE makes {vae.latents} channels, the network takes {seen} (for inpainting or editing?)"
        raise WhenceError(told, str(model.folder), f"networks that take the latents alone; {READY}")
    made, seen = model.config.get("out_channels"), model.in_channels
    if vae is None and made not in (None, seen, 2 * seen):
        accepted = f"{seen}, or {2 * seen} where the variance is learned too"
        where = str(model.folder / model.part / "config.json")
        raise WhenceError(f"out_channels is {made!r} for in_channels {seen}", where, accepted)


def check_conditions(model: Model, pictures: Images, caption_column: str | None) -> None:
    """Refuse pictures without the captions or the classes that a model reads, or with a column that it does not read.

    Args:
        model: the pipeline.
        pictures: as they look.
        caption_column: the column of their captions, "text" where None.
    """
    if model.reads_text:
        _captions(pictures, caption_column or "text")
    elif caption_column is not None:
        raise WhenceError(f"{model.folder} reads no text", "--caption_column", "a model that does, or no such option")
    if "class_labels" in model.needs and pictures.labels is None:
        accepted = "class folders, or a column `label` in metadata.jsonl"
        raise WhenceError("the model is class-conditional, but the images have no labels", _place(pictures), accepted)


def _place(pictures: Images) -> str:
    """Where pictures lie, for errors."""
    return str((pictures.folder if isinstance(pictures, ImageFolder) else None) or "the images")


def try_parts(model: Model, engine: Engine, side: int) -> None:
    """Encode a black picture and an empty caption, by which every part of a pipeline is loaded.

    Args:
        model: the pipeline.
        engine: how the work is carried out.
        side: of the picture.
    """
    parts = model.parts(engine)
    if model.vae is not None:
        parts.latents(Batch(torch.full((1, model.channels, side, side), -1.0), torch.zeros(1, dtype=torch.int64)), None)
    if model.reads_text:
        prompt_conditions(model, parts, [""], side)


def with_text(model: Model, latents: Images, root: Path, engine: Engine, resolution: int) -> Images:
    """Latents that are there already, with what the network is told: their captions, the column `text`, and the side of
    their pictures."""
    texts, captions, told = _texts(model, model.parts(engine), latents, Store(root), "text", None)
    return EncodedImages(latents, None, texts, captions, _sizes(model, resolution, resolution), told)


# ---------------------------------------------------------------------------------------------------------- latents


def _latents(
    model: Model, parts: Parts, pictures: Images, store: Store, engine: Engine, sample: int | None
) -> tuple[Kept, dict[str, object]]:
    vae = model.vae
    assert vae is not None
    how: dict[str, object] = {
        "vae": parts.digest(vae.part),
        "latents": "mode" if sample is None else f"sample {sample}",
    }
    first = _for_vae(pictures, [0]).x0
    channels, factor = vae.latents, vae.shrink
    shape = (channels, first.shape[-2] // factor, first.shape[-1] // factor)
    key = {"part": "latents", **how, "images": fingerprint(pictures)}
    rows = store.array(key, (len(pictures), math.prod(shape)), torch.float32, PICTURES_PER_SHARD)
    for shard in progress(rows.missing(), "encoding pictures"):
        pieces = []
        for start in range(shard.start, shard.stop, engine.batch_size):
            batch = _for_vae(pictures, range(start, min(start + engine.batch_size, shard.stop)))
            pieces.append(parts.latents(batch, sample))
        rows.write(shard, torch.cat(pieces).flatten(1))
    return Kept(rows, shape), how


def _for_vae(pictures: Images, rows: Sequence[int]) -> Batch:
    """Some pictures, each of them such as an autoencoder takes."""
    batch = pictures.batch(list(rows))
    for row, x in zip(rows, batch.x0, strict=True):
        if not x.is_floating_point() or x.abs().max() > 1.001:
            told = f"{x.dtype} from {float(x.min()):g} to {float(x.max()):g}"
            raise WhenceError(f"image {pictures.ids[row]!r}: a VAE takes floats in [-1, 1]; this is {told}")
    return batch


def _sizes(model: Model, height: float, width: float) -> dict[str, Tensor]:
    """The conditions that say how large a picture is."""
    return {name: value for name, value in model.family.sizes(height, width).items() if name in model.needs}


# ------------------------------------------------------------------------------------------------------------- text


def _texts(
    model: Model, parts: Parts, pictures: Images, store: Store, column: str, tokens: int | None
) -> tuple[dict[str, Kept], list[int], dict[str, object]]:
    """Every distinct caption, encoded once."""
    written = _captions(pictures, column)
    distinct = sorted(set(written))
    number = {caption: i for i, caption in enumerate(distinct)}
    embed = _embedding(model)
    folders = [name for name in TEXT_FOLDERS if (model.folder / name).is_dir()]
    how: dict[str, object] = {
        "text": {name: parts.digest(name) for name in folders},
        "tokens": tokens,
        "captions": digest(written),
    }
    if model.family.masks_text and parts.masks_text:
        how["masked"] = True  # what was stored before it was heeded is of other states
    key = {"part": "text", "kind": model.config["_class_name"], **how, "captions": digest(distinct)}
    note = store.root / "features" / f"text-{digest(key)}.json"
    if not note.is_file():
        write_json(note, {name: list(value.shape[1:]) for name, value in embed(parts, distinct[:1], tokens).items()})
    shapes = {name: tuple(shape) for name, shape in read_json(note, dict[str, list[int]]).items()}
    kept = {
        name: Kept(_array(store, {**key, "condition": name}, len(distinct), shape), shape)
        for name, shape in shapes.items()
    }
    missing = sorted({shard.start for each in kept.values() for shard in each.rows.missing()})
    for start in progress(missing, "encoding captions"):
        shard = slice(start, min(start + CAPTIONS_PER_SHARD, len(distinct)))
        for name, value in embed(parts, distinct[shard], tokens).items():
            kept[name].rows.write(shard, value.flatten(1).float())
    return kept, [number[caption] for caption in written], how


def _token_ids(parts: Parts, written: Sequence[str]) -> tuple[dict[str, Tensor], list[int], dict[str, object]]:
    """Captions as token ids, for a network with its text encoder inside."""
    distinct = sorted(set(written))
    number = {caption: i for i, caption in enumerate(distinct)}
    how: dict[str, object] = {
        "text": {"tokenizer": parts.digest("tokenizer")},
        "token": parts.token,
        "captions": digest(written),
    }
    return {"input_ids": parts.token_ids(distinct)}, [number[caption] for caption in written], how


def _unconditional(
    model: Model, parts: Parts, texts: Mapping[str, Kept | Tensor], tokens: int | None
) -> dict[str, Tensor]:
    """The conditions that an empty caption has in place of those of `texts`: [...] each."""
    if model.token is not None:
        return {"input_ids": parts.token_ids([""])[0]}
    return {name: value[0] for name, value in _embedding(model)(parts, [""], tokens).items() if name in texts}


def prompt_conditions(
    model: Model, parts: Parts, prompts: Sequence[str], resolution: int, tokens: int | None = None
) -> dict[str, Tensor]:
    """What the network is told for prompts: each [m, ...]. tokens: length of T5's text, that of training by default."""
    if model.token is not None:
        return {"input_ids": parts.token_ids(prompts)}
    found = _embedding(model)(parts, prompts, tokens)
    sizes = _sizes(model, resolution, resolution)
    return found | {key: value.expand(len(prompts), *value.shape) for key, value in sizes.items()}


def _embedding(model: Model) -> Embedding:
    """How the family of the model's network makes conditions of texts."""
    if model.family.text is None:
        accepted = ", ".join(sorted(name for name, family in NETWORKS.items() if family.text is not None))
        raise WhenceError(f"{model.folder}: {model.config['_class_name']} takes no prompts; accepted: {accepted}")
    return model.family.text


def _array(store: Store, key: Mapping[str, object], count: int, shape: tuple[int, ...]) -> Rows:
    return store.array(key, (count, int(torch.Size(shape).numel())), torch.float32, CAPTIONS_PER_SHARD)


def _captions(pictures: Images, column: str) -> list[str]:
    if column not in pictures.meta:
        told = f"this model reads text, but there is no column {column!r} (columns: {some(pictures.meta, 9) or 'none'})"
        accepted = (
            "captions in metadata.jsonl (key.txt in a tar, a column of a table), or the name of their column with "
            "--caption_column (of pictures to explain --query_caption_column)"
        )
        raise WhenceError(told, _place(pictures), accepted)
    captions = {name: value for name, value in zip(pictures.ids, pictures.meta[column], strict=True)}
    without = [f"{name} has {value!r}" for name, value in captions.items() if not isinstance(value, str)]
    if without:
        told = f"{len(without)} of {len(captions)} images have no caption in {column!r}: {some(without)}"
        raise WhenceError(told, _place(pictures), "a text for each, an empty one where it was trained without")
    return [str(value) for value in captions.values()]
