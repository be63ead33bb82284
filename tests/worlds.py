"""Small worlds in which the truth is known: the linear denoiser, whose retraining is one small solve, and tiny nets."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recipes import pixel_study, recipe_of
from whence.data.images import TensorImages, tensor_images
from whence.diffusion.draws import Draws, Grid, Repeated
from whence.diffusion.forward import Classifier, Denoiser, linear_schedule
from whence.features.maps import SIDES, Maps, unmoved
from whence.training.loop import steps
from whence.training.recipe import Recipe
from whence.types import Batch, Checkpoint, Draw, Engine, Images, Task, digest


def tensors(x0: Tensor, name: str, labels: Tensor | None = None) -> TensorImages:
    return tensor_images(x0, ids=[f"{name}-{i:04d}" for i in range(len(x0))], labels=labels)


def with_copy(images: TensorImages, row: int) -> TensorImages:
    """The same images and, at the end, a second copy of one of them: another name, the same content."""
    rows = [*range(len(images)), row]
    return tensors(images.x0[rows], "copied", None if images.labels is None else images.labels[rows])


def checkpoint(make: Callable[[], nn.Module], name: str, step: int | None = 1, rate: float | None = 0.1) -> Checkpoint:
    """A fresh copy of the network on every load, so that no method can change that of another."""
    net = make()
    return Checkpoint(lambda: copy.deepcopy(net), digest(dict(net.state_dict())), name, step, rate)


@dataclass(frozen=True, eq=False)
class Walk:
    """A made-up trajectory (see `types.Trajectory`): images that fade towards the noisy end, under their own names."""

    images: tuple[TensorImages, ...]
    timesteps: tuple[int, ...]

    def predicted(self, timestep: int) -> TensorImages:
        fading = 1 - 0.25 * timestep / max(self.timesteps)
        x0 = torch.cat([images.x0 for images in self.images])
        return tensor_images(fading * x0, ids=[name for images in self.images for name in images.ids])


@dataclass(frozen=True)
class Log:
    """As much of a `types.Trainable` as replaying takes."""

    recipe: Recipe


# ------------------------------------------------------------------------------------------------------- linear world


class LinearNet(nn.Module):
    """prediction = W_t x_t, one matrix per timestep: a Linear layer on x_t in the place of its timestep."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.steps, size, _ = weight.shape
        self.linear = nn.Linear(self.steps * size, size, bias=False, dtype=weight.dtype)
        self.linear.weight = nn.Parameter(weight.permute(1, 0, 2).flatten(1).clone())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        place = torch.arange(self.steps) == t[..., None]
        return self.linear((place[..., None] * x[..., None, :]).flatten(-2))


DRAWS = Draws(Repeated(Grid(6), 4), seed=5)


def noisy(images: Images, forward: Denoiser) -> tuple[Tensor, Tensor, Tensor]:
    """z = x_t [n, S, D], eps [n, S, D] and t [S] of every image, written apart from whence.forward."""
    x0 = images.batch(range(len(images))).x0
    draw = DRAWS(images.batch(range(len(images))).keys, x0.shape[1:], forward.timesteps, x0.dtype)
    signal = forward.alphas_cumprod[draw.t][..., None]
    return signal.sqrt() * x0[:, None] + (1 - signal).sqrt() * draw.noise, draw.noise, draw.t[0]


@dataclass
class LinearWorld:
    """W_S = (sum_{i in S} B_i) (sum_{i in S} A_i + ridge I)^-1 per timestep, with A_i = sum z z^T, B_i = sum eps z^T over
    the frozen draws: the exact minimiser of the summed loss on any subset."""

    train: TensorImages
    queries: TensorImages
    forward: Denoiser
    A: Tensor  # [n, T, D, D]
    B: Tensor
    ridge: float

    def fit(self, mask: np.ndarray | None = None) -> Tensor:
        m = torch.ones(len(self.train)) if mask is None else torch.as_tensor(mask)
        m = m.to(self.A)
        A = torch.einsum("i,itab->tab", m, self.A) + self.ridge * torch.eye(self.A.shape[-1], dtype=self.A.dtype)
        B = torch.einsum("i,itab->tab", m, self.B)
        return torch.linalg.solve(A, B.mT).mT

    def losses(self, weight: Tensor) -> np.ndarray:
        """Loss of every query at these weights: [m]."""
        x0 = self.queries.x0
        draw = DRAWS(self.queries.batch(range(len(x0))).keys, x0.shape[1:], self.forward.timesteps, x0.dtype)
        images = Batch(x0.repeat_interleave(DRAWS.count, 0), torch.zeros(draw.t.numel()))
        with torch.no_grad():
            pred, target = self.forward(LinearNet(weight), images, Draw(draw.t.flatten(), draw.noise.flatten(0, 1)))
        return (pred - target).square().mean(1).view(len(x0), -1).mean(1).numpy()

    def retrained(self, masks: np.ndarray) -> np.ndarray:
        """Loss of every query after training on each subset: [r, m]."""
        return np.stack([self.losses(self.fit(mask)) for mask in masks])

    def leave_one_out(self) -> np.ndarray:
        """Rise of every query's loss when one image is removed: [m, n]."""
        return (self.retrained(~np.eye(len(self.train), dtype=bool)) - self.losses(self.fit())).T

    @property
    def damping(self) -> float:
        """The ridge in units of the losses of whence, which are means over draws and dimensions: H = 2/(S D) (A + ridge)."""
        return 2 * self.ridge / (DRAWS.count * self.A.shape[-1])

    def task(self, root: Path, **engine: Any) -> Task:
        weight = self.fit()
        point = checkpoint(lambda: LinearNet(weight), "linear")
        log, walk = Log(recipe_of(1, len(self.train))), Walk((self.queries, self.train), tuple(range(5, -1, -1)))
        engine = Engine(dtype=torch.float64, **engine)
        return Task(self.forward, (point,), self.train, self.queries, root, engine, study=log, sampled=walk)


def linear_world(n: int = 400, m: int = 30, dim: int = 24, ridge: float = 1.0, seed: int = 0) -> LinearWorld:
    """8 clusters (spread 1.5 between, 0.5 within); 6 timesteps from abar .95 to .1; 4 noises each."""
    g = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(8, dim, generator=g, dtype=torch.float64)

    def sample(count: int) -> Tensor:
        own = torch.randint(8, (count,), generator=g)
        return centres[own] + 0.5 * torch.randn(count, dim, generator=g, dtype=torch.float64)

    train, queries = tensors(sample(n), "train"), tensors(sample(m), "query")
    forward = Denoiser(torch.linspace(0.95, 0.1, 6, dtype=torch.float64))
    z, noise, steps = noisy(train, forward)
    A, B = torch.zeros(n, 6, dim, dim, dtype=torch.float64), torch.zeros(n, 6, dim, dim, dtype=torch.float64)
    for s, t in enumerate(steps.tolist()):
        A[:, t] += z[:, s, :, None] * z[:, s, None, :]
        B[:, t] += noise[:, s, :, None] * z[:, s, None, :]
    return LinearWorld(train, queries, forward, A, B, ridge)


def half_masks(r: int, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    masks = np.zeros((r, n), dtype=bool)
    for row in masks:
        row[rng.permutation(n)[: n // 2]] = True
    return masks


# ---------------------------------------------------------------------------------------------------------- tiny nets

PREPROCESSOR = {
    "do_resize": True, "size": {"shortest_edge": 12}, "resample": 3, "do_center_crop": True,
    "crop_size": {"height": 8, "width": 8}, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25],
}  # fmt: skip


def save_encoder(folder: Path, kind: str, seed: int = 0, **preprocessing: Any) -> Path:
    """A small random encoder as save_pretrained leaves it. kind: clip, clip_vision_model, vit, dinov2, ..."""
    import transformers

    tower = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}
    if kind.startswith("clip"):
        tower |= {"intermediate_size": 16, "projection_dim": 6}
    torch.manual_seed(seed)
    if kind == "clip":
        text = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
        words = {"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2}
        # The vision part of many published CLIPs states another projection_dim than the whole.
        config = transformers.CLIPConfig(
            text_config=text | words, vision_config=tower | {"projection_dim": 99}, projection_dim=6
        )
        net = transformers.CLIPModel(config)
    elif kind == "clip_vision_model":
        net = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**tower))
    else:
        net = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **tower))
    net.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | preprocessing))
    return folder


_folder = tempfile.TemporaryDirectory(prefix="whence-encoders-")


@functools.cache
def encoder(kind: str) -> str:
    """The folder of such an encoder, for the whole run of the tests; "abc" for maps of one."""
    folder = Path(_folder.name) / kind
    if kind == "abc":
        save_maps(folder, encoder("dinov2"), 16)
        return str(folder)
    return str(save_encoder(folder, kind))


def save_maps(folder: Path, of: str, width: int, kind: str = "linear", **notes: object) -> Maps:
    """Random maps of an encoder, as `whence abc fit` leaves them."""
    g = torch.Generator().manual_seed(0)
    sides = {
        side: {name: v + 0.3 * torch.randn(v.shape, generator=g) for name, v in unmoved(kind, width).items()}
        for side in SIDES
    }
    maps = Maps(
        of,
        kind,
        sides,
        {"benchmark": "", "learned_on": [], "kappa": 5.0, "beta": 0.5, "encoder_alone": 0.1, "left_out": 0.2, **notes},
    )
    maps.write(folder)
    return maps


def unet(seed: int = 0) -> nn.Module:
    """A UNet2DModel of diffusers with every kind of part: ResNet blocks, GroupNorm, attention, time embedding."""
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def predict(call: Callable[..., Any], x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    return call(x_t, t).sample


def unet_task(root: Path, n: int = 6, m: int = 2, **engine: Any) -> Task:
    g = torch.Generator().manual_seed(1)
    x0 = torch.rand(n + m, 1, 4, 4, generator=g) * 2 - 1
    points = tuple(checkpoint(lambda s=s: unet(s), f"checkpoint-{s}", s, 0.1 / s) for s in (1, 2))
    forward = Denoiser(linear_schedule(), predict=predict)
    train, queries = tensors(x0[:n], "train"), tensors(x0[n:], "query")
    log, walk = Log(recipe_of(2, n)), Walk((queries, train), (900, 300))
    return Task(forward, points, train, queries, root, Engine(**engine), study=log, sampled=walk)


class ConvClassifier(nn.Module):
    def __init__(self, classes: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.GroupNorm(1, 3)
        self.head = nn.Linear(3 * 16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.conv(x))).flatten(1))


def labelled(count: int, name: str, seed: int = 0, classes: int = 3) -> TensorImages:
    """4x4 images with a bright column per class, in noise."""
    g = torch.Generator().manual_seed(seed)
    label = torch.randint(classes, (count,), generator=g)
    x0 = 0.6 * torch.randn(count, 1, 4, 4, generator=g)
    x0[torch.arange(count), 0, :, label] += 1.0
    return tensors(x0, name, label)


def loss_of_moments(theta: Tensor, moments: Tensor) -> Tensor:
    """The loss of every image where theta [k, D] is the last layer, from its row [A | B | c] of `Moments` alone:
    tr(theta^T A theta) - 2 tr(theta^T B) + c."""
    A = moments[:, : len(theta) ** 2].unflatten(1, (len(theta), -1))
    B = moments[:, len(theta) ** 2 : -1].unflatten(1, theta.shape)
    return (theta * (A @ theta - 2 * B)).sum((1, 2)) + moments[:, -1]


def trained_classifier(steps: int) -> nn.Module:
    """Full-batch gradient descent on 20 labelled images: the same weights on every call."""
    torch.manual_seed(0)
    net = ConvClassifier()
    batch = labelled(20, "train").batch(range(20))
    for _ in range(steps):
        loss = nn.functional.cross_entropy(net(batch.x0), batch.cond["class_labels"])
        for p, g in zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True):
            p.data -= 0.2 * g
    return net


def classifier_task(root: Path, m: int = 3, dtype: torch.dtype = torch.float64, **engine: Any) -> Task:
    points = tuple(
        checkpoint(lambda s=s: trained_classifier(s), f"checkpoint-{s}", s, rate) for s, rate in ((3, 0.2), (12, 0.05))
    )
    train, queries = labelled(20, "train"), labelled(m, "query", seed=1)
    return Task(Classifier(), points, train, queries, root, Engine(dtype=dtype, **engine))


# -------------------------------------------------------------------------------------------------- a trained perceptron


def trained_task(root: Path, n: int = 12, m: int = 2, **engine: Any) -> Task:
    """A model that our trainer made in a few steps, with checkpoints and the study that repeats it."""
    recipe = recipe_of(
        steps=6, batch_size=8, learning_rate=1e-2, beta1=0.9, eps_root=1e-8, max_grad_norm=0.0, ema=0.5, seed=3
    )
    network = {"_class_name": "MLPDenoiser", "sample_size": 4, "in_channels": 1, "width": 8, "layers": 1}
    study, g = pixel_study(network, recipe), torch.Generator().manual_seed(1)
    kinds = torch.where(torch.rand(4, 1, 4, 4, generator=g) < 0.5, -0.8, 0.8)
    x0 = kinds[torch.arange(n + m) % 4] + 0.3 * torch.randn(n + m, 1, 4, 4, generator=g)
    train, queries = tensors(x0[:n], "train"), tensors(x0[n:], "query")
    how = Engine(dtype=torch.float64, **engine)
    run = list(steps(study.network_at(recipe.seed), study.forward(), train, recipe, engine=how))
    points = []
    for at, part, step in ((2, "weights", 3), (5, "weights", 6), (5, "ema", None)):
        net = study.network_at(0).double()
        net.load_state_dict(getattr(run[at][0], part), strict=False)
        name, rate = ("model", None) if step is None else (f"checkpoint-{step}", recipe.rate_at(step - 1))
        points.append(checkpoint(lambda net=net: net, name, step, rate))
    return Task(study.forward(), tuple(points), train, queries, root, how, study=study)
