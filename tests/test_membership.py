"""Was this set used? What is measured of an image is its formula, p is what it says where nothing is to be found, and a
model that has learned pictures by heart gives them away."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ttest_ind
from torch import Tensor, nn

from agreement import close
from errors import refuses
from recipes import pixel_study, recipe_of
from test_cli import noise, refused, succeeds
from whence import Classifier, Denoiser, FlowMatching, tensor_images
from whence.data.images import subset
from whence.data.saving import save_png
from whence.diffusion.draws import Draws, Fixed, Repeated, Steps
from whence.diffusion.forward import linear_schedule
from whence.diffusion.noise import seed_for
from whence.evaluation.banks import digit_images
from whence.evaluation.membership import (
    LEAST,
    Comparison,
    Membership,
    Separation,
    check_sets,
    loss_effect,
    membership,
    separation,
)
from whence.features.membership import NAMES, Signals
from whence.models import open_model
from whence.training.runs import train_study
from whence.types import Batch, Checkpoint, Engine, Images
from worlds import tensors

BAR = linear_schedule()
PLAIN = Denoiser(BAR)


class Net(nn.Module):
    """A small network of x_t, t and a class, with or without classes."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
        self.double()

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        shift = 0 if class_labels is None else class_labels[:, None, None, None]
        return self.two(torch.tanh(self.one(x) + (t / 500)[:, None, None, None] + shift))


def pictures(count: int, seed: int = 0, labels: bool = False) -> Images:
    x = torch.rand(count, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    return tensors(x, "x", torch.arange(count) % 3 if labels else None)


def signals(net: nn.Module, forward: object, images: Images, how: Signals = Signals(2), size: int = 3) -> Tensor:
    """The rows of all images, read `size` at a time."""
    rows = range(len(images))
    batches = (images.batch(rows[start : start + size]) for start in range(0, len(rows), size))
    return how.compute(net, forward, batches, len(rows), Engine())


def norm(v: Tensor, p: float = 2) -> float:
    return float(v.detach().abs().pow(p).mean() ** (1 / p))


def by_hand(net: nn.Module, image: Batch, noises: int) -> list[float]:
    """The formulas of one image, written apart, for a network that predicts the noise."""
    x0 = image.x0

    def eps_hat(x: Tensor, t: int) -> Tensor:
        return net(x, torch.tensor([t]), **image.cond)

    def a(t: int) -> float:
        return math.sqrt(BAR[t])

    def s(t: int) -> float:
        return math.sqrt(1 - BAR[t])

    def drawn(purpose: str, rule: object) -> list[Tensor]:
        draw = Draws(rule, seed_for(0, f"membership {purpose}"))(image.keys, x0.shape[1:], 1000, x0.dtype)
        return [each[None] for each in draw.noise[0]]

    def loss(t: int, eps: Tensor) -> float:
        return norm(eps - eps_hat(a(t) * x0 + s(t) * eps, t))

    grid = tuple(range(0, 1000, 100))
    found = [np.mean([loss(100, eps) for eps in drawn("denoising loss", Fixed(100, noises))])]
    several = drawn("multiple loss", Repeated(Steps(grid), noises))
    found += [np.mean([loss(t, eps) for eps in several[i * noises : (i + 1) * noises]]) for i, t in enumerate(grid)]
    for t, eps in zip(grid, drawn("gradient masking", Steps(grid)), strict=True):
        x = (a(t) * x0 + s(t) * eps).requires_grad_()
        (eps - eps_hat(x, t)).square().mean().sqrt().backward()
        fifth = int(0.2 * x.numel())
        mask = x.grad.abs() >= x.grad.abs().flatten().sort(descending=True).values[fifth - 1]
        assert int(mask.sum()) == fifth
        y = torch.where(mask, eps, x.detach())
        found.append(norm((eps - x0 - eps_hat(y, t))[mask]))
    with torch.no_grad():
        z = x0
        for t in range(0, 100, 10):
            e = eps_hat(z, t)
            z = a(t + 10) * (z - s(t) * e) / a(t) + s(t + 10) * e
        e = eps_hat(z, 100)
        up = a(110) * (z - s(100) * e) / a(100) + s(110) * e
        e = eps_hat(up, 110)
        found.append(norm(z - (a(100) * (up - s(110) * e) / a(110) + s(100) * e)))
        first = eps_hat(x0, 0)
        for e in (first, first / norm(first, 1) * math.sqrt(2 / math.pi)):
            found.append(norm(e - eps_hat(a(200) * x0 + s(200) * e, 200), 5))
    return found


@pytest.mark.parametrize("labels", [False, True], ids=["plain", "with classes"])
def test_signals_are_their_formulas(labels):
    net, images = Net(), pictures(3, labels=labels)
    found = signals(net, PLAIN, images)
    assert found.shape == (3, len(NAMES)) == (3, 24)
    close(found, [by_hand(net, images.batch([i]), 2) for i in range(3)], 1e-9)


def test_a_row_does_not_depend_on_the_others_and_the_network_stays_as_it_was():
    net, images = Net(), pictures(7)
    before = {name: p.clone() for name, p in net.named_parameters()}
    expected = signals(net, PLAIN, images)
    assert torch.equal(signals(net, PLAIN, images, size=7), expected)
    assert torch.equal(signals(net, PLAIN, subset(images, [5, 2])), expected[[5, 2]])
    renamed = tensors(images.x0[[5, 2]], "other")
    assert torch.equal(signals(net, PLAIN, renamed), expected[[5, 2]])
    assert not torch.equal(signals(net, PLAIN, images, Signals(2, seed=1)), expected)
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name])
        assert p.requires_grad
        assert p.grad is None


class Other(nn.Module):
    """The network of `Net` for another kind of prediction: what says the same of the noise."""

    def __init__(self, kind: str):
        super().__init__()
        self.net, self.kind = Net(), kind

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        bar = BAR[t.long()][:, None, None, None]
        a, s, eps = bar.sqrt(), (1 - bar).sqrt(), self.net(x, t)
        twice = torch.cat([eps, eps], 1)
        return {"v_prediction": (eps - s * x) / a, "sample": (x - s * eps) / a, "variance": twice}[self.kind]


@pytest.mark.parametrize("kind", ["v_prediction", "sample", "variance"])
def test_what_is_predicted_does_not_matter(kind):
    """The noise, the velocity, the image, or the noise with its variance."""
    images = pictures(2)
    forward = PLAIN if kind == "variance" else Denoiser(BAR, kind)
    close(signals(Other(kind), forward, images), signals(Net(), PLAIN, images), 1e-7)


class Knows(nn.Module):
    """Predicts the velocity towards one image, without error."""

    def __init__(self, image: Tensor, sigmas: Tensor):
        super().__init__()
        self.image, self.sigmas, self.one = image, sigmas, nn.Linear(1, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        sigma = (time / len(self.sigmas))[:, None, None, None]
        return (x - self.image) / sigma + 0 * x.sin()


@pytest.mark.parametrize("preconditioned", [False, True])
def test_flow_matching_of_a_model_that_knows_the_image(preconditioned):
    """All its losses are 0, a step forth and back ends where it began, and PIA finds the noise that it gave. Of another
    image x its loss is (1 - sigma) / sigma ||x - image||, whatever the noise."""
    sigmas = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    images = pictures(2)
    forward = FlowMatching(sigmas, preconditioned)
    found = signals(Knows(images.x0[0], sigmas), forward, images)
    of_losses = [i for i, name in enumerate(NAMES) if "masked" not in name]
    assert found[0, of_losses].abs().max() < 1e-7
    at = sigmas[[100, *range(0, 1000, 100)]]
    close(found[1, :11], (1 - at) / at * norm(images.x0[1] - images.x0[0]), 1e-9)
    assert found[0, 11:21].min() > 0.01  # what lies under the mask is noise alone there


def test_what_has_no_noise_to_predict_is_refused():
    with refuses("the noise that a Classifier predicts is not known", "membership", "Denoiser, FlowMatching"):
        signals(Net(), Classifier(), pictures(1))
    with refuses("a model of 50 timesteps", "membership", "100 timesteps or more"):
        signals(Net(), Denoiser(linear_schedule(50)), pictures(1))
    with refuses("0 noises", "membership"):
        Signals(0)


# ------------------------------------------------------------------------------------------------------------- the test


def rows(n: int, shift: float = 0.0, seed: int = 0, d: int = len(NAMES)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, d)) + shift


def test_p_counts_how_often_shuffled_labels_do_as_well():
    """Few permutations cannot say more than one in so many; a difference is found, none is not."""
    found = separation(rows(70, -1.0), rows(70, seed=1), Comparison(permutations=19))
    assert found.p == 0.05
    assert found.welch_p < 1e-6
    assert found.effect > 1
    assert found.auc > 0.9
    same = separation(rows(70), rows(70, seed=1), Comparison(permutations=19))
    assert same.p > 0.05
    assert (20 * same.p) % 1 == pytest.approx(0, abs=1e-9)
    assert separation(rows(70), rows(70, seed=1), Comparison(permutations=19)) == same


def test_scores_are_those_of_a_regression_that_has_not_seen_them():
    """Of five folds, standardised by what was learned from, as scikit-learn does it; the same indices of both sets."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import PredefinedSplit, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    p, u = rows(40, 0.3, d=3), 5 * rows(40, seed=1, d=3)
    fold = np.tile(np.arange(40) % 5, 2)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    labels = np.repeat([1, 0], 40)
    scores = cross_val_predict(model, np.vstack([p, u]), labels, cv=PredefinedSplit(fold), method="predict_proba")[:, 1]
    found = separation(p, u, Comparison(permutations=1))
    one_sided = ttest_ind(scores[:40], scores[40:], equal_var=False, alternative="greater")
    close([found.t, found.welch_p], [one_sided.statistic, one_sided.pvalue], 1e-6)
    close(found.auc, np.mean(scores[:40, None] > scores[None, 40:]), 1e-9)
    spread = math.sqrt((scores[:40].var(ddof=1) + scores[40:].var(ddof=1)) / 2)
    close(found.effect, (scores[:40].mean() - scores[40:].mean()) / spread, 1e-6)


def test_p_is_as_often_small_as_it_says_where_there_is_nothing_to_find():
    """Of 40 pairs of sets, small ones so that it is quick (200 of 70 each: benchmarks/results/copies.json)."""
    testing = Comparison(folds=2, permutations=9)
    p = [separation(rows(12, seed=2 * i, d=3), rows(12, seed=2 * i + 1, d=3), testing).p for i in range(40)]
    assert {*np.round(np.array(p), 9).tolist()} <= {*np.round(np.arange(1, 11) / 10, 9).tolist()}
    assert np.mean(np.array(p) < 0.15) <= 0.1 + 3 * math.sqrt(0.09 / 40)
    assert abs(np.mean(p) - 0.55) <= 3 * math.sqrt(0.0825 / 40)


def test_each_shuffle_is_tested_as_the_sets_were():
    """Scores of the sets themselves with shuffled labels would take the regressions for independent of what they score."""
    features = [rows(20, seed=seed, d=12) for seed in range(2)]
    found = separation(*features, Comparison(folds=4, permutations=40))
    rng, pooled, own = np.random.default_rng(0), np.vstack(features), np.repeat([True, False], 20)
    fold, reached = np.tile(np.arange(20) % 4, 2), 0
    for _ in range(40):
        labels = own.copy()
        for k in range(4):
            labels[fold == k] = rng.permutation(own[fold == k])
        # A set of its own, in the order that gives every row its fold again.
        first, second = (np.concatenate([pooled[(fold == k) & side] for k in range(4)]) for side in (labels, ~labels))
        order = np.argsort(np.concatenate([np.arange(5) * 4 + k for k in range(4)]))
        reached += separation(first[order], second[order], Comparison(folds=4, permutations=1)).t >= found.t - 1e-9
    assert found.p == (1 + reached) / 41
    assert 0 < reached < 40


def test_the_published_figures_say_what_is_said_of_them():
    """The p of the permutation test is uniform over random splits of unseen digits; Welch's, on the same scores, is not."""
    path = Path(__file__).parent.parent / "benchmarks" / "results" / "copies.json"
    splits = json.loads(path.read_text())["membership"]["splits of unseen pictures"]
    ours, theirs = splits["permutation test"], splits["Welch's test on the same scores"]
    assert splits["splits"] >= 100
    assert ours["Kolmogorov-Smirnov p"] > 0.05 > theirs["Kolmogorov-Smirnov p"]
    assert ours["below 0.05"] < 0.1
    assert theirs["below 0.01"] > 2 * 0.01


def test_a_lower_loss_is_that_of_the_suspects():
    lower = rows(70)
    lower[:, :11] -= 1.0
    assert loss_effect(lower, rows(70, seed=1)) > 1
    assert loss_effect(rows(70, seed=1), lower) == pytest.approx(-loss_effect(lower, rows(70, seed=1)))
    higher = rows(70)
    higher[:, 11:] -= 3.0  # masked losses and the rest are no losses of the whole image
    assert abs(loss_effect(higher, rows(70, seed=1))) < 0.5


@pytest.mark.parametrize(
    ("p", "loss", "verdict", "caveat"),
    [
        (
            0.001,
            1.0,
            "These 70 pictures, or a good part of them, were very probably used",
            "nor that a picture was copied",
        ),
        (0.001, -0.2, "The two sets differ (p = 0.001), but not as learned and unseen pictures do", "same kind"),
        (0.3, 1.0, "No sign that these 70 pictures were used in training (p = 0.3", "does not show that they were not"),
    ],
)
def test_the_verdict_says_p_and_what_it_does_not_mean(p, loss, verdict, caveat):
    found = Membership(70, Separation(p, p, 1.0, 1.0, 0.6), loss, Comparison(), Signals())
    assert verdict in found.verdict
    assert f"p = {p:g}" in found.verdict
    assert caveat in found.caveat


# ----------------------------------------------------------------------------------------------------- models and folders

NETWORK = {"_class_name": "MLPDenoiser", "sample_size": 8, "in_channels": 1, "width": 128, "layers": 1}


@pytest.fixture(scope="module")
def by_heart(tmp_path_factory) -> Path:
    """A perceptron that 75 digits trained, over and over."""
    root = tmp_path_factory.mktemp("membership")
    study = pixel_study(NETWORK, recipe_of(400, 70, learning_rate=5e-3, seed=1))
    train_study(study, digit_images(0, 75), root / "model", 400)
    return root


def asked(by_heart: Path, suspects: Images, unseen: Images, permutations: int) -> Membership:
    model = open_model(by_heart / "model")
    how = Comparison(permutations=permutations)
    return membership(model.final, model.forward, suspects, unseen, by_heart / "rows", Signals(1), how, Engine())


def test_pictures_learned_by_heart_are_found(by_heart):
    """70 of 75."""
    found = asked(by_heart, subset(digit_images(0, 75), range(70)), digit_images(80, 150), 99)
    assert found.separation.p == 0.01
    assert found.loss_effect > 0.5
    assert found.verdict.startswith("These 70 pictures, or a good part of them, were very probably used")


def test_neither_order_nor_names_matter(by_heart):
    sides = subset(digit_images(0, 75), range(70)), digit_images(80, 150)
    order = np.random.default_rng(0).permutation(70).tolist()
    renamed = tensors(sides[0].batch(order).x0, "other"), tensors(sides[1].batch(order[::-1]).x0, "some")
    assert asked(by_heart, *renamed, 99) == asked(by_heart, *sides, 99)


def test_unseen_pictures_are_not_found_and_another_kind_has_no_lower_loss(by_heart):
    assert asked(by_heart, digit_images(150, 220), digit_images(80, 150), 99).separation.p > 0.05
    negative = tensor_images(-digit_images(150, 220).batch(range(70)).x0)
    found = asked(by_heart, negative, digit_images(80, 150), 99)
    assert found.separation.p == 0.01
    assert found.loss_effect < 0


def repeated(images: Images) -> Images:
    return tensors(images.batch([0, 0, *range(1, len(images) - 1)]).x0, "r")


@pytest.mark.parametrize(
    ("suspects", "unseen", "what", "accepted"),
    [
        (digit_images(0, 70), subset(digit_images(80, 150), []), "there are no unseen pictures", "as many of each"),
        (digit_images(0, 75), digit_images(80, 150), "75 suspect and 70 unseen ones", "70 and 70"),
        (digit_images(0, 69), digit_images(80, 149), "69 of each are too few", f"{LEAST} of each"),
        (
            digit_images(0, 70),
            digit_images(69, 139),
            "1 of the unseen pictures are suspects, too: digit-0069",
            "surely not",
        ),
        (
            digit_images(0, 70),
            repeated(digit_images(80, 150)),
            "2 are there more than once: r-0000, r-0001",
            "each of them",
        ),
        (pictures(70), digit_images(80, 150), "they are [2, 4, 4] and [1, 8, 8]", "one size"),
    ],
)
def test_sets_that_a_test_would_lie_about_are_refused(suspects, unseen, what, accepted):
    with refuses(what, accepted=accepted):
        check_sets(suspects, unseen)


def test_settings_that_test_nothing_are_refused():
    for wrong in ({"folds": 1}, {"permutations": 0}):
        with refuses("folds and", "membership"):
            replace(Comparison(), **wrong)


def test_too_few_shuffles_to_ever_say_yes_are_refused(by_heart):
    images = digit_images(0, 70), digit_images(80, 150)
    with refuses("98 permutations can never say yes", "membership", "99 or more"):
        asked(by_heart, *images, permutations=98)


@pytest.fixture(scope="module")
def folders(by_heart: Path) -> Path:
    """The perceptron, its digits and others as pictures."""
    save_png(by_heart / "suspects", digit_images(0, 70).batch(range(70)).x0, NUMBERS)
    save_png(by_heart / "unseen", digit_images(80, 150).batch(range(70)).x0, NUMBERS)
    return by_heart


NUMBERS = [f"{i:02d}" for i in range(70)]


def words(folders: Path, out: Path, suspects: Path | None = None, unseen: Path | None = None) -> tuple[object, ...]:
    sets = ("--suspect_data_dir", suspects or folders / "suspects", "--unseen_data_dir", unseen or folders / "unseen")
    return ("membership", folders / "model", *sets, "--output_dir", out, "--draws", 1, "--permutations", 99)


def test_membership_from_the_command_line(folders, tmp_path):
    """Rows are kept; and a size that is asked for is what both sets are brought to."""
    done = succeeds(*words(folders, tmp_path / "out"))
    lines = done.out.splitlines()
    found = json.loads((tmp_path / "out/membership.json").read_text())
    assert lines[:2] == [found["verdict"], found["caveat"]]
    assert "(p = 0.01)" in lines[0]
    assert found["separation"]["welch_p"] < 1e-6
    assert (found["features"], found["pictures"]) == (list(NAMES), 70)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/features/*/part-*")}
    assert kept
    assert succeeds(*words(folders, tmp_path / "out"), "--resolution", 8).out == done.out
    assert {path: path.stat().st_mtime_ns for path in kept if path.exists()} == kept


BAD = {
    "other sizes": "large: the pictures are 16x16, the model's 8x8; accepted: pictures of 8x8, or --resolution 8 for both",
    "no unseen pictures": "empty: the folder is empty; accepted are",
    "fewer unseen": "70 suspect and 60 unseen ones; accepted: as many of each: 60 and 60",
    "suspects among the unseen": "3 of the unseen pictures are suspects, too: 67.png",
    "results among the pictures": "which would be changed",
    "no model": "no such model folder",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, folders, tmp_path):
    out = tmp_path / "out"
    if name == "other sizes":
        save_png(tmp_path / "large", noise(70, 2, 16), NUMBERS)
        arguments = words(folders, out, tmp_path / "large")
    elif name == "no unseen pictures":
        (tmp_path / "empty").mkdir()
        arguments = words(folders, out, unseen=tmp_path / "empty")
    elif name == "fewer unseen":
        save_png(tmp_path / "few", noise(60, 2), NUMBERS[:60])
        arguments = words(folders, out, unseen=tmp_path / "few")
    elif name == "suspects among the unseen":
        both = torch.cat([noise(67, 2), digit_images(0, 3).batch(range(3)).x0])
        save_png(tmp_path / "mixed", both, NUMBERS)
        arguments = words(folders, out, unseen=tmp_path / "mixed")
    elif name == "results among the pictures":
        save_png(tmp_path / "own", noise(70, 2), NUMBERS)
        arguments = words(folders, tmp_path / "own" / "out", unseen=tmp_path / "own")
    else:
        arguments = ("membership", tmp_path / "nowhere", *words(folders, out)[2:])
    refused(*arguments, says=BAD[name])
    assert not (out / "membership.json").exists()


def test_weights_that_are_not_there_are_told_by_name(tmp_path):
    """Rows of NaN are an error that names the image, as everywhere."""
    net = Net()
    net.two.bias.data.fill_(float("nan"))
    broken = Checkpoint(lambda: net, "broken", "broken")
    with refuses("weight two.bias holds NaN or Inf"):
        membership(broken, PLAIN, pictures(70), pictures(70, 1), tmp_path)
