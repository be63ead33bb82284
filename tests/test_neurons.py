"""Neurons of memorised prompts: the search on known scores, and a unit that was planted in a network, found exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from agreement import close
from errors import refuses
from families import FAMILIES, save_clip, save_vae, save_whole
from test_cli import refused, succeeds, whence
from whence.evaluation.memorised import ORDINARY, Asked
from whence.evaluation.neurons import (
    NeuronSearch,
    PromptNeurons,
    References,
    Units,
    ValueLayers,
    candidates,
    neurons_of,
    refined,
)
from whence.evaluation.same_prompt import FirstStep, alike, first_steps
from whence.models import open_model
from whence.models.encode import prompt_conditions
from whence.types import Engine

REFERENCE = ("a cat", "two birds", "a red house", "the sea", "some trees", "a hat", "an old man", "blue", "rain")
REFERENCE = (*REFERENCE, "a green dog", "snow", "wind", "a boat", "fire")
MEMORISED, WIDTH, UNIT = "by heart", 64, 3
HOW = FirstStep(seeds=4)


# ------------------------------------------------------------------------------------------- the search, with known scores


LAYERS = ["a"] * 4 + ["b"] * 4
ACTIVATION = torch.tensor([0.1, 0.2, 0.3, 0.4, 9.0, 0.3, 0.2, 0.1])
Z = torch.tensor([6.0, 0.5, 4.9, 0.1, 0.2, 4.0, 0.3, 0.0])


def needs(*units: int) -> Callable[[Units], float]:
    """A score that is below 0.5 where all of these are off."""
    return lambda off: 0.1 if {*units} <= off else 0.9


@pytest.mark.parametrize(
    ("culprit", "expected"),
    [
        (0, {0}),  # z = 6, above 5
        (2, {0, 2, 3, 4}),  # z = 4.9, above 4.75; by then the largest of each layer, too: 3 and 4
        (4, {0, 2, 3, 4}),  # usual, but the largest activation of its layer
        (6, {0, 2, 3, 4, 1, 5, 6}),  # the third of its layer
    ],
)
def test_candidates_are_the_unusual_and_the_largest(culprit, expected):
    assert candidates(Z, ACTIVATION, LAYERS, needs(culprit), 0.5) == expected


def test_nothing_is_found_where_not_even_all_units_do():
    asked: list[Units] = []

    def score(off: Units) -> float:
        asked.append(off)
        return 0.9

    assert candidates(Z, ACTIVATION, LAYERS, score, 0.5) is None
    assert asked[-1] == frozenset(range(8))
    assert len({*asked}) == len(asked), "no set is tried twice"


@pytest.mark.parametrize("culprits", [(0,), (2, 5), (0, 2, 5), (7,)], ids=str)
def test_what_is_not_needed_is_switched_on_again(culprits):
    asked: list[Units] = []

    def score(off: Units) -> float:
        asked.append(off)
        return needs(*culprits)(off)

    assert refined(frozenset(range(8)), Z, LAYERS, score, 0.5) == {*culprits}
    assert {4, 5, 6, 7} in [frozenset(range(8)) - off for off in asked[:2]], (
        "a layer at once, the less unusual one first"
    )


def test_of_two_that_do_the_same_the_more_unusual_one_stays():
    def score(off: Units) -> float:
        return 0.1 if off & {1, 2} else 0.9

    assert refined(frozenset([1, 2, 3]), Z, LAYERS, score, 0.5) == {2}


def test_unusual_is_relative_to_the_references():
    activations = torch.tensor([[1.0, 2.0, 5.0, 0.0], [3.0, 2.0, 5.0, 0.0], [2.0, 8.0, 5.0, 0.0]], dtype=torch.float64)
    found = References(torch.zeros(3), activations, 1).unusual(torch.tensor([4.0, 4.0, 6.0, 0.0], dtype=torch.float64))
    close(found[:2], [2.0, 0.0], 1e-12)
    assert found[2:].tolist() == [float("inf"), 0.0]
    close([References(torch.tensor([0.1, 0.2, 0.3]), activations, 1).threshold(2)], [0.4], 1e-6)
    assert NeuronSearch(1.0).rate == pytest.approx(0.1587, abs=1e-4)
    assert NeuronSearch(2.0).rate == pytest.approx(0.0228, abs=1e-4)


def test_references_that_are_all_equally_alike_are_refused():
    """As of a network that does not hear its text: each prompt would be at the threshold, on either side by rounding."""
    with refuses("3 reference prompts are all equally alike", "neurons", "a model that hears"):
        References(torch.full((3,), 0.7, dtype=torch.float64), torch.zeros(3, 4), 1).threshold(1)


# --------------------------------------------------------------------------------------------------------- a planted unit


def save_sd(folder: Path) -> Path:
    """A small Stable Diffusion of random weights that predicts v; its latents are 16 x 16."""
    family = FAMILIES["sd"]
    replace(family, config=family.config | {"sample_size": 16, "cross_attention_dim": WIDTH}).save(
        folder, prediction_type="v_prediction"
    )
    save_vae(folder, scaling_factor=0.7)
    save_clip(folder, width=WIDTH)
    return folder


def embeddings(folder: Path, prompts: tuple[str, ...]) -> Tensor:
    model = open_model(folder)
    return prompt_conditions(model, model.parts(Engine()), prompts, 32)["encoder_hidden_states"]


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """A unit that answers one prompt alone (1 at its tokens, as near 0 as least squares can at those of the others), so
    loudly that the same picture comes from every noise; its layer is in the middle."""
    folder = save_sd(tmp_path_factory.mktemp("planted") / "sd")
    own, *others = embeddings(folder, (MEMORISED, *REFERENCE)).double()
    tokens = torch.cat([*others, 10 * own])
    wanted = torch.cat([torch.zeros(len(tokens) - len(own)), 10 * torch.ones(len(own))]).double()
    row = torch.linalg.lstsq(
        torch.cat([tokens, 1e-3 * torch.eye(WIDTH)]), torch.cat([wanted, torch.zeros(WIDTH)])
    ).solution
    network = UNet2DConditionModel.from_pretrained(folder / "unet")
    attention = network.mid_block.attentions[0].transformer_blocks[0].attn2
    with torch.no_grad():
        attention.to_v.weight[UNIT] = row
        attention.to_out[0].weight[:, UNIT] = 1000 * torch.randn(8, generator=torch.Generator().manual_seed(0))
    network.save_pretrained(folder / "unet")
    return folder


LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"


def test_a_planted_unit_is_found_exactly(planted):
    layers = ValueLayers(open_model(planted), HOW)
    references = layers.references(REFERENCE)
    found = neurons_of(MEMORISED, layers, references)
    assert found.memorised
    assert [(neuron.layer, neuron.unit) for neuron in found.neurons] == [(LAYER, UNIT)]
    assert found.without < references.threshold(1.0) <= found.similarity
    assert found.p == 1 / (1 + len(REFERENCE))
    # However many are tried first.
    more = neurons_of(MEMORISED, layers, references, NeuronSearch(theta=40))
    assert more.candidates > 3
    assert more.neurons == found.neurons


def test_a_unit_that_is_off_is_a_row_of_zeros(planted):
    """The similarity without it is that of a network with this row; afterwards the network is as it was."""
    model = open_model(planted)
    layers = ValueLayers(model, HOW)
    before = layers.similarity(MEMORISED)
    number = layers.units.index((LAYER, UNIT))
    found = layers.similarity(MEMORISED, [number])
    network = UNet2DConditionModel.from_pretrained(planted / "unet").eval()
    with torch.no_grad():
        network.get_submodule(LAYER).weight[UNIT] = 0
    close([found[0]], [alike(next(first_steps(model, [MEMORISED], HOW, network=network)))[0]])
    assert layers.similarity(MEMORISED)[0] == before[0] > found[0] + 0.1
    assert layers.weights_without([number]).keys() == {f"{LAYER}.weight"}


def test_activations_are_means_of_sizes_over_tokens(planted):
    layers = ValueLayers(open_model(planted), HOW)
    text = embeddings(planted, (MEMORISED,))
    network = UNet2DConditionModel.from_pretrained(planted / "unet")
    names = dict.fromkeys(name for name, _ in layers.units)
    expected = [(text @ network.get_submodule(name).weight.T).abs().mean((0, 1)) for name in names]
    close(layers.activations(MEMORISED), torch.cat(expected), 1e-5)
    assert float(layers.activations(MEMORISED)[layers.units.index((LAYER, UNIT))]) == pytest.approx(1, abs=0.1)


# ------------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def files(tmp_path) -> Path:
    (tmp_path / "prompts.txt").write_text(f"{MEMORISED}\na cow\n")
    (tmp_path / "reference.txt").write_text("\n".join(REFERENCE))
    return tmp_path


def words(model: Path, files: Path, out: Path, *more: object) -> tuple[object, ...]:
    texts = ("--prompts", files / "prompts.txt", "--reference_prompts", files / "reference.txt")
    small = ("--noises", 4, "--generate", 2, "--num_inference_steps", 3, "--guidance_scale", 1)
    return ("neurons", model, *texts, *small, "--output_dir", out, *more)


def test_the_model_that_is_written_is_without_the_neuron(planted, files, monkeypatch):
    out = files / "out"
    done = succeeds(*words(planted, files, out))
    told = json.loads((out / "neurons.json").read_text())
    first, second = told["prompts"]
    assert [(neuron["layer"], neuron["unit"]) for neuron in first["neurons"]] == [(LAYER, UNIT)]
    assert (second["memorised"], second["neurons"], told["switched_off"]) == (False, [], 1)
    assert f"'{MEMORISED}' looks memorised: similarity " in done.out
    assert "1 of 2 prompts look memorised; neurons switched off: 1" in done.out
    assert f"{told['references_above']} of the 14 reference prompts are above it (nominally 16 %)" in done.out
    assert "compared at 1 of 3 scales" in done.out
    pipeline = DiffusionPipeline.from_pretrained(out / "model")  # anybody's
    old = UNet2DConditionModel.from_pretrained(planted / "unet").state_dict()
    for name, weight in pipeline.unet.state_dict().items():
        expected = old[name].clone()
        if name == f"{LAYER}.weight":
            expected[UNIT] = 0
        assert torch.equal(weight, expected)
    without = ValueLayers(open_model(out / "model"), FirstStep(4, steps=3)).similarity(MEMORISED)[0]
    close([without], [first["without"]])
    assert without < told["threshold"]
    pictures = [[path.read_bytes() for path in sorted((out / kind).glob("*.png"))] for kind in ("before", "after")]
    assert len(pictures[0]) == len(pictures[1]) == 2
    assert pictures[0] != pictures[1]
    kept = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert succeeds(*words(planted, files, out)).out == done.out
    (out / "neurons.json").unlink()  # as if it had been cut off
    (out / "prompts" / "00001.json").unlink()
    asked: list[str] = []

    def watched(prompt: str, *how: object) -> PromptNeurons:
        asked.append(prompt)
        return neurons_of(prompt, *how)

    monkeypatch.setattr("whence.evaluation.memorised.neurons_of", watched)
    assert succeeds(*words(planted, files, out)).out == done.out
    assert asked == ["a cow"], "what is known is not asked again"
    assert {path: path.read_bytes() for path in kept} == kept


def test_where_nothing_is_memorised_nothing_is_written(planted, files):
    (files / "prompts.txt").write_text("a cow\na cow\n")
    done = succeeds(*words(planted, files, files / "out"), warns="prompts that repeat others, and count once: 1")
    assert "0 of 1 prompts look memorised; neurons switched off: 0" in done.out
    assert not (files / "out" / "model").exists()
    assert not (files / "out" / "before").exists()


def test_where_no_neurons_do_it_this_is_said(planted, files, monkeypatch):
    """A network that draws one picture whatever it is told."""

    def similarity(self: ValueLayers, prompt: str, off: object = ()) -> tuple[float, int]:
        return (0.9 if prompt == MEMORISED else 0.01 * len(prompt), 1)

    monkeypatch.setattr(ValueLayers, "similarity", similarity)
    done = succeeds(*words(planted, files, files / "out"))
    assert "no neurons do it: with all units off it is still 0.900" in done.out
    assert not (files / "out" / "model").exists()


def test_long_prompts_are_told(planted, files):
    (files / "prompts.txt").write_text("a very long prompt that goes on and on\n")
    succeeds(
        *words(planted, files, files / "out"),
        warns="prompts of more than the 12 tokens that .* reads, which are cut: 1, such as",
    )


def without_cross_attention(folder: Path) -> Path:
    config = dict(FAMILIES["sd"].config)
    config |= {
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "mid_block_type": "UNetMidBlock2D",
    }
    save_vae(folder, scaling_factor=0.7)
    save_clip(folder)
    replace(FAMILIES["sd"], config=config).save(folder)
    return folder


def test_models_without_such_neurons_are_refused(files):
    made = {name: save_whole(name, files / name.replace(" ", "-")) for name in ("ddpm", "pixart", "sd3")}
    refused(*words(made["ddpm"], files, files / "out")[:-2], says="has no guidance")
    plain = [word for word in words(made["ddpm"], files, files / "out") if word not in ("--guidance_scale", 1)]
    refused(*plain, says="reads no text; accepted: a text-to-image model|reads no text")
    for name in ("pixart", "sd3"):
        refused(*words(made[name], files, files / "out"), says="Transformer2DModel are not looked for")
    refused(*words(without_cross_attention(files / "none"), files, files / "out"), says="has no cross-attention")
    assert not (files / "out").exists()


def test_mistakes_are_told(planted, files):
    out = files / "out"
    refused(*words(planted, files, out, "--noises", 1), says="noises")
    refused(*words(planted, files, out, "--deviations", 0), says="numbers above 0")
    refused("neurons", planted, "--output_dir", out, says="prompts")
    refused("neurons", planted, "--prompts", files / "nothing.txt", "--output_dir", out, says="no such file")
    (files / "reference.txt").write_text("a cat\n" * 12)
    refused(*words(planted, files, out), says="1 reference prompts; accepted: 10 or more|1 reference prompts")
    (files / "reference.txt").write_text("\n".join((*REFERENCE, MEMORISED)))
    refused(*words(planted, files, out), says="is asked about and a reference prompt")
    (files / "reference.txt").write_text("")
    refused(*words(planted, files, out), says="is empty")
    assert not out.exists()


def test_a_folder_belongs_to_its_prompts(planted, files):
    succeeds(*words(planted, files, files / "out"))
    (files / "prompts.txt").write_text("a cow\n")
    done = whence(*words(planted, files, files / "out"))
    assert (done.code, "holds other pictures" in done.err) == (2, True)


def test_references_that_were_changed_are_told(planted, files):
    """A bit of their values, of their number of scales, or of the header; and a file that is none."""
    succeeds(*words(planted, files, files / "out"))
    path = next((files / "out").rglob("references.safetensors"))
    before = path.read_bytes()
    for place in (len(before) - 3, before.index(b'"scales":"') + 10, 12):
        changed = bytearray(before)
        changed[place] ^= 1
        path.write_bytes(bytes(changed))
        (files / "out" / "neurons.json").unlink(missing_ok=True)
        done = whence(*words(planted, files, files / "out"))
        assert (done.code, str(path) in done.err.splitlines()[-1]) == (2, True), (place, done)
        assert len(done.err.splitlines()) == 1
    path.write_bytes(before[:-9])
    refused(*words(planted, files, files / "out"), says="references.safetensors is damaged .*remove it")


def test_references_of_ones_own_are_not_needed():
    assert len({*ORDINARY}) == 30
    assert Asked(("a",)).reference == ORDINARY
    with refuses("'a red car at night'", "neurons", "one of both"):
        Asked(("a red car at night",))
