"""Every family of diffusion models: its loss is that of diffusers' training scripts, its gradients those of a plain loop."""

from __future__ import annotations

import json
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from agreement import close
from errors import refuses
from families import FAMILIES, TEXT, TOKENS, Family
from whence import d_trak, task_from_module
from whence.data.images import TensorImages, tensor_images
from whence.diffusion import outputs
from whence.diffusion.draws import uniform
from whence.diffusion.forward import CosMap, Custom, MinSNR, SigmaSqrt
from whence.features.gradients import measure, per_image_backward, per_image_vmap
from whence.models import NETWORKS, load_network, open_model
from whence.models.families.flux import CallFlux, pack, patch_ids, unpack
from whence.models.pipeline import DIFFUSION
from whence.types import Batch, Draw, describe

ROWS = 3
BACKENDS = (per_image_vmap, per_image_backward)
every_family = pytest.mark.parametrize("name", FAMILIES)


def batch_of(family: Family, seed: int = 0) -> tuple[Batch, Draw]:
    g = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, ROWS, family.channels, 4, 4, generator=g)
    t = torch.tensor([3, 400, 998])
    return Batch(x0, torch.arange(ROWS), family.conditions(ROWS)), Draw(t, noise)


def by_hand(name: str, net: torch.nn.Module, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """The call of the network, as the training script of the family has it."""
    text, pooled = cond.get("encoder_hidden_states"), cond.get("pooled_projections")
    if name == "ddpm":
        return net(x, t).sample
    if name == "ddpm with labels":
        return net(x, t, cond["class_labels"]).sample
    if name == "sd":
        return net(x, t, text).sample
    if name == "sdxl":
        added = {"time_ids": cond["time_ids"], "text_embeds": cond["text_embeds"]}
        return net(x, t, text, added_cond_kwargs=added).sample
    if name == "dit":
        return net(x, timestep=t, class_labels=cond["class_labels"]).sample
    if name.startswith("pixart"):
        added = {name: cond.get(name) for name in ("resolution", "aspect_ratio")}
        mask = cond["attention_mask"]
        return net(x, text, timestep=t, encoder_attention_mask=mask, added_cond_kwargs=added).sample
    if name == "sd3":
        return net(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t).sample
    pipeline, (b, c, h, w) = diffusers.FluxPipeline, x.shape
    out = net(
        hidden_states=pipeline._pack_latents(x, b, c, h, w),
        timestep=t / 1000,
        guidance=torch.full((b,), 3.5) if net.config.guidance_embeds else None,
        pooled_projections=pooled,
        encoder_hidden_states=text,
        txt_ids=torch.zeros(text.shape[1], 3),
        img_ids=pipeline._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32),
    ).sample
    return pipeline._unpack_latents(out, 8 * h, 8 * w, vae_scale_factor=8)


@every_family
def test_loss_is_that_of_the_training_script(name, tmp_path):
    """Written out from its definition, with diffusers' own scheduler: fp32 1e-6."""
    family = FAMILIES[name]
    model = open_model(family.save(tmp_path))
    net = model.final.load().eval()
    batch, draw = batch_of(family)
    x0, noise, cond = batch.x0, draw.noise, dict(batch.cond)
    with torch.no_grad():
        if family.flow:
            scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
            index = 999 - draw.t  # diffusers counts from the noisiest
            sigma, t = scheduler.sigmas[index].reshape(-1, 1, 1, 1), scheduler.timesteps[index]
            prediction, target = by_hand(name, net, (1 - sigma) * x0 + sigma * noise, t, cond), noise - x0
        else:
            scheduler = DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
            prediction, target = by_hand(name, net, scheduler.add_noise(x0, noise, draw.t), draw.t, cond), noise
            if family.learned_sigma:
                prediction = prediction.chunk(2, dim=1)[0]
        expected = ((prediction - target) ** 2).mean(dim=(1, 2, 3))
        found = measure(net, {}, model.forward, outputs.loss, batch, draw)
    assert float(expected.std()) > 1e-3
    close(found, expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_weighted_loss_of_the_ddpm_family(kind, tmp_path):
    """--snr_gamma and --prediction_type of train_text_to_image."""
    family = FAMILIES["sd"]
    model = open_model(family.save(tmp_path, prediction_type=kind))
    forward, net = replace(model.forward, weighting=MinSNR(5.0)), model.final.load().eval()
    batch, draw = batch_of(family)
    scheduler = DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    bar = scheduler.alphas_cumprod[draw.t]
    snr, divisor = bar / (1 - bar), {"epsilon": bar / (1 - bar), "v_prediction": 1 / (1 - bar), "sample": 1.0}[kind]
    velocity = scheduler.get_velocity(batch.x0, draw.noise, draw.t)
    target = {"epsilon": draw.noise, "v_prediction": velocity, "sample": batch.x0}[kind]
    with torch.no_grad():
        noisy = scheduler.add_noise(batch.x0, draw.noise, draw.t)
        plain = (by_hand("sd", net, noisy, draw.t, dict(batch.cond)) - target).square().mean((1, 2, 3))
        found = [measure(net, {}, forward, output, batch, draw) for output in (outputs.loss, outputs.weighted)]
    close(found[0], plain)
    torch.testing.assert_close(found[1], plain * snr.clamp(max=5.0) / divisor, rtol=1e-4, atol=0)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap"])
def test_weighted_loss_of_the_flow_family(scheme, preconditioned, tmp_path):
    """--weighting_scheme and --precondition_outputs of train_dreambooth_sd3, with the shift of the scheduler."""
    family = FAMILIES["sd3"]
    model = open_model(family.save(tmp_path, shift=3.0))
    weighting = {"sigma_sqrt": SigmaSqrt(), "cosmap": CosMap()}[scheme]
    forward, net = replace(model.forward, weighting=weighting, preconditioned=preconditioned), model.final.load().eval()
    batch, draw = batch_of(family)
    base = torch.linspace(1, 0.001, 1000)
    sigma = (3 * base / (1 + 2 * base))[999 - draw.t].reshape(-1, 1, 1, 1)
    noisy = (1 - sigma) * batch.x0 + sigma * draw.noise
    with torch.no_grad():
        out = by_hand("sd3", net, noisy, 1000 * sigma.flatten(), dict(batch.cond))
        found = measure(net, {}, forward, outputs.weighted, batch, draw)
    error = out * -sigma + noisy - batch.x0 if preconditioned else out - (draw.noise - batch.x0)
    weight = sigma**-2 if scheme == "sigma_sqrt" else 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2))
    torch.testing.assert_close(found, (weight * error**2).mean((1, 2, 3)), rtol=1e-4, atol=0)


@every_family
def test_gradient_backends_agree(name, tmp_path):
    """Vectorised over images, and image by image; both a plain loop over draws, for one of the images."""
    family = FAMILIES[name]
    model = open_model(family.save(tmp_path))
    net, draws = model.final.load().eval(), uniform(3, seed=4)
    names = [n for n, _ in net.named_parameters()]
    batch, _ = batch_of(family)
    both = [f(net, model.forward, outputs.loss, draws, batch, names) for f in BACKENDS]
    both = [torch.cat([rows[n].flatten() for n in names]) for rows in both]
    assert float(both[1].abs().max()) > 1e-4
    close(*both)


def test_flux_packs_as_diffusers_does():
    x = torch.randn(2, 4, 6, 8)
    assert torch.equal(pack(x), diffusers.FluxPipeline._pack_latents(x, 2, 4, 6, 8))
    assert torch.equal(unpack(pack(x), 6, 8), x)
    assert torch.equal(patch_ids(3, 4), diffusers.FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32))


def test_flux_guidance_is_declared_or_a_condition(tmp_path):
    family = FAMILIES["flux with guidance"]
    model = open_model(family.save(tmp_path))
    assert model.forward.predict == CallFlux(3.5)
    assert "3.5" in str(describe(model.forward))
    net, (batch, draw) = model.final.load().eval(), batch_of(family)
    told = replace(batch, cond={**batch.cond, "guidance": torch.full((ROWS,), 700.0)})
    losses = [measure(net, {}, model.forward, outputs.loss, b, draw) for b in (batch, told)]
    assert not torch.allclose(*losses)
    other = replace(model.forward, predict=CallFlux(700.0))
    close(measure(net, {}, other, outputs.loss, batch, draw), losses[1])


@every_family
def test_missing_conditions_are_named(name, tmp_path):
    family = FAMILIES[name]
    model = open_model(family.save(tmp_path))
    assert model.needs == family.cond
    told = describe(model.forward)
    assert str(told["predict"]).startswith("call_") or told["predict"]["is"] == "CallFlux"
    assert not told.keys() & {"weighting", "density"}, "what is not declared is not in recipes, as before"
    batch, draw = batch_of(family)
    for cond in family.cond:
        less = replace(batch, cond={k: v for k, v in batch.cond.items() if k != cond})
        with refuses(f"needed: ...{cond}"):
            measure(model.final.load(), {}, model.forward, outputs.loss, less, draw)


def test_every_network_of_the_table_is_tried():
    assert {family.kind for family in FAMILIES.values()} | {"MLPDenoiser"} == NETWORKS.keys()
    assert all(NETWORKS[family.kind].folder == family.part for family in FAMILIES.values())


def v_of_cosine(call, batch, draw):
    """A model of one's own: x_t = cos(phi) x0 + sin(phi) eps, told phi."""
    phi = (torch.pi / 2 * (draw.t + 1) / 10).to(batch.x0).reshape(-1, 1, 1, 1)
    x_t = phi.cos() * batch.x0 + phi.sin() * draw.noise
    return call(x_t, phi.flatten(), batch.cond["encoder_hidden_states"], return_dict=False)[0]


def velocity(batch, draw):
    phi = (torch.pi / 2 * (draw.t + 1) / 10).to(batch.x0).reshape(-1, 1, 1, 1)
    return phi.cos() * draw.noise - phi.sin() * batch.x0


def test_a_network_and_two_functions_of_ones_own_are_attributed(tmp_path):
    """The way out of every table: Custom and task_from_module."""
    net, forward = FAMILIES["sd"].network(), Custom(v_of_cosine, velocity, 10)
    batch, _ = batch_of(FAMILIES["sd"])
    both = [f(net, forward, outputs.loss, uniform(3), batch, ["conv_in.weight"]) for f in BACKENDS]
    close(both[0]["conv_in.weight"], both[1]["conv_in.weight"])

    class Ready(TensorImages):
        def batch(self, rows):
            return replace(super().batch(rows), cond={"encoder_hidden_states": torch.ones(len(rows), TOKENS, TEXT)})

    x0 = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    train, queries = (Ready(**vars(tensor_images(x, ids=names))) for x, names in ((x0[:4], "abcd"), (x0[4:], "ef")))
    scores = d_trak(draws=uniform(4), dim=16)(task_from_module(net, forward, train, queries, tmp_path))
    assert scores.values.shape == (2, 4)
    assert scores.recipe["forward"]["predict"].startswith("v_of_cosine ")


# ------------------------------------------------------------------------------------------------------- schedulers


@pytest.mark.parametrize("kind", DIFFUSION)
def test_noise_schedule_of_every_scheduler(kind, tmp_path):
    """SD's own: scaled linear from 0.00085 to 0.012."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    model = open_model(FAMILIES["sd"].save(tmp_path, kind=kind, **betas))
    scheduler = getattr(diffusers, kind).from_pretrained(tmp_path, subfolder="scheduler")
    torch.testing.assert_close(model.forward.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=1e-5, atol=0)
    bar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    torch.testing.assert_close(model.forward.alphas_cumprod, bar, rtol=1e-4, atol=0)


def test_zero_terminal_snr_is_read_and_dynamic_shifting_does_not_touch_training(tmp_path):
    zero = open_model(FAMILIES["sd"].save(tmp_path / "a", kind="DDIMScheduler", rescale_betas_zero_snr=True))
    assert float(zero.forward.alphas_cumprod[-1]) == 0
    flux = open_model(FAMILIES["flux"].save(tmp_path / "b", use_dynamic_shifting=True, shift=3.0))
    close(flux.forward.sigmas, torch.arange(1, 1001) / 1000)


@pytest.mark.parametrize(
    ("part", "change", "what", "accepted"),
    [
        ("unet", {"_class_name": "LTXVideo"}, "network class 'LTXVideo' is not supported", "UNet2DModel, ...Flux"),
        ("scheduler", {"_class_name": "EDMEuler"}, "scheduler class 'EDMEuler' is not supported", "DDPMSched...Flow"),
        ("scheduler", {"prediction_type": "flow"}, "prediction_type 'flow' of DDPMScheduler is not supported", "epsilon"),
        ("unet", {"addition_embed_type": "image"}, "addition_embed_type 'image' is not known", ""),
    ],
)  # fmt: skip
def test_what_is_not_known_is_told_with_a_way_out(part, change, what, accepted, tmp_path):
    path = FAMILIES["sd"].save(tmp_path) / part / ("config.json" if part == "unet" else "scheduler_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    hook = "...whence.Custom(predict, target, timesteps)"
    with refuses(what if accepted else what + hook, accepted=accepted and accepted + hook) as error:
        open_model(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_network_says_what_it_expects(tmp_path):
    (tmp_path / "vae").mkdir()
    with refuses("unet/ is missing (it holds vae)", accepted="unet/ or transformer/"):
        open_model(tmp_path)


@every_family
def test_weights_come_back_whole(name, tmp_path):
    """In the network's own class, with a digest that changes with a weight."""
    family = FAMILIES[name]
    model = open_model(family.save(tmp_path))
    net = family.network()
    for key, value in load_network(tmp_path / family.part).state_dict().items():
        assert torch.equal(value, net.state_dict()[key])
    with torch.no_grad():
        next(iter(net.parameters())).flatten()[0] += 1
    net.save_pretrained(tmp_path / family.part)
    assert open_model(tmp_path).final.digest != model.final.digest
