"""Custom Diffusion (Kumari et al. 2023): the keys and values of a UNet's cross-attention, and one new word.

    trained    W_k, W_v of every attn2, and v*, the embedding of one modifier token; nothing else
    loss       mean over instance images + prior_weight * mean over prior images, in every step (see `training`)

The text depends on v*, so that the text encoder is a part of the network (`WithText`), whose condition is token ids.

Read and written as diffusers does: pytorch_custom_diffusion_weights.safetensors (`...attn2.processor.to_k_custom_diffusion`)
and <token>.safetensors. Differs from released code: the keys and values of the first token (start of text) have gradients
like all others; diffusers cuts them off, so that what it trains by is the gradient of no loss and cannot be differentiated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from whence.diffusion.noise import key_of
from whence.models.families.stable_diffusion import call_unet_with_text, call_unet_with_tokens
from whence.models.networks import load_network
from whence.models.parts import Parts
from whence.models.pipeline import Model, checkpoints_in
from whence.storage.arrays import tensor_digest, write_tensors
from whence.storage.files import files_digest, made, telling
from whence.storage.opening import tensors_in
from whence.types import Batch, Checkpoint, Engine, Images, Weights, WhenceError, digest

FILE, PRIOR = "pytorch_custom_diffusion_weights.safetensors", "prior.safetensors"
TRAINED = re.compile(r"(?P<module>.+\.attn2)\.to_(?P<side>[kv])\.weight")
WRITTEN = re.compile(r"(?P<module>.+\.attn2)\.processor\.to_(?P<side>[kv])_custom_diffusion\.weight")
ACCEPTED = f"accepted: a folder with {FILE} and <token>.safetensors, as diffusers' train_custom_diffusion writes it"


class OneMore(nn.Module):
    """An embedding with one more row, which alone can be trained.

    Args:
        table: the embedding.
        number: the id that stands for the new row.
        row: what it begins with.
    """

    def __init__(self, table: nn.Embedding, number: int, row: Tensor):
        super().__init__()
        self.table, self.number = table, number
        self.modifier_token = nn.Parameter(row.clone())

    def forward(self, ids: Tensor) -> Tensor:
        others: Tensor = self.table(ids.clamp(max=self.table.num_embeddings - 1))
        return torch.where((ids == self.number)[..., None], self.modifier_token, others)


class WithText(nn.Module):
    """A UNet2DConditionModel with its text encoder inside: (x_t, t, input_ids [b, tokens]) -> prediction.

    Only attn2's keys and values and the row of the modifier token ask for gradients.

    Args:
        unet: the network.
        text_encoder: of the pipeline.
        number: the id of the modifier token.
        row: the embedding that it begins with; None for that of the first token.
    """

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, number: int, row: Tensor | None):
        super().__init__()
        self.unet, self.text_encoder = unet.requires_grad_(False), text_encoder.requires_grad_(False)
        table = _embedding(text_encoder)
        text_encoder.set_input_embeddings(OneMore(table, number, table.weight[0] if row is None else row))
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(TRAINED.fullmatch(name) is not None)

    @property
    def word(self) -> OneMore:
        return cast(OneMore, self.text_encoder.get_input_embeddings())

    def train(self, mode: bool = True) -> WithText:
        super().train(mode)
        self.text_encoder.eval()  # its dropout, if it has any, cannot be replayed
        return self

    def forward(self, x_t: Tensor, t: Tensor, input_ids: Tensor) -> Tensor:
        """The prediction for noisy latents and captions.

        Args:
            x_t: noisy latents [b, c, h, w].
            t: timesteps [b].
            input_ids: of the captions [b, tokens].
        """
        states = self.text_encoder(input_ids).last_hidden_state
        prediction: Tensor = self.unet(x_t, t, encoder_hidden_states=states, return_dict=False)[0]
        return prediction


# ------------------------------------------------------------------------------------------------------------- opening


def with_token(model: Model, token: str) -> Model:
    """A model whose network takes token ids, the modifier token among them; its weights are those of the base."""
    if model.forward.predict is not call_unet_with_text:
        raise WhenceError(
            f"{model.folder}: Custom Diffusion trains the cross-attention of a UNet2DConditionModel with one CLIP text "
            f"encoder (Stable Diffusion 1 and 2); this is a {model.config['_class_name']}"
        )
    if model.parts(Engine()).masks_text:
        told = "use_attention_mask is set, which Custom Diffusion is not trained with"
        raise WhenceError(told, str(model.folder / "text_encoder" / "config.json"), "a text encoder without it")
    return replace(model, forward=replace(model.forward, predict=call_unet_with_tokens), token=token)


def text_digest(folder: Path) -> str:
    """Fingerprint of what reads the text of a pipeline."""
    parts = Parts(folder, Engine())
    return digest([parts.digest("tokenizer"), parts.digest("text_encoder")], 64)


def network_with_text(model: Model, initializer: str | None = None) -> WithText:
    """The network of a model `with_token`.

    Args:
        model: the model.
        initializer: the token whose embedding the new one begins with; None for that of the first token.
    """
    assert model.token is not None
    parts = model.parts(Engine())
    tokenizer, encoder = parts.load("tokenizer", CLIPTokenizer), parts.load("text_encoder", CLIPTextModel)
    row = None
    if initializer is not None:
        pieces = tokenizer(initializer, add_special_tokens=False).input_ids
        if len(pieces) != 1:
            words = ", ".join(tokenizer.convert_ids_to_tokens(pieces)) or "none"
            raise WhenceError(f"initializer token {initializer!r} is {len(pieces)} tokens here ({words}), not one")
        row = _embedding(encoder).weight[pieces[0]].detach()
    number = tokenizer.get_vocab()[model.token]
    return WithText(load_network(model.folder / model.part), encoder, number, row)


def _embedding(text_encoder: CLIPTextModel) -> nn.Embedding:
    return cast(nn.Embedding, text_encoder.get_input_embeddings())


@dataclass(frozen=True)
class CustomDiffusion:
    """Custom Diffusion on a pipeline.

    Args:
        folder: as diffusers' train_custom_diffusion writes it.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    def on(self, base: Model) -> Model:
        """The base with these weights and their new word; the checkpoints of training are those beside them."""
        token, _ = _read(self.folder)
        model, known = with_token(base, token), [base.final.digest, text_digest(base.folder)]

        def point(at: Path) -> Checkpoint:
            return Checkpoint(partial(_load, model, at), digest([*known, _digest(at)], 64), at.name)

        return replace(model, final=point(self.folder), checkpoints=checkpoints_in(self.folder, point))


def _load(model: Model, custom: Path) -> WithText:
    network = network_with_text(model)
    token, row = _read(custom)
    if token != model.token:
        raise WhenceError(f"{custom}: its modifier token is {token!r}, not {model.token!r}")
    own = dict(network.unet.named_parameters())
    with tensors_in(custom / FILE) as opened:
        every = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    given = {name: value for name, value in every.items() if value.numel()}
    weights = {}
    for name, value in given.items():
        found = WRITTEN.fullmatch(name)
        to = name if found is None else f"{found['module']}.to_{found['side']}.weight"
        if found is None or to not in own or own[to].shape != value.shape:
            raise WhenceError(f"{custom / FILE}: {name} {list(value.shape)} has no place in {model.folder}; {ACCEPTED}")
        weights[to] = value
    lacking = sorted(name for name in own if TRAINED.fullmatch(name) and name not in weights)
    if lacking:
        raise WhenceError(f"{custom / FILE} lacks {lacking[0]}; {ACCEPTED}")
    if row.shape != network.word.modifier_token.shape:
        raise WhenceError(
            f"{custom}: {token} has width {list(row.shape)}, the text encoder {list(network.word.modifier_token.shape)}"
        )
    network.unet.load_state_dict(weights, strict=False)
    with torch.no_grad():
        network.word.modifier_token.copy_(row)
    return network


def _read(folder: Path) -> tuple[str, Tensor]:
    """The modifier token of a Custom Diffusion folder and its embedding."""
    if not (folder / FILE).is_file():
        pickled = sorted(folder.glob("*.bin")) if folder.is_dir() else []
        why = f"only {pickled[0].name}, a pickle, which whence never opens" if pickled else f"no {FILE}"
        raise WhenceError(f"{folder} holds {why}; {ACCEPTED}")
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with tensors_in(path) as opened:
            if list(opened.keys()) == [path.stem]:
                found[path.stem] = opened.get_tensor(path.stem).squeeze()
    if len(found) != 1:
        raise WhenceError(
            f"{folder} holds {len(found)} modifier tokens ({', '.join(found) or 'none'}), not one; {ACCEPTED}"
        )
    return next(iter(found.items()))


def _digest(folder: Path) -> str:
    token, _ = _read(folder)
    return files_digest([folder / FILE, folder / f"{token}.safetensors"])


def save_custom(folder: Path, network: WithText, token: str, weights: Weights) -> None:
    """Write trained weights as diffusers does.

    Self-attention, where nothing is trained, has an empty tensor: diffusers' own reader asks for an entry of every one.

    Args:
        folder: where they are written.
        network: the one that was trained.
        token: the modifier token.
        weights: by the names of `network`.
    """
    made(folder)
    tensors = {name: torch.empty(0) for name in network.unet.attn_processors if ".attn2." not in name}
    for name, value in weights.items():
        found = TRAINED.fullmatch(name.removeprefix("unet."))
        if found is None:
            write_tensors(folder / f"{token}.safetensors", {token: value})
        else:
            tensors[f"{found['module']}.processor.to_{found['side']}_custom_diffusion.weight"] = value.detach().cpu()
    write_tensors(folder / FILE, tensors, {"format": "pt"})


# -------------------------------------------------------------------------------------------------------- prior images


@dataclass(frozen=True, eq=False)
class Prior:
    """Prior images as their network sees them, in memory. Satisfies `whence.types.Images`.

    Args:
        x0: latents [n, c, h, w].
        input_ids: of their captions [n, tokens].
        digests: of the pictures.
    """

    x0: Tensor
    input_ids: Tensor
    digests: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def ids(self) -> list[str]:
        return [f"prior {number}" for number in range(len(self))]

    @property
    def meta(self) -> Mapping[str, Sequence[object]]:
        return {}

    @property
    def labels(self) -> None:
        return None

    @property
    def preprocess(self) -> Mapping[str, object]:
        return {}

    @property
    def empty_caption(self) -> None:
        return None

    @property
    def pictures(self) -> Prior:
        return self

    def batch(self, rows: Sequence[int]) -> Batch:
        rows = [int(row) for row in rows]
        keys = torch.tensor([key_of(self.digests[row]) for row in rows], dtype=torch.int64)
        return Batch(self.x0[rows], keys, {"input_ids": self.input_ids[rows]})

    def describe(self) -> dict[str, object]:
        return {"is": "prior", "seen": [tensor_digest(self.x0), tensor_digest(self.input_ids)], "count": len(self)}

    @classmethod
    def of(cls, seen: Images) -> Prior:
        batch = seen.batch(range(len(seen)))
        return cls(batch.x0, batch.cond["input_ids"], tuple(seen.digests))

    @classmethod
    def read(cls, folder: Path) -> Prior:
        path = folder / PRIOR
        with telling(path, "train again"), tensors_in(path, "train again") as opened:
            digests = (opened.metadata() or {})["digests"].split()
            found = cls(opened.get_tensor("x0"), opened.get_tensor("input_ids"), tuple(digests))
        if not len(found.x0) == len(found.input_ids) == len(digests):
            raise WhenceError("images, captions and digests are not as many", str(path), "it trained again")
        return found


def save_prior(folder: Path, prior: Prior) -> None:
    """Keep prior images beside what they helped to train, so that it can be trained again."""
    header = {"digests": " ".join(prior.digests)}
    write_tensors(folder / PRIOR, {"x0": prior.x0, "input_ids": prior.input_ids}, header)
