"""LoRA files as they are found: kohya's, ComfyUI's, with text encoders, with alphas that fit or not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agreement import close
from errors import refuses
from families import BY_DIFFUSERS, FAMILIES, save_index, save_whole
from test_encode import CAPTIONS, pictures
from test_lora import CONFIG, loss_of, peft_lora
from whence import Request, d_trak, task_from_pretrained, uniform
from whence.data.images import image_folder
from whence.doctor import Inputs, examine
from whence.models import Lora, encode_images, open_model
from whence.models.lora import placed
from whence.models.lora_files import Pair, read_lora, read_parts
from whence.types import WhenceError

PIPELINES: dict[str, Any] = {name: BY_DIFFUSERS[name] for name in ("sd", "sdxl", "sd3", "flux")}
ENCODERS = {"sd": ("",), "sdxl": ("", "_2"), "sd3": ("", "_2"), "flux": ("",)}
TE = {"sd": ("te",), "sdxl": ("te1", "te2"), "sd3": ("te1", "te2"), "flux": ("te1",)}
ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("loras")
    for name in PIPELINES:
        save_index(name, save_whole(name, root / name))
    pictures(root / "train", CAPTIONS)
    pictures(root / "queries", ["a cat", "birds"], seed=1)
    return root


def pair(weight: Tensor, g: torch.Generator, rank: int = 2) -> tuple[Tensor, Tensor]:
    """A and B for a layer."""
    a = 0.5 * torch.randn(rank, *weight.shape[1:], generator=g)
    return a, 0.5 * torch.randn(weight.shape[0], rank, *(1 for _ in weight.shape[2:]), generator=g)


def entries(
    module: nn.Module, chosen: Callable[[str], bool], name: Callable[[str], str], seed: int
) -> dict[str, Tensor]:
    """A kohya LoRA on some layers, each with an alpha."""
    g, found = torch.Generator().manual_seed(seed), {}
    for layer, each in module.named_modules():
        if isinstance(each, nn.Linear | nn.Conv2d) and chosen(layer):
            a, b = pair(each.weight, g)
            found |= {f"{name(layer)}.lora_down.weight": a, f"{name(layer)}.lora_up.weight": b}
            found[f"{name(layer)}.alpha"] = torch.tensor(1.0 + seed)
    return found


def flat(prefix: str) -> Callable[[str], str]:
    return lambda layer: f"{prefix}_{layer}".replace(".", "_")


SGM = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.3.0.skip_connection",
    "down_blocks.1.attentions.0.proj_in": "input_blocks.3.1.proj_in",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": "input_blocks.3.1.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": "middle_block.1.transformer_blocks.0.attn1.to_out.0",
    "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj": "output_blocks.1.1.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0.conv2": "output_blocks.2.0.out_layers.3",
    "mid_block.resnets.1.time_emb_proj": "middle_block.2.emb_layers.1",
    "conv_out": "out.2",
}


def kohya(name: str, folder: Path, spelled: str = "diffusers") -> dict[str, Tensor]:
    """A file of kohya's trainer: of the network and of CLIP."""
    pipe = PIPELINES[name].from_pretrained(folder)
    found = {}
    if name == "flux":
        g = torch.Generator().manual_seed(3)
        for theirs, width, ins in (("img_attn_qkv", 48, 16), ("txt_attn_proj", 16, 16), ("img_mod_lin", 96, 16)):
            a, b = pair(torch.empty(width, ins), g)
            module = f"lora_unet_double_blocks_0_{theirs}"
            found |= {
                f"{module}.lora_down.weight": a,
                f"{module}.lora_up.weight": b,
                f"{module}.alpha": torch.tensor(3.0),
            }
    elif spelled == "sgm":
        found = entries(pipe.unet, lambda n: n in SGM, lambda n: flat("lora_unet")(SGM[n]), 3)
    elif name != "sd3":
        found = entries(pipe.unet, lambda n: ".attn" in n or ".ff." in n or "proj_in" in n, flat("lora_unet"), 3)
    for at, te in zip(ENCODERS[name], TE[name], strict=True):
        module = getattr(pipe, f"text_encoder{at}")
        name_of = lambda layer, te=te: flat(f"lora_{te}_text_model")(layer.removeprefix("text_model."))  # noqa: E731
        found |= entries(module, lambda n: n.endswith(ATTENTION), name_of, 4 + len(at))
    return found


def conditions(name: str, pipe: Any, text: str = "a red cat") -> dict[str, Tensor]:
    options = {"prompt": [text], "device": "cpu", "num_images_per_prompt": 1}
    if name == "sd":
        return {"encoder_hidden_states": pipe.encode_prompt(**options, do_classifier_free_guidance=False)[0]}
    if name == "flux":
        states, pooled, _ = pipe.encode_prompt(text, text, "cpu", max_sequence_length=7)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}
    if name == "sdxl":
        states, _, pooled, _ = pipe.encode_prompt(**options, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states, "text_embeds": pooled}
    states, _, pooled, _ = pipe.encode_prompt(
        text, None, None, do_classifier_free_guidance=False, max_sequence_length=7
    )
    return {"encoder_hidden_states": states, "pooled_projections": pooled}


def same_as_the_pipeline(name: str, world: Path, lora: Path, root: Path) -> None:
    """Losses and embeddings with a LoRA file, against diffusers' `load_lora_weights`; both other than without it."""
    pipe = PIPELINES[name].from_pretrained(world / name)
    plain = open_model(world / name)
    with torch.no_grad():
        before = conditions(name, pipe)
        pipe.load_lora_weights(lora)
        expected = conditions(name, pipe)
    model = open_model(world / name, adapter=Lora(lora))
    theirs = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    found = loss_of(name, model.final.load(), model.forward)
    close(found, loss_of(name, theirs, model.forward))
    assert not torch.allclose(found, loss_of(name, plain.final.load(), plain.forward), rtol=1e-3)
    seen = encode_images(model, image_folder(world / "train", 8), root, tokens=7)
    for key, value in expected.items():
        close(seen.batch([0]).cond[key], value)
    changed = [key for key, value in expected.items() if not torch.allclose(value, before[key], rtol=1e-3)]
    assert bool(changed) == bool(model.additions)
    bare = encode_images(plain, image_folder(world / "train", 8), root, tokens=7)
    assert (bare.describe() != seen.describe()) == bool(model.additions), "the text encoder's LoRA is part of the key"


@pytest.mark.parametrize(
    ("name", "spelled"), [("sd", "diffusers"), ("sdxl", "diffusers"), ("sdxl", "sgm"), ("flux", "own")]
)
def test_kohya_files_are_read_as_the_pipeline_reads_them(name, spelled, world, tmp_path):
    save_file(kohya(name, world / name, spelled), tmp_path / "style.safetensors")
    same_as_the_pipeline(name, world, tmp_path / "style.safetensors", tmp_path / "run")


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_files_of_x_labs_are_read_as_the_pipeline_reads_them(prefix, world, tmp_path):
    """Their qkv are three layers with one A; they have no alpha."""
    g, found = torch.Generator().manual_seed(3), {}
    places = [f"double_blocks.0.processor.{kind}_lora{n}" for kind in ("qkv", "proj") for n in (1, 2)]
    for name in [*places, *(f"single_blocks.0.processor.{kind}_lora" for kind in ("qkv", "proj"))]:
        module = "linear2" if "single_blocks.0.processor.proj" in name else name
        a, b = pair(torch.empty(48 if "qkv" in name else 16, 80 if module == "linear2" else 16), g)
        found |= {f"{prefix}{name}.down.weight": a, f"{prefix}{name}.up.weight": b}
    save_file(found, tmp_path / "x.safetensors")
    same_as_the_pipeline("flux", world, tmp_path / "x.safetensors", tmp_path / "run")
    assert len(read_lora(tmp_path / "x.safetensors")) == 6


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("metadata", [True, False])
def test_text_encoders_in_files_of_diffusers(name, metadata, world, tmp_path):
    """As the DreamBooth scripts write them with --train_text_encoder; alpha is in the header, or the rank."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    pipe, g = PIPELINES[name].from_pretrained(world / name), torch.Generator().manual_seed(2)
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    text = {**CONFIG, "target_modules": ["q_proj", "k_proj", "out_proj"], "lora_alpha": 5}
    parts = {("unet" if hasattr(pipe, "unet") else "transformer"): (network, CONFIG)}
    parts |= {f"text_encoder{at}": (getattr(pipe, f"text_encoder{at}"), text) for at in ENCODERS[name]}
    options: dict[str, Any] = {}
    for part, (module, config) in parts.items():
        module.add_adapter(LoraConfig(**config))
        with torch.no_grad():
            for key, p in module.named_parameters():
                if "lora_" in key:
                    p.copy_(0.5 * torch.randn(p.shape, generator=g))
        options[f"{part}_lora_layers"] = convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
        options |= {f"{part}_lora_adapter_metadata": LoraConfig(**config).to_dict()} if metadata else {}
    PIPELINES[name].save_lora_weights(tmp_path / "lora", **options)
    same_as_the_pipeline(name, world, tmp_path / "lora", tmp_path / "run")


def merged(network: nn.Module, pairs: dict[str, Pair]) -> dict[str, Tensor]:
    """What a LoRA adds to each weight."""
    return {name: p.scale * p.B.flatten(1) @ p.A.flatten(1) for name, p in placed(network, pairs, "lora").items()}


RELEASED = [
    (
        "flux",
        "single_blocks.0.linear1",
        ["single_transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"],
    ),
    ("flux", "single_blocks.0.linear2", ["single_transformer_blocks.0.proj_out"]),
    ("flux", "double_blocks.0.txt_attn.qkv", ["transformer_blocks.0.attn.add_v_proj"]),
    ("flux", "img_in", ["x_embedder"]),
    ("flux", "vector_in.out_layer", ["time_text_embed.text_embedder.linear_2"]),
    ("sd3", "joint_blocks.0.x_block.attn.qkv", ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v"]),
    ("sd3", "joint_blocks.0.context_block.attn.qkv", ["transformer_blocks.0.attn.add_k_proj"]),
    ("sd3", "joint_blocks.0.x_block.mlp.fc2", ["transformer_blocks.0.ff.net.2"]),
    ("sd3", "y_embedder.mlp.2", ["time_text_embed.text_embedder.linear_2"]),
]
FUSED = {
    "single_blocks.0.linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "attn.qkv": ("to_q", "to_k", "to_v"),
    "txt_attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "context_block.attn.qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


@pytest.mark.parametrize(("name", "theirs", "ours"), RELEASED)
@pytest.mark.parametrize("written", ["lora_unet_{flat}", "diffusion_model.{name}"])
def test_layers_side_by_side(name, theirs, ours, written, tmp_path):
    """The names of the first releases: the product for a layer is that of its rows."""
    network = FAMILIES[name].network()
    rows = next((places for end, places in reversed(FUSED.items()) if theirs.endswith(end)), ())
    start = ours[0].rsplit("attn", 1)[0] if "single" in ours[0] else ours[0].rpartition(".")[0] + "."
    modules = [f"{start}{place}" for place in rows] or ours
    layers = dict(network.named_modules())
    sizes = [layers[module].weight.shape[0] for module in modules]
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, layers[modules[0]].weight.shape[1], generator=g), torch.randn(sum(sizes), 3, generator=g)
    key = written.format(flat=theirs.replace(".", "_"), name=theirs)
    ends = ("lora_down", "lora_up") if "lora_unet" in written else ("lora_A", "lora_B")
    file = {f"{key}.{ends[0]}.weight": a, f"{key}.{ends[1]}.weight": b, f"{key}.alpha": torch.tensor(6.0)}
    save_file(file, tmp_path / "lora.safetensors")
    found = merged(network, read_lora(tmp_path / "lora.safetensors"))
    assert {*ours} <= {*found}
    close(torch.cat([found[module] for module in modules]), 2 * b @ a)


def test_shift_and_scale_are_swapped_where_diffusers_does(tmp_path):
    network, g = FAMILIES["flux"].network(), torch.Generator().manual_seed(0)
    out, ins = network.norm_out.linear.weight.shape
    a, b = torch.randn(2, ins, generator=g), torch.randn(out, 2, generator=g)
    key = "lora_unet_final_layer_adaLN_modulation_1"
    save_file({f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}, tmp_path / "lora.safetensors")
    shift, scale = (b @ a).chunk(2)
    close(merged(network, read_lora(tmp_path / "lora.safetensors"))["norm_out.linear"], torch.cat([scale, shift]))


@pytest.mark.parametrize(
    "prefix",
    ["", "unet.", "unet.base_model.model.", "base_model.model.unet.", "diffusion_model.", "model.diffusion_model."],
)
def test_prefixes_are_the_same_lora(prefix, tmp_path):
    peft_lora("sd", tmp_path / "lora")
    expected = read_lora(tmp_path / "lora")
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    renamed = {f"{prefix}{key.removeprefix('base_model.model.')}": value for key, value in tensors.items()}
    other = tmp_path / "other"
    other.mkdir()
    save_file(renamed, other / "anything.safetensors")
    (other / "adapter_config.json").write_text((tmp_path / "lora" / "adapter_config.json").read_text())
    found = read_lora(other)
    assert found.keys() == expected.keys()
    assert {pair.scale for pair in found.values()} == {1.5}


def test_a_lora_of_linear_layers_fits_convolutions_of_one_pixel(tmp_path):
    """SD 1's proj_in is a convolution, SD 2's is none; kohya writes either for both."""
    network, g = FAMILIES["sd"].network(), torch.Generator().manual_seed(0)
    name = "down_blocks.1.attentions.0.proj_in"
    a, b = pair(torch.empty(network.get_submodule(name).weight.shape[:2]), g)
    for shape in ((), (1, 1)):
        made = {
            f"{name}.lora_A.weight": a.reshape(*a.shape, *shape),
            f"{name}.lora_B.weight": b.reshape(*b.shape, *shape),
        }
        save_file({k: v.contiguous() for k, v in made.items()}, tmp_path / "lora.safetensors")
        close(merged(network, read_lora(tmp_path / "lora.safetensors"))[name], b @ a)


# ------------------------------------------------------------------------------------------------- used, or refused

MODULE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
GOOD = {
    f"{MODULE}.lora_down.weight": torch.ones(2, 8),
    f"{MODULE}.lora_up.weight": torch.ones(8, 2),
    f"{MODULE}.alpha": torch.tensor(4.0),
}
REFUSED: dict[str, tuple[dict[str, Tensor], str]] = {
    "DoRA of kohya": ({f"{MODULE}.dora_scale": torch.ones(8, 1)}, "is a DoRA"),
    "DoRA of peft": ({"unet.x.lora_magnitude_vector": torch.ones(8)}, "is a DoRA"),
    "LoKr": ({f"{MODULE[:-1]}k.lokr_w1": torch.ones(2, 2)}, "is a LoKr"),
    "LoHa": ({f"{MODULE[:-1]}k.hada_w1_a": torch.ones(2, 2)}, "is a LoHa"),
    "LoCon with a core": ({f"{MODULE}.lora_mid.weight": torch.ones(2, 2)}, "third factor"),
    "OFT": ({f"{MODULE}.oft_blocks": torch.ones(2, 2)}, "is a OFT"),
    "whole differences": ({"diffusion_model.conv_in.diff": torch.ones(2, 2)}, "whole differences"),
    "differences of biases": ({"diffusion_model.conv_in.diff_b": torch.ones(2)}, "whole differences"),
    "a control LoRA": ({"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(2)}, "is a control LoRA of Flux"),
    "x-labs, on another network": (
        {
            "double_blocks.0.processor.proj_lora1.down.weight": torch.ones(2, 8),
            "double_blocks.0.processor.proj_lora1.up.weight": torch.ones(8, 2),
            "double_blocks.0.proj_lora1.alpha": torch.tensor(1.0),
        },
        "such as double_blocks.0.proj_lora1",
    ),
    "norms": ({"diffusion_model.mid_block.resnets.0.norm1.weight": torch.ones(2)}, "norm1.weight is no LoRA weight"),
    "an alpha of no module": ({"lora_unet_nowhere.alpha": torch.tensor(1.0)}, "nowhere has an alpha, but no pair"),
    "no alpha of one": (
        {f"{MODULE[:-1]}k.lora_down.weight": torch.ones(2, 8), f"{MODULE[:-1]}k.lora_up.weight": torch.ones(8, 2)},
        "to_k has no alpha, .*to_q has one",
    ),
    "an alpha of two numbers": ({f"{MODULE}.alpha": torch.ones(2)}, "one alpha"),
    "an alpha that is NaN": ({f"{MODULE}.alpha": torch.tensor(torch.nan)}, "scale of .* is nan"),
    "a side of one dimension": ({f"{MODULE}.lora_down.weight": torch.ones(8)}, r"accepted: B \[out, rank"),
    "another base": (
        {
            "lora_unet_x.lora_down.weight": torch.ones(2, 8),
            "lora_unet_x.lora_up.weight": torch.ones(8, 2),
            "lora_unet_x.alpha": torch.tensor(1.0),
        },
        "another base: 1 of its 2 modules are not in this UNet2DConditionModel, such as x",
    ),
    "a norm as a module": (
        {
            "lora_unet_conv_norm_out.lora_down.weight": torch.ones(2, 4),
            "lora_unet_conv_norm_out.lora_up.weight": torch.ones(4, 2),
            "lora_unet_conv_norm_out.alpha": torch.tensor(1.0),
        },
        "such as conv_norm_out",
    ),
    "one module twice": (
        {
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 8),
        }
        | {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight": torch.ones(8, 2)}
        | {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.alpha": torch.tensor(1.0)},
        "a second time",
    ),
    "a text encoder of another width": (
        {
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 5),
            "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(8, 2),
            "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0),
        },
        r"text_encoder\) is for another base: .*fc1 has",
    ),
    "a text encoder that is not there": (
        {
            "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 8),
            "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(8, 2),
            "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0),
        },
        "adapts text_encoder_2, which .* does not have",
    ),
}


def use(world: Path, lora: Path, root: Path) -> None:
    model = open_model(world / "sd", adapter=Lora(lora))
    model.final.load()
    encode_images(model, image_folder(world / "train", 8), root)


@pytest.mark.parametrize("case", REFUSED)
def test_every_key_is_used_or_refused(case, world, tmp_path):
    """By what opens the model, and before that by the doctor."""
    more, says = REFUSED[case]
    save_file({**GOOD, **more}, tmp_path / "lora.safetensors")
    found = examine(Inputs(world / "sd", None, None, tmp_path / "run", 8, Lora(tmp_path / "lora.safetensors")))
    assert any(finding.level == "error" and re.search(says, str(finding)) for finding in found), [*map(str, found)]
    with pytest.raises(WhenceError) as error:
        use(world, tmp_path / "lora.safetensors", tmp_path / "run")
    assert re.search(says, str(error.value))
    assert "\n" not in str(error.value)
    assert "lora.safetensors" in str(error.value)


def test_a_good_file_is_taken(world, tmp_path):
    save_file(GOOD, tmp_path / "lora.safetensors")
    open_model(world / "sd", adapter=Lora(tmp_path / "lora.safetensors")).final.load()
    assert [pair.scale for pair in read_lora(tmp_path).values()] == [2.0]


CONFIGS: dict[str, tuple[dict[str, Any] | None, str]] = {
    "none": (None, "no adapter_config.json, which tells the scale"),
    "DoRA": ({"use_dora": True}, "use_dora is True"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
    "LoKr": ({"peft_type": "LOKR"}, "peft_type is 'LOKR'"),
    "saved modules": ({"modules_to_save": ["conv_out"]}, "modules_to_save is"),
    "alpha as text": ({"lora_alpha": "many"}, "lora_alpha is .many., which does not tell"),
    "alpha as nothing": ({"lora_alpha": None, "alpha_pattern": [1]}, "alpha is None, which does not tell"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_scale_that_is_not_understood_is_refused(case, tmp_path):
    """Under another name, too, a file of peft is nothing without its configuration."""
    change, says = CONFIGS[case]
    peft_lora("sd", tmp_path / "lora")
    other, told = tmp_path / "other", tmp_path / "lora" / "adapter_config.json"
    other.mkdir()
    (tmp_path / "lora" / "adapter_model.safetensors").rename(other / "mine.safetensors")
    if change is not None:
        (other / "adapter_config.json").write_text(json.dumps({**json.loads(told.read_text()), **change}))
    with pytest.raises(WhenceError) as error:
        read_parts(other)
    assert re.search(says, str(error.value))
    assert "\n" not in str(error.value)


def test_several_files_are_not_guessed_among(tmp_path):
    for name in ("a", "b"):
        save_file(GOOD, tmp_path / f"{name}.safetensors")
    with refuses("holds 2 files of weights", accepted="one of them, such as ...a.safetensors"):
        read_parts(tmp_path)


def test_a_text_encoder_alone_is_refused(world, tmp_path):
    only = {key: value for key, value in kohya("sd", world / "sd").items() if "_te_" in key}
    save_file(only, tmp_path / "lora.safetensors")
    with refuses("adapts text_encoder alone, which is not attributed"):
        open_model(world / "sd", adapter=Lora(tmp_path / "lora.safetensors"))


def test_from_a_kohya_file_to_scores(world, tmp_path):
    """And checkpoints whose text encoder is another are refused by the methods that read them, by no other."""
    file = kohya("sd", world / "sd")
    (tmp_path / "lora" / "checkpoint-2").mkdir(parents=True)
    save_file(file, tmp_path / "lora" / "style.safetensors")
    other = {key: value * 2 if "_te_" in key else value for key, value in file.items()}
    save_file(other, tmp_path / "lora" / "checkpoint-2" / "style.safetensors")
    sides = (world / "train", world / "queries")
    task = task_from_pretrained(world / "sd", *sides, tmp_path / "run", Lora(tmp_path / "lora"), resolution=8)
    scores = d_trak(draws=uniform(3), dim=8, damping=0.1, parameters="lora")(task)
    assert torch.isfinite(scores.values).all()
    with refuses("checkpoint-2 has other text encoders"):
        task.trajectory[0].load()
    others = {"adapter": Lora(tmp_path / "lora"), "ensemble": [tmp_path / "lora" / "checkpoint-2"], "resolution": 8}
    with refuses("adapts the text encoders otherwise"):
        Request(world / "sd", *sides, tmp_path / "run", **others).task()


def test_a_and_b_of_the_network_are_what_is_attributed(world, tmp_path):
    """What is attributed is A and B of every module of the network, not of the text encoder."""
    save_file(kohya("sdxl", world / "sdxl", "sgm"), tmp_path / "lora.safetensors")
    network = open_model(world / "sdxl", adapter=Lora(tmp_path / "lora.safetensors")).final.load()
    asked = [name for name, p in network.named_parameters() if p.requires_grad]
    assert len(asked) == 2 * len(SGM)
