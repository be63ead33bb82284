"""Journey-TRAK: the mean of TRAKs along the way, and the way itself, recorded from the sampler."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from agreement import close
from errors import refuses
from test_cli import SMALL, TRAINING, noise, refused, succeeds
from whence.curvature.gram import Gram
from whence.data.images import subset
from whence.data.saving import save_png
from whence.diffusion.draws import fixed, uniform
from whence.diffusion.outputs import loss
from whence.features.parts import part
from whence.methods.inner_product import InnerProduct
from whence.methods.journey import journey_trak
from whence.methods.trak import trak
from whence.models import open_model, sample, start_noise
from whence.storage.files import read_json, write_json
from whence.storage.scores import load_scores
from whence.task import Sampling, generated, task_from_pretrained
from whence.types import Engine
from worlds import Walk, linear_world, tensors

STEPS = 5


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    task = linear_world(n=14, m=3, dim=4).task(tmp_path_factory.mktemp("journey"))
    return replace(task, sampled=Walk((task.queries, task.train), (5, 3, 0)))


class Still(Walk):
    """A journey on which the network saw the final picture from the first step on."""

    def predicted(self, timestep: int):
        return self.images[0]


def at_step(task, t: int, noises: int, queries, damping: float) -> torch.Tensor:
    """TRAK with its queries at one timestep."""
    train, query = part(loss, uniform(6, 4), 24, "all"), part(loss, fixed(t, noises, 4), 24, "all")
    return InnerProduct(train, query, Gram(damping))(replace(task, queries=queries)).values


@pytest.mark.parametrize("noises", [1, 5])
def test_standing_still_is_trak_with_fixed_draws(task, noises):
    """With xhat0(t) = x_q for all t: TRAK with fixed(t) draws, averaged over t."""
    still = replace(task, sampled=Still((task.queries,), (5, 3, 0)))
    expected = torch.stack([at_step(task, t, noises, task.queries, 0.05) for t in (5, 3, 0)]).mean(0)
    same(journey_trak(draws=uniform(6, 4), dim=24, damping=0.05, noises=noises)(still).values, expected)


def test_one_step_and_their_mean(task):
    """The mean over steps of the scores of each, the queries being what the network saw there, whatever their order."""
    settings = {"draws": uniform(6, 4), "dim": 24, "noises": 2}
    found = [journey_trak(**settings, step=t).grid(task, [0.01, 1.0]) for t in task.sampled.timesteps]
    for at, damping in enumerate((0.01, 1.0)):
        for t, scores in zip(task.sampled.timesteps, found, strict=True):
            seen = subset(task.sampled.predicted(t), range(3))
            assert list(seen.ids) == list(task.queries.ids)
            same(scores[at].values, at_step(task, t, 2, seen, damping))
        together = torch.stack([scores[at].values for scores in found])
        same(journey_trak(**settings, damping=damping)(task).values, together.mean(0))
    assert not torch.allclose(together[0], together[2], rtol=0.1)


def test_ensembles_are_means(task, tmp_path):
    other = replace(linear_world(n=14, m=3, dim=4, ridge=20.0).task(tmp_path), sampled=task.sampled)
    settings = {"draws": uniform(6), "dim": 24, "damping": 0.05}
    both = replace(task, ensemble=other.trajectory)
    mean = (journey_trak(**settings)(task).values + journey_trak(**settings)(other).values) / 2
    same(journey_trak(**settings, ensemble=True)(both).values, mean)
    same(journey_trak(**settings)(both).values, journey_trak(**settings)(task).values)
    assert not torch.allclose(mean, trak(**settings)(task).values, rtol=0.1)


def test_what_is_not_on_the_way_is_refused(task):
    with refuses("step 4 is none of the sampler's", accepted="5, 3, 0"):
        journey_trak(step=4, dim=24)(task)
    with refuses("says nothing of query 'query-0002'"):
        journey_trak(dim=24)(replace(task, sampled=Walk((tensors(task.queries.x0[:2], "query"),), (5, 3))))


# ------------------------------------------------------------------------------------------------- from a real sampler


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny trained model, the images it saw, and a run in which whence drew two pictures."""
    root = tmp_path_factory.mktemp("sampled")
    save_png(root / "images", noise(12, 0), [f"{i:02d}" for i in range(12)])
    succeeds("train", "new", "--train_data_dir", root / "images", "--output_dir", root / "model", *TRAINING)
    generated(open_model(root / "model"), root / "run", Sampling(3, 7, STEPS), Engine())
    return root


def test_the_journey_is_what_the_scheduler_predicts(folder):
    """A loop of its own over diffusers' DDIM: pred_original_sample at every step, clamped; and it ends at the picture."""
    model = open_model(folder / "model")
    task = task_from_pretrained(folder / "model", folder / "images", folder / "run" / "generated", folder / "run")
    scheduler = DDIMScheduler.from_config({k: v for k, v in model.scheduler.items() if k != "_class_name"})
    scheduler.set_timesteps(STEPS)
    assert list(task.sampled.timesteps) == scheduler.timesteps.tolist()
    net, x = model.final.load().eval(), start_noise(model, 3, 7)
    with torch.no_grad():
        for t in scheduler.timesteps:
            step = scheduler.step(net(x, t.expand(3))[0], int(t), x, eta=0.0)
            x, clean = step.prev_sample, step.pred_original_sample.clamp(-1, 1)
            seen = task.sampled.predicted(int(t))
            assert list(seen.ids) == list(task.queries.ids)
            close(seen.x0, clean, 1e-4)
    close(sample(model, 3, 7, STEPS), x.clamp(-1, 1), 1e-4)
    pictures = task.queries.batch(range(3)).x0
    assert float((pictures - x.clamp(-1, 1)).abs().max()) <= 1 / 255 + 1e-4
    assert float((task.sampled.predicted(int(scheduler.timesteps[0])).x0 - pictures).abs().max()) > 0.1
    with refuses("timestep 5 is none of the sampler's"):
        task.sampled.predicted(5)


def test_pictures_keep_their_own_way(folder, tmp_path):
    """Rows of the journey belong to the pictures by number, in any batches; one that was taken out is missed."""
    run = shutil.copytree(folder / "run", tmp_path / "run")
    args = (folder / "model", folder / "images")
    task = task_from_pretrained(*args, run / "generated", run)
    t = task.sampled.timesteps[1]
    whole = task.sampled.predicted(t).x0
    alone = task_from_pretrained(*args, run / "generated", tmp_path / "other", engine=Engine(batch_size=1)).sampled
    close(alone.predicted(t).x0, whole, 1e-4)
    lines = (run / "generated" / "metadata.jsonl").read_text().splitlines()
    (run / "generated" / "metadata.jsonl").write_text("\n".join(lines[1:]) + "\n")
    (run / "generated" / json.loads(lines[0])["file_name"]).unlink()
    with refuses("is not what was drawn (2 of 4 files)", accepted="removed, to draw again"):
        task_from_pretrained(*args, run / "generated", tmp_path / "again")


def test_other_queries_have_no_journey(folder, tmp_path):
    copied = shutil.copytree(folder / "run" / "generated", tmp_path / "generated")
    drawn_how = read_json(folder / "run" / "generated.json")
    assert task_from_pretrained(folder / "model", folder / "images", copied, tmp_path / "a").sampled is None
    write_json(tmp_path / "generated.json", {**drawn_how, "model": "another"})
    assert task_from_pretrained(folder / "model", folder / "images", copied, tmp_path / "a").sampled is None


def test_on_the_command_line(folder, tmp_path):
    about = ("attribute", folder / "model", "--train_data_dir", folder / "images")
    drawn = (*about, "--generate", 2, "--num_inference_steps", STEPS, *SMALL)
    succeeds(*drawn, "--method", "journey_trak", "--method", "retrac", "--output_dir", tmp_path / "run")
    for name in ("journey_trak", "retrac"):
        found = load_scores(tmp_path / "run" / "scores" / name)
        assert found.values.shape == (2, 12)
        assert (found.values.std(1) > 0).all()
    task = task_from_pretrained(folder / "model", folder / "images", tmp_path / "run" / "generated", tmp_path / "run")
    last = task.sampled.timesteps[-1]
    succeeds(*drawn, "--method", "journey_trak", "--set", f"step={last}", "--output_dir", tmp_path / "run")
    assert load_scores(tmp_path / "run" / "scores" / "journey_trak").recipe["method"]["step"] == last
    given = (*about, "--query_data_dir", folder / "images", "--output_dir", tmp_path / "given", *SMALL)
    refused(
        *given,
        "--method",
        "journey_trak",
        says="how the queries were sampled; accepted: `whence attribute --generate N`",
    )
