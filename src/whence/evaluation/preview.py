"""The pictures as they would be without some of the training images, without training again.

    theta(1 - 1_R) = theta(1) - integral_0^1 sum_{i in R} (d theta / d w_i)(1 - u 1_R) du     (forward mode through training)

Both weights draw from the same noise, so that what changes is due to the images alone. The integral is taken by the midpoint
rule: one derivative, where the images of R count half, is right to second order; the derivative at the model itself, which
would be right to first order only, overshoots. `retrain` trains the truth, with the same seed, beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from whence.data.dropping import rows_without
from whence.models import with_weights
from whence.storage.files import writing
from whence.training.unroll import Run, final_weights, same_end, tangent, twin
from whence.types import Engine, Images, Trainable, Weights, WhenceError

matplotlib.use("Agg")


@dataclass(frozen=True, eq=False)
class Preview:
    """Pictures [m, C, H, W] in [-1, 1], from the same noise.

    Args:
        before: from the model as it is.
        predicted: from the predicted model.
        retrained: from the retrained model; None where there is none.
        moved: ||dtheta|| / ||theta||.
    """

    before: Tensor
    predicted: Tensor
    retrained: Tensor | None
    moved: float

    def facts(self) -> dict[str, float]:
        """Numbers by name.

        moved         ||dtheta|| / ||theta||
        change        norm of the predicted change of a picture, mean over pictures
        true_change   the same of the retrained model; this and what follows where there is one
        correlation   of the two changes over all pixels
        explained     1 - |predicted - retrained|^2 / |before - retrained|^2; 0 for a preview that changes nothing
        """
        step = (self.predicted - self.before).double()
        found = {"moved": self.moved, "change": float(step.flatten(1).norm(dim=1).mean())}
        if self.retrained is not None:
            true = (self.retrained - self.before).double()
            found["true_change"] = float(true.flatten(1).norm(dim=1).mean())
            both = torch.corrcoef(torch.stack([step.flatten(), true.flatten()]))
            found["correlation"] = float(both[0, 1]) if float(step.abs().max()) > 0 else 0.0
            found["explained"] = 1 - float((step - true).square().sum() / true.square().sum())
        return found


def chosen(images: Images, without: Sequence[str]) -> Tensor:
    """The images that any of some column=value conditions name (`id` is their name), or a file of names: [n] bool."""
    picked = torch.zeros(len(images), dtype=torch.bool)
    for condition in without:
        if "=" not in condition and Path(condition).is_file():
            kept = set(rows_without(images.ids, Path(condition)))
            picked |= torch.tensor([row not in kept for row in range(len(images))])
            continue
        column, sign, value = condition.partition("=")
        columns: Mapping[str, Sequence[object]] = {"id": images.ids, **images.meta}
        if not sign or column not in columns:
            raise WhenceError(
                f"--without {condition!r}; accepted: column=value with a column of {', '.join(columns)}, or a file of names"
            )
        here = torch.tensor([str(found) == value for found in columns[column]])
        if not here.any():
            some = ", ".join(sorted({str(found) for found in columns[column]})[:6])
            raise WhenceError(f"--without {condition!r} names no image; {column} has values like {some}")
        picked |= here
    if picked.all():
        raise WhenceError("--without names every training image; something must be left")
    return picked


def preview(
    network: nn.Module,
    study: Trainable,
    train: Images,
    removed: Tensor,
    draw: Callable[[nn.Module], Tensor],
    retrain: bool = False,
    engine: Engine = Engine(),
    points: int = 1,
) -> Preview:
    """What a network would draw, had it not seen some of its training images.

    Args:
        network: the trained network.
        study: what was trained, and how.
        train: the training images, n of them.
        removed: those it had not seen, bool [n].
        draw: network -> pictures [m, C, H, W], from the same noise every time.
        retrain: whether the truth is trained beside it.
        engine: how the work is carried out.
        points: of the midpoint rule, a training differentiated at each.
    """
    if points < 1:
        raise WhenceError(f"preview: points={points}; at least 1 is needed")
    run = Run.of(study, train, engine=engine)
    without = torch.cat([removed.float(), torch.zeros(len(run.images) - len(train))])  # prior images stay
    theta = final_weights(run)
    network = twin(network.to(engine.device, engine.dtype))
    same_end(run, theta, {name: p.detach() for name, p in network.named_parameters()})

    def drawn(weights: Weights) -> Tensor:
        return draw(with_weights(network, weights)).cpu().float()

    change = {name: torch.zeros_like(w) for name, w in theta.items()}
    for k in range(points):
        between = run.at(run.all_weights * (1 - (k + 0.5) / points * without))
        _, moved = tangent(between, -run.all_weights * without, what=f"preview {k + 1}/{points}")
        change = {name: total + moved[name] / points for name, total in change.items()}
    before, predicted = drawn(theta), drawn({name: theta[name] + change[name] for name in theta})
    # At the same constant denominators: the function of the image weights whose derivative was taken.
    truth = drawn(final_weights(run.at(run.all_weights * (1 - without)))) if retrain else None
    return Preview(before, predicted, truth, _norm(change) / _norm(theta))


def _norm(weights: Weights) -> float:
    return float(torch.stack([w.double().square().sum() for w in weights.values()]).sum().sqrt())


def plot(found: Preview, title: str, path: Path, columns: int = 10) -> None:
    """A row each: as it is, without the images, what changes, and where there is one the retrained model's picture.

    Args:
        found: the preview.
        title: of the figure.
        path: of the PNG file.
        columns: pictures shown, at most.
    """
    rows = {"the model": found.before, "without them (predicted)": found.predicted}
    if found.retrained is not None:
        rows["without them (retrained)"] = found.retrained
    plot_rows(rows, ("predicted change", found.predicted - found.before), title, path, columns)


def plot_rows(
    rows: Mapping[str, Tensor], change: tuple[str, Tensor], title: str, path: Path, columns: int = 10
) -> None:
    """Rows of pictures [m, C, H, W] in [-1, 1], and what changes between two of them.

    Args:
        rows: what stands beside a row -> its pictures.
        change: the same of the last row, a difference.
        title: of the figure.
        path: of the PNG file.
        columns: pictures shown, at most.
    """
    every = [*rows.items(), change]
    count = min(columns, len(change[1]))
    figure, all_axes = plt.subplots(
        len(every), count, figsize=(1.1 * count + 1.6, 1.15 * len(every) + 0.4), squeeze=False, layout="constrained"
    )
    for axes, (name, pictures) in zip(all_axes, every, strict=True):
        for at, picture in zip(axes, pictures, strict=False):
            values = picture.permute(1, 2, 0).float().numpy()
            if name == change[0]:
                at.imshow(values.mean(2), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            else:
                at.imshow(((values + 1) / 2).clip(0, 1).squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            at.set_xticks([])
            at.set_yticks([])
            for spine in at.spines.values():
                spine.set_visible(False)
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
