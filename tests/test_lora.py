"""LoRA files as diffusers and peft write them, on every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agreement import close
from errors import refuses
from families import FAMILIES
from test_families import batch_of
from whence.diffusion import outputs
from whence.diffusion.draws import uniform
from whence.features.gradients import PARAMETERS, measure, per_image_backward, per_image_vmap, select
from whence.models import Lora, open_model
from whence.models.lora import attach, read_lora
from whence.types import Batch

CONFIG = {"r": 2, "lora_alpha": 3, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}


def randomised(network: nn.Module, seed: int = 1) -> nn.Module:
    """LoRA weights away from their start, where B = 0 hides everything."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if "lora_" in name:
                p.copy_(0.5 * torch.randn(p.shape, generator=g))
    return network


def peft_lora(name: str, folder: Path, **config: Any) -> nn.Module:
    """A network that peft adapted and saved; returns it."""
    model = get_peft_model(FAMILIES[name].network(), LoraConfig(**{**CONFIG, **config}))
    randomised(model).save_pretrained(folder)
    return model.base_model.model.eval()


def diffusers_lora(folder: Path, metadata: bool = True, **config: Any) -> UNet2DConditionModel:
    """An SD network that diffusers' training script adapted and saved; returns it."""
    unet: Any = FAMILIES["sd"].network()
    made = LoraConfig(**{**CONFIG, **config})
    unet.add_adapter(made)
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(randomised(unet)))
    told = {"unet_lora_adapter_metadata": made.to_dict()} if metadata else {}
    StableDiffusionPipeline.save_lora_weights(folder, layers, safe_serialization=True, **told)
    return unet.eval()


def loss_of(name: str, net: nn.Module, forward: Any) -> Tensor:
    batch, draw = batch_of(FAMILIES[name])
    with torch.no_grad():
        return measure(net.eval(), {}, forward, outputs.loss, batch, draw)


@pytest.mark.parametrize("name", FAMILIES)
def test_lora_of_peft_on_every_family(name, tmp_path):
    expected = peft_lora(name, tmp_path / "lora")
    model = open_model(FAMILIES[name].save(tmp_path / "base"), adapter=Lora(tmp_path / "lora"))
    plain = loss_of(name, FAMILIES[name].network(), model.forward)
    found = loss_of(name, model.final.load(), model.forward)
    close(found, loss_of(name, expected, model.forward))
    assert not torch.allclose(found, plain, rtol=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"to_k": 3}, "alpha_pattern": {"attn2.to_k": 7}},
        {"target_modules": ["conv1", "to_q", "proj_in"]},
        {"target_modules": ["conv_out"]},
    ],
    ids=str,
)
def test_scales_ranks_and_layers_of_peft(config, tmp_path):
    expected = peft_lora("sd", tmp_path / "lora", **config)
    model = open_model(FAMILIES["sd"].save(tmp_path / "base"), adapter=Lora(tmp_path / "lora"))
    ours = model.final.load()
    assert len(select(ours, "lora")) == len(select(expected, "lora"))
    close(*(loss_of("sd", net, model.forward) for net in (ours, expected)))


@pytest.mark.parametrize("metadata", [True, False])
def test_lora_of_diffusers(metadata, tmp_path):
    """With the header of newer versions, which holds alpha; without it alpha is the rank, as diffusers takes it."""
    diffusers_lora(tmp_path / "lora", metadata)
    expected: Any = FAMILIES["sd"].network()
    state, header = StableDiffusionPipeline.lora_state_dict(tmp_path / "lora", return_lora_metadata=True)[::2]
    expected.load_lora_adapter(state, prefix="unet", metadata=header)
    model = open_model(FAMILIES["sd"].save(tmp_path / "base"), adapter=Lora(tmp_path / "lora"))
    found, reference = (loss_of("sd", net, model.forward) for net in (model.final.load(), expected))
    close(found, reference)
    pairs = read_lora(tmp_path / "lora")
    assert {pair.scale for pair in pairs.values()} == {1.5 if metadata else 1.0}


def test_older_names_are_the_same_lora(tmp_path):
    diffusers_lora(tmp_path / "lora", metadata=False)
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    expected = read_lora(file)
    dots = {"lora_A": "lora.down", "lora_B": "lora.up"}
    old, older = {}, {}
    for key, value in load_file(file).items():
        side = next(s for s in (*dots, *dots.values()) if f".{s}." in key)
        base, down = key.split(f".{side}.")[0], side in ("lora_A", "lora.down")
        old[f"{base}.lora.{'down' if down else 'up'}.weight"] = value
        attention, _, to = base.removeprefix("unet.").partition(".to_")
        older[f"{attention}.processor.to_{to.removesuffix('.0')}_lora.{'down' if down else 'up'}.weight"] = value
        old[f"{base}.alpha"] = torch.tensor(6.0)
    for names, scale in ((old, 3.0), (older, 1.0)):
        save_file(names, tmp_path / "other.safetensors")
        found = read_lora(tmp_path / "other.safetensors")
        assert found.keys() == expected.keys()
        for module, pair in found.items():
            assert torch.equal(pair.A, expected[module].A)
            assert torch.equal(pair.B, expected[module].B)
            assert pair.scale == scale


def test_lora_parameters_only(tmp_path):
    """The preset takes A and B alone; nothing else is given a gradient; both backends agree."""
    peft_lora("sd", tmp_path / "lora")
    model = open_model(FAMILIES["sd"].save(tmp_path / "base"), adapter=Lora(tmp_path / "lora"))
    net = model.final.load().eval().double()
    names, draws = select(net, "lora"), uniform(3)
    assert len(names) == 2 * len(read_lora(tmp_path / "lora"))
    batch = batch_of(FAMILIES["sd"])[0].to("cpu", torch.float64)
    asked = []

    def forward(call: Any, b: Batch, draw: Any) -> tuple[Tensor, Tensor]:
        asked.append({name for name, p in net.named_parameters() if p.requires_grad})
        return model.forward(call, b, draw)

    rows = [f(net, model.forward, outputs.loss, draws, batch, names) for f in (per_image_vmap, per_image_backward)]
    for name in names:
        close(rows[0][name], rows[1][name], 1e-9)
        assert float(rows[1][name].abs().max()) > 0
    forward.timesteps, forward.alphas_cumprod = model.forward.timesteps, None  # type: ignore[attr-defined]
    per_image_backward(net, forward, outputs.loss, draws, batch, names)  # type: ignore[arg-type]
    assert all(names_asked == set(names) for names_asked in asked)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("family", "preset", "pattern"),
    [
        ("sd", "all", ""),
        ("sd", "attention", "attn"),
        ("sd", "cross-attention", "attn2"),
        ("sd", "cross-attention-kv", "attn2.to_k"),
        ("sd", "up-blocks", "up_blocks"),
        ("sd", "last", "conv_out"),
        ("dit", "last", "proj_out"),
        ("sd3", "last", "proj_out"),
        ("flux", "text-kv", "add_k_proj"),
        ("sd3", "text-kv", "add_v_proj"),
    ],
)
def test_presets(family, preset, pattern):
    """Each takes what its name says, less than all of it where it should, and nothing of another kind."""
    net = FAMILIES[family].network()
    names = [name for name, _ in net.named_parameters()]
    found = select(net, preset)
    assert any(pattern in name for name in found)
    assert preset == "all" or len(found) < len(names)
    if preset == "cross-attention-kv":
        assert found == [name for name in names if "attn2.to_k" in name or "attn2.to_v" in name]
    if preset == "last":
        assert all(name.startswith(pattern) for name in found)


def test_custom_diffusion_weights_are_a_preset():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_k = nn.Linear(1, 1)
            self.processor = nn.ModuleDict({"to_k_custom_diffusion": nn.Linear(1, 1, bias=False)})

    assert select(Net(), "custom-diffusion") == ["processor.to_k_custom_diffusion.weight"]
    assert set(PARAMETERS) >= {"custom-diffusion", "lora", "text-kv", "last"}


def test_checkpoints_of_a_lora_and_its_digest(tmp_path):
    base = FAMILIES["sd"].save(tmp_path / "base")
    peft_lora("sd", tmp_path / "lora")
    for step, alpha in ((20, 4), (3, 5)):
        peft_lora("sd", tmp_path / "lora" / f"checkpoint-{step}", lora_alpha=alpha)
    (tmp_path / "lora" / "checkpoint-3" / "whence.json").write_text('{"rate": 0.5}')
    model = open_model(base, adapter=Lora(tmp_path / "lora"))
    assert [(point.step, point.rate) for point in model.checkpoints] == [(3, 0.5), (20, None)]
    digests = {point.digest for point in (*model.checkpoints, model.final, open_model(base).final)}
    assert len(digests) == 4, "base, LoRA and scale each change the digest"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda t, c: ({k.replace("attn2", "attn7"): v for k, v in t.items()}, c),
            "another base: 16 of its 32 ...attn7",
        ),
        (
            lambda t, c: ({k: torch.ones(2, 9) if "lora_A" in k else v for k, v in t.items()}, c),
            "another base: ...A [2, 9], but the weight here is [8, 8]",
        ),
        (lambda t, c: (t, c | {"use_dora": True}), ("use_dora is True, which is not supported", "False")),
        (lambda t, c: (t, c | {"bias": "all"}), "bias is 'all'"),
        (lambda t, c: ({"text_encoder.x.lora_A.weight": torch.ones(1, 1)}, c), "x has no pair of A and B"),
        (lambda t, c: ({"lora_unet_down.lora_down.weight": torch.ones(1, 1)}, c), "down has no pair of A and B"),
        (lambda t, c: (dict(list(t.items())[:1]), c), "no pair of A and B"),
        (lambda t, c: (t | {"conv_in.weight": torch.ones(1)}, c), "conv_in.weight is no LoRA weight"),
        (lambda t, c: (t, None), "no adapter_config.json"),
        (lambda t, c: (None, c), ("no LoRA weights", "a folder with pytorch_lora_weights")),
    ],
)
def test_what_does_not_fit_is_one_clear_line(change, says, tmp_path):
    peft_lora("sd", tmp_path / "lora")
    weights, config = tmp_path / "lora" / "adapter_model.safetensors", tmp_path / "lora" / "adapter_config.json"
    tensors, told = change(load_file(weights), json.loads(config.read_text()))
    for path, content in ((weights, tensors), (config, told)):
        path.unlink()
        if content is not None:
            save_file(content, path) if path is weights else path.write_text(json.dumps(content))
    what, accepted = (says, "") if isinstance(says, str) else says
    with refuses(what, accepted=accepted) as error:
        attach(FAMILIES["sd"].network(), read_lora(tmp_path / "lora"), "lora")
    assert "\n" not in str(error.value)


def test_pickles_and_nothing_are_refused(tmp_path):
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"")
    with refuses("pytorch_lora_weights.bin, a pickle, which whence never opens"):
        read_lora(tmp_path)
    with refuses("does not exist"):
        read_lora(tmp_path / "nowhere")


def test_half_precision_files_are_read_in_the_precision_of_the_network(tmp_path):
    expected = inject_adapter_in_model(LoraConfig(**CONFIG), FAMILIES["ddpm"].network())
    randomised(expected)
    half = {k: v.half() for k, v in get_peft_model_state_dict(expected).items()}
    save_file(half, tmp_path / "pytorch_lora_weights.safetensors")
    net = attach(FAMILIES["ddpm"].network(), read_lora(tmp_path), "lora")
    assert {p.dtype for p in net.parameters()} == {torch.float32}
