"""What latent and text-conditional networks see of pictures and captions, computed once and kept in the run folder.

latents    z = (mode or sample of the VAE's q(z | x) - shift_factor) * scaling_factor
text       SD 1, 2    CLIP: last hidden state
           SDXL       both CLIPs: last hidden state but one, side by side; text_embeds: the projection of the second
           SD3        both CLIPs likewise, filled up with zeros to the width of T5, then T5 as further tokens;
                      pooled_projections: both projections
           Flux       T5; pooled_projections: CLIP's pooled state
           PixArt     T5 and its attention_mask

as diffusers' training scripts compute them. Everything runs in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer
from transformers.utils import logging as transformers_logging

from whence.data.images import ImageFolder, fingerprint
from whence.diffusion.noise import key_of, normals, seed_for, stream
from whence.models.networks import CallFlux
from whence.models.pipeline import Model
from whence.storage.arrays import Rows, Store
from whence.storage.files import files_digest, progress, read_json, write_json
from whence.types import Batch, Engine, Images, WhenceError, digest

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
PICTURES_PER_SHARD, CAPTIONS_PER_SHARD = 256, 32
READY = "or give Images whose x0 and cond are ready for the network"


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

    latents: in place of the pixels, None where the network takes those; texts: condition -> one row per distinct caption;
    captions: [n] the caption of each picture; same: conditions that are equal for all; how: what all this was made by;
    silence: the conditions of an empty caption, computed when they are asked for.
    """

    pictures: Images
    latents: Kept | None
    texts: Mapping[str, Any]
    captions: Sequence[int]
    same: Mapping[str, Tensor]
    how: Mapping[str, Any]
    silence: Callable[[], Mapping[str, Tensor]] | None = None

    @cached_property
    def empty_caption(self) -> Mapping[str, Tensor] | None:
        """What the network is told of a picture without caption, None where it reads none."""
        return None if self.silence is None else self.silence()

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
    def preprocess(self) -> dict[str, Any]:
        return {**self.pictures.preprocess, **self.how}

    def describe(self) -> dict[str, Any]:
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
    caption_column: str = "text",
    sample: int | None = None,
    tokens: int | None = None,
) -> Images:
    """The pictures as the model's network sees them; the pictures themselves where it takes pixels and no text.

    root: the run folder that keeps the result. caption_column: the column of the pictures' metadata that is their text.
    sample: None for the mode of the VAE's posterior, a seed for a sample of it (which training scripts draw anew in each
    epoch); noise keyed by the picture. tokens: length that T5's text is brought to; default: that of the training
    script (SD3 77, Flux 512, PixArt 120).

    Raises WhenceError where the folder has no VAE or tokenizer, or the pictures no captions.
    """
    reads_text = model.reads_text
    in_channels = int(model.config.get("in_channels", 0))
    if model.vae is None and in_channels not in (1, 3):
        raise WhenceError(
            f"{model.folder} has no vae/, but its network takes latents; add the VAE it was trained with, {READY}"
        )
    if model.vae is None and not reads_text:
        return pictures
    parts = Parts(model.folder, engine, model.token)
    latents, made = (None, {}) if model.vae is None else _latents(model, parts, pictures, Store(root), engine, sample)
    texts: dict[str, Any] = {}
    captions: list[int] = []
    same = _sizes(model, *(float(side) for side in pictures.batch([0]).x0.shape[-2:]))
    if model.token is not None:
        texts, captions, told = _token_ids(parts, _captions(pictures, caption_column))
        made |= told
    elif reads_text:
        texts, captions, told = _texts(model, parts, pictures, Store(root), caption_column, tokens)
        made |= told
    silence = partial(_silence, model, parts, texts, tokens) if reads_text else None
    encoded = EncodedImages(pictures, latents, texts, captions, same, made, silence)
    missing = [name for name in model.needs if name not in encoded.batch([0]).cond]
    if missing:
        why = "the images need class folders or a `label` column" if missing[0] == "class_labels" else READY
        raise WhenceError(f"{model.folder}: the network needs the condition {missing[0]!r}; {why}")
    return encoded


def with_text(model: Model, latents: Images, root: Path, engine: Engine, resolution: int) -> Images:
    """Latents that are there already, with what the network is told: their captions, the column `text`, and the side of
    their pictures."""
    texts, captions, told = _texts(model, Parts(model.folder, engine), latents, Store(root), "text", None)
    return EncodedImages(latents, None, texts, captions, _sizes(model, resolution, resolution), told)


# ---------------------------------------------------------------------------------------------------------- latents


def _latents(
    model: Model, parts: Parts, pictures: Images, store: Store, engine: Engine, sample: int | None
) -> tuple[Kept, dict[str, Any]]:
    how = {"vae": parts.digest("vae"), "latents": "mode" if sample is None else f"sample {sample}"}
    first = pictures.batch([0]).x0
    if not first.is_floating_point() or first.abs().max() > 1.001:
        told = f"{first.dtype} from {float(first.min()):g} to {float(first.max()):g}"
        raise WhenceError(f"image {pictures.ids[0]!r}: a VAE takes floats in [-1, 1]; this is {told}")
    channels, factor = int(model.vae["latent_channels"]), 2 ** (len(model.vae["block_out_channels"]) - 1)  # type: ignore[index]
    if first.shape[-2] % factor or first.shape[-1] % factor:
        size = f"{first.shape[-1]}x{first.shape[-2]}"
        raise WhenceError(f"pictures of {size} do not fit this VAE; give a --resolution that {factor} divides")
    seen = int(model.config["in_channels"]) // (4 if isinstance(model.forward.predict, CallFlux) else 1)
    if seen != channels:
        raise WhenceError(
            f"{model.folder}: the network takes {seen} channels, the VAE makes {channels} (for inpainting or "
            f"editing?); {READY[3:]}"
        )
    shape = (channels, first.shape[-2] // factor, first.shape[-1] // factor)
    key = {"part": "latents", **how, "images": fingerprint(pictures)}
    size = shape[0] * shape[1] * shape[2]
    rows = store.array(key, (len(pictures), size), torch.float32, PICTURES_PER_SHARD)
    for shard in progress(rows.missing(), "encoding pictures"):
        pieces = []
        for start in range(shard.start, shard.stop, engine.batch_size):
            batch = pictures.batch(list(range(start, min(start + engine.batch_size, shard.stop))))
            pieces.append(parts.latents(batch, sample))
        rows.write(shard, torch.cat(pieces).flatten(1))
    return Kept(rows, shape), how


def _sizes(model: Model, height: float, width: float) -> dict[str, Tensor]:
    """What SDXL and PixArt are told of the size of the picture: as it is read, nothing cropped away."""
    every = {
        "time_ids": torch.tensor([height, width, 0.0, 0.0, height, width]),
        "resolution": torch.tensor([height, width]),
        "aspect_ratio": torch.tensor([height / width]),
    }
    return {name: value for name, value in every.items() if name in model.needs}


# ------------------------------------------------------------------------------------------------------------- text


def _texts(
    model: Model, parts: Parts, pictures: Images, store: Store, column: str, tokens: int | None
) -> tuple[dict[str, Kept], list[int], dict[str, Any]]:
    """Every distinct caption, encoded once."""
    written = _captions(pictures, column)
    distinct = sorted(set(written))
    number = {caption: i for i, caption in enumerate(distinct)}
    kind = str(model.config["_class_name"])
    embed = EMBED["SDXL" if "text_embeds" in model.needs else kind]
    folders = [name for name in TEXT_FOLDERS if (model.folder / name).is_dir()]
    how = {"text": {name: parts.digest(name) for name in folders}, "tokens": tokens, "captions": digest(written)}
    key = {"part": "text", "kind": kind, **how, "captions": digest(distinct)}
    note = store.root / "features" / f"text-{digest(key)}.json"
    if not note.is_file():
        write_json(note, {name: list(value.shape[1:]) for name, value in embed(parts, distinct[:1], tokens).items()})
    shapes = {name: tuple(shape) for name, shape in read_json(note).items()}
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


def _token_ids(parts: Parts, written: Sequence[str]) -> tuple[dict[str, Tensor], list[int], dict[str, Any]]:
    """Captions as token ids, for a network with its text encoder inside."""
    distinct = sorted(set(written))
    number = {caption: i for i, caption in enumerate(distinct)}
    how = {"text": {"tokenizer": parts.digest("tokenizer")}, "token": parts.token, "captions": digest(written)}
    return {"input_ids": parts.token_ids(distinct)}, [number[caption] for caption in written], how


def _silence(model: Model, parts: Parts, texts: Mapping[str, Any], tokens: int | None) -> dict[str, Tensor]:
    """The conditions that an empty caption has in place of those of `texts`: [...] each."""
    if model.token is not None:
        return {"input_ids": parts.token_ids([""])[0]}
    kind = "SDXL" if "text_embeds" in model.needs else str(model.config["_class_name"])
    return {name: value[0] for name, value in EMBED[kind](parts, [""], tokens).items() if name in texts}


def prompt_conditions(model: Model, parts: Parts, prompts: Sequence[str], resolution: int) -> dict[str, Tensor]:
    """What the network is told for prompts: each [m, ...]."""
    if model.token is not None:
        return {"input_ids": parts.token_ids(prompts)}
    kind = str(model.config["_class_name"])
    name = "SDXL" if "text_embeds" in model.needs else kind
    if name not in EMBED:
        accepted = ", ".join(sorted(EMBED))
        raise WhenceError(f"{model.folder}: {kind} takes no prompts; accepted: {accepted}")
    found = EMBED[name](parts, prompts, None)
    sizes = _sizes(model, resolution, resolution)
    return found | {key: value.expand(len(prompts), *value.shape) for key, value in sizes.items()}


def _array(store: Store, key: Mapping[str, Any], count: int, shape: tuple[int, ...]) -> Rows:
    return store.array(key, (count, int(torch.Size(shape).numel())), torch.float32, CAPTIONS_PER_SHARD)


def _captions(pictures: Images, column: str) -> list[str]:
    if column not in pictures.meta:
        there = ", ".join(pictures.meta) or "none"
        where = (pictures.folder if isinstance(pictures, ImageFolder) else None) or "the images"
        raise WhenceError(
            f"{where}: this model reads text, but there is no column {column!r} (columns: {there}); write the captions in "
            "metadata.jsonl (key.txt in a tar, a column of a table), or name their column with --caption_column"
        )
    captions = []
    for name, value in zip(pictures.ids, pictures.meta[column], strict=True):
        if not isinstance(value, str):
            raise WhenceError(f"image {name!r}: its caption in {column!r} is {value!r}, not a text")
        captions.append(value)
    return captions


TEXT_FOLDERS = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2", "tokenizer_3", "text_encoder_3")
Embeddings = dict[str, Tensor]


class Parts:
    """The other parts of a pipeline folder, loaded when they are first asked for. token: a new word for its tokenizer."""

    def __init__(self, folder: Path, engine: Engine, token: str | None = None):
        self.folder, self.engine, self.token = folder, engine, token
        self.loaded: dict[str, Any] = {}

    def digest(self, part: str) -> str:
        """Fingerprint of every file of a part."""
        return files_digest(sorted(path for path in self._folder(part).iterdir() if path.is_file()), names=True)

    def _folder(self, part: str) -> Path:
        if not (self.folder / part).is_dir():
            inside = ", ".join(sorted(path.name for path in self.folder.iterdir())[:10])
            raise WhenceError(
                f"{self.folder} has no {part}/ (it holds {inside}); add it as save_pretrained writes it, {READY}"
            )
        return self.folder / part

    def load(self, part: str, kind: Any) -> Any:
        folder = self._folder(part)
        if part not in self.loaded:
            try:
                self.loaded[part] = self._read(folder, kind)
            except WhenceError:
                raise
            except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
                told = " ".join(str(error).split())
                raise WhenceError(f"{folder}: cannot be loaded as {kind.__name__}: {told}") from error
        return self.loaded[part]

    def _read(self, folder: Path, kind: Any) -> Any:
        if kind in (CLIPTokenizer, T5Tokenizer):
            tokenizer = kind.from_pretrained(folder, local_files_only=True)
            if self.token is not None:
                if {self.token, f"{self.token}</w>"} & tokenizer.get_vocab().keys():
                    raise WhenceError(f"modifier token {self.token!r} is a token of {folder} already; choose another")
                tokenizer.add_tokens(self.token)
            return tokenizer
        network, told = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, output_loading_info=True
        )
        if told["missing_keys"]:
            raise ValueError(f"the weights file lacks {sorted(told['missing_keys'])[0]}")
        return network.to(self.engine.device).eval().requires_grad_(False)

    @torch.no_grad()
    def latents(self, batch: Batch, sample: int | None) -> Tensor:
        """z of each picture: [b, c, h, w] on the CPU."""
        vae = self.load("vae", AutoencoderKL)
        x0 = batch.x0.to(self.engine.device, torch.float32)
        if vae.config.get("latents_mean") is not None:
            raise WhenceError(f"{self.folder / 'vae'}: latents_mean is not supported; {READY[3:]}")
        posterior = vae.encode(x0).latent_dist
        z = posterior.mode()
        if sample is not None:
            z = z + posterior.std * normals(stream(seed_for(sample, "vae"), 0, batch.keys), z.shape[1:]).to(z)
        return ((z - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor).cpu()

    @torch.no_grad()
    def pictures(self, z: Tensor, batch_size: int) -> Tensor:
        """The inverse of `latents`, as far as a VAE has one: [b, C, H, W] in [-1, 1] on the CPU."""
        vae = self.load("vae", AutoencoderKL)
        z = z.to(self.engine.device, torch.float32) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return torch.cat([vae.decode(piece).sample.clamp(-1, 1).cpu() for piece in z.split(batch_size)])

    def clip(self, at: str, captions: Sequence[str], projected: bool) -> Any:
        """What CLIP number `at` ("", "_2") makes of captions, hidden states included."""
        encoder = self.load(f"text_encoder{at}", CLIPTextModelWithProjection if projected else CLIPTextModel)
        tokenizer = self.load(f"tokenizer{at}", CLIPTokenizer)
        length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
        ids, _ = self._ids(tokenizer, captions, length)
        with torch.no_grad():
            return encoder(ids, output_hidden_states=True)

    def token_ids(self, captions: Sequence[str]) -> Tensor:
        """Captions as CLIP's text encoder is told them: [b, tokens] on the CPU."""
        tokenizer = self.load("tokenizer", CLIPTokenizer)
        positions = int(read_json(self._folder("text_encoder") / "config.json")["max_position_embeddings"])
        return self._ids(tokenizer, captions, min(tokenizer.model_max_length, positions))[0].cpu()

    def t5(self, at: str, captions: Sequence[str], length: int, masked: bool = False) -> tuple[Tensor, Tensor]:
        """T5's states [b, length, width] on the CPU, and the mask of real tokens [b, length]."""
        encoder, tokenizer = self.load(f"text_encoder{at}", T5EncoderModel), self.load(f"tokenizer{at}", T5Tokenizer)
        ids, mask = self._ids(tokenizer, captions, length)
        with torch.no_grad():
            return encoder(ids, attention_mask=mask if masked else None)[0].cpu(), mask.cpu()

    def _ids(self, tokenizer: Any, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        found = tokenizer(list(captions), **options)
        return found.input_ids.to(self.engine.device), found.attention_mask.to(self.engine.device)


def _sd(parts: Parts, captions: Sequence[str], tokens: int | None) -> Embeddings:
    return {"encoder_hidden_states": parts.clip("", captions, projected=False).last_hidden_state.cpu()}


def _sdxl(parts: Parts, captions: Sequence[str], tokens: int | None) -> Embeddings:
    found = [parts.clip("", captions, projected=False), parts.clip("_2", captions, projected=True)]
    states = torch.cat([out.hidden_states[-2] for out in found], dim=-1)
    return {"encoder_hidden_states": states.cpu(), "text_embeds": found[1].text_embeds.cpu()}


def _sd3(parts: Parts, captions: Sequence[str], tokens: int | None) -> Embeddings:
    found = [parts.clip(at, captions, projected=True) for at in ("", "_2")]
    states = torch.cat([out.hidden_states[-2] for out in found], dim=-1).cpu()
    length = 77 if tokens is None else tokens
    if (parts.folder / "text_encoder_3").is_dir():
        t5, _ = parts.t5("_3", captions, length)
    else:  # as the pipeline does without its third encoder
        width = int(read_json(parts.folder / "transformer" / "config.json")["joint_attention_dim"])
        t5 = torch.zeros(len(captions), length, width)
    states = torch.cat([F.pad(states, (0, t5.shape[-1] - states.shape[-1])), t5], dim=1)
    pooled = torch.cat([out.text_embeds for out in found], dim=-1)
    return {"encoder_hidden_states": states, "pooled_projections": pooled.cpu()}


def _flux(parts: Parts, captions: Sequence[str], tokens: int | None) -> Embeddings:
    t5, _ = parts.t5("_2", captions, 512 if tokens is None else tokens)
    return {
        "encoder_hidden_states": t5,
        "pooled_projections": parts.clip("", captions, projected=False).pooler_output.cpu(),
    }


def _pixart(parts: Parts, captions: Sequence[str], tokens: int | None) -> Embeddings:
    t5, mask = parts.t5("", captions, 120 if tokens is None else tokens, masked=True)
    return {"encoder_hidden_states": t5, "attention_mask": mask}


EMBED: dict[str, Callable[[Parts, Sequence[str], int | None], Embeddings]] = {
    "UNet2DConditionModel": _sd,
    "SDXL": _sdxl,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "PixArtTransformer2DModel": _pixart,
}
