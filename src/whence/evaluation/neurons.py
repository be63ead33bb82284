"""Which neurons bring back a memorised picture? (Hintersdorf et al. 2024, arXiv 2406.02366, "Finding NeMo")

    s(c)            how alike the first steps of a prompt are from different noises (see `same_prompt`)
    threshold       mean + deviations * standard deviation of s(c_i) over reference prompts c_i; s(c) > it: memorised
    a_u(c)          mean over tokens of |v_u|, v = to_v(embedding of c), u an output unit of a cross-attention's value layer
    z_u             |a_u(c) - mean_i a_u(c_i)| / standard deviation_i
    candidates      units with z_u > theta, and the k largest a_u of each layer; theta falls from 5 by 0.25 and k rises
                    from 0 by 1 until s < threshold with all of them switched off (their rows of to_v are 0)
    neurons         of these, first layer by layer and then one by one, the least unusual first, those are switched on
                    again without which s stays below the threshold

The first steps are those of `same_prompt`, with its differences from released code. Means and deviations, of similarities
and of activations, are those of reference prompts, asked of the same model in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import erfc, sqrt

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from whence.evaluation.same_prompt import FirstStep, alike, first_steps
from whence.features.rows import prepare
from whence.models import Model, Prompted
from whence.models.sampling import prompted
from whence.training.unroll import twin
from whence.types import Engine, Weights, WhenceError

FEWEST = 10
WHERE = "neurons"
Units = frozenset[int]


@dataclass(frozen=True)
class NeuronSearch:
    """How memorised prompts and their neurons are looked for.

    Args:
        deviations: standard deviations of the reference prompts' similarities above their mean where memorised ones begin.
        theta: z above which a unit is a candidate, at the beginning.
        step: by which theta falls.
    """

    deviations: float = 1.0
    theta: float = 5.0
    step: float = 0.25

    def __post_init__(self) -> None:
        if not (0 < self.deviations < 100 and self.theta > 0 and 0 < self.step <= self.theta):
            what = f"deviations={self.deviations:g}, theta={self.theta:g}, step={self.step:g}"
            raise WhenceError(what, WHERE, "numbers above 0, and a step of at most theta")

    @property
    def rate(self) -> float:
        """The share of reference prompts that lies above the threshold if their similarities are normal."""
        return erfc(self.deviations / sqrt(2)) / 2


@dataclass(frozen=True)
class Neuron:
    """An output unit of a value layer. layer: name of its to_v; unit: its number; z: how unusual its activation is."""

    layer: str
    unit: int
    z: float


@dataclass(frozen=True)
class PromptNeurons:
    """What is known of a prompt.

    Args:
        prompt: the prompt.
        similarity: how alike its first steps are.
        p: how often a reference prompt is at it or above, itself counted.
        memorised: whether it is above the threshold.
        candidates: units that were switched off first; 0 where none were looked for.
        neurons: those that must be off, the most unusual first; none where even all units off do not suffice.
        without: the similarity with these off; with all units off where there are none.
    """

    prompt: str
    similarity: float
    p: float
    memorised: bool
    candidates: int = 0
    neurons: tuple[Neuron, ...] = ()
    without: float | None = None


@dataclass(frozen=True, eq=False)
class References:
    """What prompts are judged against.

    Args:
        similarity: of the first steps of each reference prompt [n].
        activations: of every unit for each [n, units].
        scales: that similarities were computed at.
    """

    similarity: Tensor
    activations: Tensor
    scales: int

    def threshold(self, deviations: float) -> float:
        if float(self.similarity.std(correction=1)) < 1e-6:  # then rounding would decide
            told = f"the first steps of {len(self.similarity)} reference prompts are all equally alike"
            raise WhenceError(told, WHERE, "other prompts, and a model that hears what it is told")
        return float(self.similarity.mean() + deviations * self.similarity.std(correction=1))

    def unusual(self, activation: Tensor) -> Tensor:
        """z of every unit; of one that never changed 0, or infinity where now it does."""
        apart = (activation - self.activations.mean(0)).abs()
        spread = self.activations.std(0, correction=1)
        still = torch.where(apart > 1e-6 * self.activations.mean(0).abs(), torch.inf, 0.0).to(apart)
        return torch.where(spread > 0, apart / spread, still)


class ValueLayers:
    """The value layers of a model's cross-attention, and what the model does with some of their units off.

    Its network is a copy; units are numbered through all layers.
    """

    def __init__(self, model: Model, how: FirstStep = FirstStep(), engine: Engine = Engine()):
        if not model.reads_text:
            raise WhenceError("this model reads no text", str(model.folder), "a text-to-image model")
        network = prepare(model.final, engine)
        if not isinstance(network, UNet2DConditionModel):
            told = f"the neurons of a {type(network).__name__} are not looked for"
            raise WhenceError(told, str(model.folder), "a UNet2DConditionModel, as of Stable Diffusion 1, 2 and XL")
        self.model, self.how, self.engine = model, how, engine
        self.network = twin(network).eval()
        found = {n: m for n, m in self.network.named_modules() if n.endswith("attn2.to_v") and isinstance(m, nn.Linear)}
        if not found:
            raise WhenceError("its network has no cross-attention", str(model.folder), "one that reads text by it")
        self.layers = found
        self.units = [(name, unit) for name, layer in found.items() for unit in range(layer.out_features)]

    def similarity(self, prompt: str, off: Collection[int] = ()) -> tuple[float, int]:
        """How alike the first steps of a prompt are with some units off, and the scales that it was computed at."""
        with self.without(off):
            return alike(next(first_steps(self.model, [prompt], self.how, self.engine, self.network)))

    def activations(self, prompt: str) -> Tensor:
        """a of every unit [units], float64 on the CPU."""
        told = Prompted([prompt], 1.0, self.model.side(self.how.resolution))
        _, cond = prompted(self.model, self.model.parts(self.engine), told, self.engine)
        text = cond["encoder_hidden_states"].to(self.engine.device)
        with torch.no_grad():
            found = [layer(text).double().abs().mean((0, 1)).cpu() for layer in self.layers.values()]
        return torch.cat(found)

    def weights_without(self, off: Collection[int]) -> Weights:
        """The weights that change where some units are off, by name."""
        changed: Weights = {}
        for number in sorted(off):
            name, unit = self.units[number]
            for key, value in self.layers[name].named_parameters():  # a bias, too, where there is one
                changed.setdefault(f"{name}.{key}", value.detach().clone())[unit] = 0
        return changed

    @contextmanager
    def without(self, off: Collection[int]) -> Iterator[None]:
        """The network with some units off."""
        changed = self.weights_without(off)
        before = {key: self.network.get_parameter(key).detach().clone() for key in changed}
        try:
            self._put(changed)
            yield
        finally:
            self._put(before)

    def _put(self, weights: Weights) -> None:
        with torch.no_grad():
            for key, value in weights.items():
                self.network.get_parameter(key).copy_(value)

    def references(self, prompts: Iterator[str] | Sequence[str]) -> References:
        """What reference prompts do."""
        every = [(*self.similarity(prompt), self.activations(prompt)) for prompt in prompts]
        values = torch.tensor([value for value, _, _ in every], dtype=torch.float64)
        return References(values, torch.stack([each for _, _, each in every]), every[0][1])


def neurons_of(
    prompt: str, layers: ValueLayers, references: References, how: NeuronSearch = NeuronSearch()
) -> PromptNeurons:
    """Whether a prompt brings back a memorised picture, and the neurons that do it.

    Args:
        prompt: the prompt.
        layers: of the model.
        references: what it is judged against.
        how: the search.
    """
    value, threshold = layers.similarity(prompt)[0], references.threshold(how.deviations)
    p = (1 + int((references.similarity >= value).sum())) / (1 + len(references.similarity))
    if value <= threshold:
        return PromptNeurons(prompt, value, p, False)
    activation = layers.activations(prompt)
    z = references.unusual(activation)
    known: dict[Units, float] = {}

    def score(off: Units) -> float:
        if off not in known:
            known[off] = layers.similarity(prompt, off)[0]
        return known[off]

    names = [name for name, _ in layers.units]
    off = candidates(z, activation, names, score, threshold, how)
    if off is None:
        return PromptNeurons(prompt, value, p, True, len(names), without=score(frozenset(range(len(names)))))
    kept = refined(off, z, names, score, threshold)
    found = sorted(kept, key=lambda u: -float(z[u]))
    return PromptNeurons(
        prompt, value, p, True, len(off), tuple(Neuron(*layers.units[u], float(z[u])) for u in found), score(kept)
    )


def candidates(
    z: Tensor,
    activation: Tensor,
    layers: Sequence[str],
    score: Callable[[Units], float],
    threshold: float,
    how: NeuronSearch = NeuronSearch(),
) -> Units | None:
    """The first units in the order of the search without which the score is below the threshold; None: not even without all.

    Args:
        z: how unusual each unit is [units].
        activation: of each [units].
        layers: the layer of each.
        score: of a prompt with some units off.
        threshold: that it must be below.
        how: the search.
    """
    groups = {name: [u for u, layer in enumerate(layers) if layer == name] for name in dict.fromkeys(layers)}
    ranked = [sorted(group, key=lambda u: -float(activation[u])) for group in groups.values()]
    theta, k, before = how.theta, 0, frozenset[int]()
    while len(before) < len(layers):
        unusual = torch.nonzero(z > theta).flatten().tolist() if theta > 0 else range(len(layers))
        off = frozenset([*unusual, *(u for group in ranked for u in group[:k])])
        if off != before and score(off) < threshold:
            return off
        theta, k, before = theta - how.step, k + 1, off
    return None


def refined(off: Units, z: Tensor, layers: Sequence[str], score: Callable[[Units], float], threshold: float) -> Units:
    """Those of some units that must stay off; first layers and then units are tried, the least unusual first.

    Args:
        off: units without which the score is below the threshold.
        z: how unusual each unit is [units].
        layers: the layer of each.
        score: of a prompt with some units off.
        threshold: that it must be below.
    """
    largest = {name: max(float(z[u]) for u in off if layers[u] == name) for name in {layers[u] for u in off}}
    groups = [frozenset(u for u in off if layers[u] == name) for name in sorted(largest, key=lambda n: (largest[n], n))]
    for group in (*groups, *(frozenset([u]) for u in sorted(off, key=lambda u: (float(z[u]), u)))):
        rest = off - group
        if rest != off and score(rest) < threshold:
            off = rest
    return off
