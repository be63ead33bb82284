"""The other parts of a pipeline folder: its autoencoder, tokenizers and text encoders. Everything runs in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import AutoencoderKL, ModelMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.utils import logging as transformers_logging

from whence.data.layout import some
from whence.diffusion.noise import normals, seed_for, stream
from whence.models.autoencoders import autoencoder_of
from whence.models.others import refusing
from whence.models.weights import refuse_damaged, refuse_loaded
from whence.storage.files import files_digest, read_object
from whence.types import Batch, Engine, WhenceError, digest

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
READY = "or Images whose x0 and cond are ready for the network"
TEXT = "its tokenizers and text encoders cannot encode a text"
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class ClipText:
    """What CLIP makes of captions, on the CPU.

    Args:
        last_hidden_state: [b, tokens, width].
        last_but_one: the hidden state before it [b, tokens, width].
        pooled: its projection [b, k], or the state of the last token where it has none.
    """

    last_hidden_state: Tensor
    last_but_one: Tensor
    pooled: Tensor


@dataclass(frozen=True)
class Addition:
    """What is added to a part when it is loaded. digest: what it is."""

    digest: str
    put_in: Callable[[nn.Module], None] = field(compare=False, repr=False)


def refuse_missing(folder: Path, parts: Sequence[str]) -> None:
    """Refuse a pipeline folder without some of its parts."""
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        inside = some(sorted(path.name for path in folder.iterdir()), 10)
        told = f"{', '.join(f'{part}/' for part in missing)} {'is' if len(missing) == 1 else 'are'} missing"
        accepted = f"all parts, as save_pretrained writes them; {READY}"
        raise WhenceError(f"{told} (it holds {inside})", str(folder), accepted)


class Parts:
    """The other parts of a pipeline folder, loaded when they are first asked for. token: a new word for its tokenizer;
    additions: to its text encoders, by folder."""

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        token: str | None = None,
        additions: Mapping[str, Addition] | None = None,
    ):
        self.folder, self.engine, self.token, self.additions = folder, engine, token, additions or {}
        self.loaded: dict[str, object] = {}

    def digest(self, part: str) -> str:
        """Fingerprint of every file of a part, and of what is added to it."""
        files = files_digest(sorted(path for path in self._folder(part).iterdir() if path.is_file()), names=True)
        return digest([files, self.additions[part].digest], 64) if part in self.additions else files

    def _folder(self, part: str) -> Path:
        refuse_missing(self.folder, [part])
        return self.folder / part

    def load(self, part: str, kind: type[Loaded]) -> Loaded:
        folder = self._folder(part)
        if part not in self.loaded:
            with refusing(f"cannot be loaded as {kind.__name__}", str(folder)):
                self.loaded[part] = self._read(folder, kind)
        return cast(Loaded, self.loaded[part])

    def _read(self, folder: Path, kind: Any) -> object:
        if kind not in (CLIPTokenizer, T5Tokenizer):
            refuse_damaged(folder)
        if kind in (CLIPTokenizer, T5Tokenizer):
            tokenizer = kind.from_pretrained(folder, local_files_only=True)
            if self.token is not None:
                if {self.token, f"{self.token}</w>"} & tokenizer.get_vocab().keys():
                    raise WhenceError(f"modifier token {self.token!r} is a token of {folder} already; choose another")
                tokenizer.add_tokens(self.token)
            return tokenizer
        network, loaded = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, output_loading_info=True
        )
        if loaded["missing_keys"]:
            raise ValueError(f"the weights file lacks {sorted(loaded['missing_keys'])[0]}")
        refuse_loaded(network, folder)
        if folder.name in self.additions:
            self.additions[folder.name].put_in(network)
        return network.to(self.engine.device).eval().requires_grad_(False)

    def _autoencoder(self) -> ModelMixin:
        found = autoencoder_of(self.folder)
        return self.load(*("vae", AutoencoderKL) if found is None else (found.part, found.kind.kind))

    @torch.no_grad()
    def latents(self, batch: Batch, sample: int | None) -> Tensor:
        """z of each picture: [b, c, h, w] on the CPU."""
        vae = self._autoencoder()
        x0 = batch.x0.to(self.engine.device, torch.float32)
        with refusing(f"the {type(vae).__name__} cannot encode a picture", str(self.folder)):
            return self._encoded(vae, x0, batch.keys, sample)

    def _encoded(self, vae: ModelMixin, x0: Tensor, keys: Tensor, sample: int | None) -> Tensor:
        encoded = vae.encode(x0, return_dict=False)[0]
        if not isinstance(encoded, DiagonalGaussianDistribution):
            if sample is not None:
                kind = type(vae).__name__
                raise WhenceError(f"{self.folder}: {kind} has no posterior to draw a sample from", "sample", "None")
            z = encoded
        else:
            z = encoded.mode()
            if sample is not None:
                z = z + encoded.std * normals(stream(seed_for(sample, "vae"), 0, keys), z.shape[1:]).to(z)
        shift, scale = vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor
        return ((z - shift) * scale).cpu()

    @torch.no_grad()
    def pictures(self, z: Tensor, batch_size: int) -> Tensor:
        """The inverse of `latents`, as far as a VAE has one: [b, C, H, W] in [-1, 1] on the CPU."""
        vae = self._autoencoder()
        shift, scale = vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor
        z = z.to(self.engine.device, torch.float32) / scale + shift
        return torch.cat([vae.decode(piece).sample.clamp(-1, 1).cpu() for piece in z.split(batch_size)])

    @property
    def masks_text(self) -> bool:
        """Whether the first text encoder is to leave out the tokens that only fill up, where its family does so at all."""
        return bool(read_object(self._folder("text_encoder") / "config.json").get("use_attention_mask"))

    @torch.no_grad()
    def clip(self, at: str, captions: Sequence[str], projected: bool, masked: bool = False) -> ClipText:
        """What CLIP makes of captions.

        Args:
            at: which CLIP: "" or "_2".
            captions: b texts.
            projected: whether the pooled state is projected.
            masked: whether attention leaves out the tokens that only fill up.
        """
        encoder = self.load(f"text_encoder{at}", CLIPTextModelWithProjection if projected else CLIPTextModel)
        tokenizer = self.load(f"tokenizer{at}", CLIPTokenizer)
        with refusing(TEXT, str(self.folder)):
            length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            ids, mask = self._ids(tokenizer, captions, length)
            found: Any = encoder(ids, attention_mask=mask if masked else None, output_hidden_states=True)
            pooled = found.text_embeds if projected else found.pooler_output
            return ClipText(found.last_hidden_state.cpu(), found.hidden_states[-2].cpu(), pooled.cpu())

    def token_ids(self, captions: Sequence[str]) -> Tensor:
        """Captions as ids for CLIP's text encoder: [b, tokens] on the CPU."""
        tokenizer = self.load("tokenizer", CLIPTokenizer)
        path = self._folder("text_encoder") / "config.json"
        with refusing(TEXT, str(path)):
            positions = int(read_object(path)["max_position_embeddings"])
            return self._ids(tokenizer, captions, min(tokenizer.model_max_length, positions))[0].cpu()

    def t5(self, at: str, captions: Sequence[str], length: int, masked: bool = False) -> tuple[Tensor, Tensor]:
        """T5's states [b, length, width] on the CPU, and the mask of real tokens [b, length].

        Args:
            at: which T5: "", "_2" or "_3".
            captions: b texts.
            length: tokens that they are brought to.
            masked: whether attention leaves out the tokens that only fill up.
        """
        encoder, tokenizer = self.load(f"text_encoder{at}", T5EncoderModel), self.load(f"tokenizer{at}", T5Tokenizer)
        with refusing(TEXT, str(self.folder)), torch.no_grad():
            ids, mask = self._ids(tokenizer, captions, length)
            return encoder(ids, attention_mask=mask if masked else None)[0].cpu(), mask.cpu()

    def _ids(self, tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        found = tokenizer(list(captions), **options)
        return found.input_ids.to(self.engine.device), found.attention_mask.to(self.engine.device)
