"""whence clean."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from whence.cli.common import (
    DATA,
    METHOD,
    MODEL,
    Budget,
    Device,
    Output,
    Skip,
    engine_on,
    write_config,
)
from whence.cli.options import Option, Verb, error
from whence.cli.settings import settings_per_method
from whence.cli.terminal import say

if TYPE_CHECKING:
    from whence.evaluation.curated import Model
    from whence.task import Request
    from whence.types import Engine, Images

ASKED = ("model",)


@dataclass(frozen=True)
class Clean:
    """Say which training images are there twice, which look alike, which may have a wrong label, which hurt the model most
    and which are unlike all others; each as a table with pictures, and as a list of names that --without takes. Changes
    nothing."""

    data: Annotated[
        Path,
        Option(
            "The training images: an imagefolder, or .tar or .parquet files.", "Arguments", argument=True, hub="dataset"
        ),
    ]
    model: Annotated[
        Path | None,
        Option(
            "A diffusers pipeline folder trained on them; without, only the images are looked at.", MODEL, hub="model"
        ),
    ] = None
    query_data_dir: Annotated[
        Path | None,
        Option("Held-out pictures that the model should make, for what hurts most.", DATA, needs=ASKED, hub="dataset"),
    ] = None
    caption_column: Annotated[
        str | None, Option("Column of the captions, for a model that reads text; text by default.", DATA, needs=ASKED)
    ] = None
    classes: Annotated[
        str | None,
        Option("Names of the model's classes in its order: a file, or names with commas.", DATA, needs=ASKED),
    ] = None
    resolution: Annotated[
        int | None, Option("Side of the square that images are brought to; the model's, or as they are.", DATA, min=1)
    ] = None
    skip: Skip = False
    method: Annotated[str, Option("Method of the self-influence, and of what hurts.", METHOD, needs=ASKED)] = (
        "influence"
    )
    set: Annotated[
        tuple[str, ...], Option("name=value of a setting of the method; may be repeated.", METHOD, needs=ASKED)
    ] = ()
    encoder: Annotated[
        Path | None,
        Option(
            "Compare images by this encoder in place of pixels: the folder of a CLIP, ViT or DINO.", METHOD, hub="model"
        ),
    ] = None
    neighbours: Annotated[int, Option("Nearest images that are asked about each.", METHOD, min=1)] = 10
    near: Annotated[float, Option("Cosine from which on two images look alike.", METHOD)] = 0.99
    far: Annotated[float, Option("Modified z-score above which an image is an outlier.", METHOD)] = 3.5
    rate: Annotated[float, Option("Share of false ones among the images that are said to hurt.", METHOD)] = 0.05
    output_dir: Output = Path("runs/clean")
    budget_mb: Budget = 256
    device: Device = "cpu"


def clean(options: Clean) -> None:
    from whence.data.hashing import DIGESTS, refuse_inside
    from whence.data.images import image_folder
    from whence.evaluation import curated as room
    from whence.evaluation.curation import Curation
    from whence.features.encoders import Thumbnail
    from whence.features.pretrained import Pretrained

    encoder = Thumbnail(32) if options.encoder is None else Pretrained(str(options.encoder))
    if isinstance(encoder, Pretrained):
        encoder.check()
    how = Curation(options.neighbours, options.near, options.far, options.rate, encoder)
    engine, root = engine_on(options.device, budget_mb=options.budget_mb), options.output_dir
    refuse_inside(root, options.data)
    model: Model | None = None
    if options.model is None:
        images: Images = image_folder(options.data, options.resolution, 3, None, root / DIGESTS, options.skip)
    else:
        request = _request(options, engine)
        model = _said(options, request)
        images = request.train_images
    found = room.curated(images, how, model, engine)
    about = {"data": str(options.data), "model": None if options.model is None else str(options.model)}
    for line in room.write(found, images, root, f"What to look at in {options.data.name}", about):
        say(line)
    write_config(options, root)
    say(f"page: {root / 'clean.html'}")
    say("a list is where to look first, not what is wrong; nothing was changed")


def _request(options: Clean, engine: Engine) -> Request:
    from whence.task import Request

    assert options.model is not None
    pictures = options.query_data_dir or options.data  # without queries nothing is asked about any
    return Request(options.model, options.data, pictures, options.output_dir, None, (), options.resolution,
                   options.caption_column, engine, options.classes, options.skip)  # fmt: skip


def _said(options: Clean, request: Request) -> Model:
    """What the model says of its images, and of the pictures where there are some."""
    from whence.evaluation.curated import Model
    from whence.evaluation.curation import harm
    from whence.evaluation.unlearned import task_without_queries
    from whence.methods import build
    from whence.methods.inner_product import InnerProduct, self_influence
    from whence.models import model_classes

    settings = settings_per_method((options.method,), {}, options.set, 0)[options.method]
    opened = request.opened
    method = build(options.method, opened.forward, settings)
    if not isinstance(method, InnerProduct):
        raise error(
            f"--method {options.method} has no self-influence", accepted="influence, ek_fac, d_trak, gradient_dot ..."
        )
    task = task_without_queries(request) if options.query_data_dir is None else request.task()
    reads = "labels" if model_classes(opened).count is not None else "captions" if opened.reads_text else ""
    own = self_influence(method, task).double().numpy()
    hurt = None if options.query_data_dir is None else harm(method(task), options.rate)
    return Model(options.method, reads, own, hurt)


VERB = Verb(clean, Clean, config=True)
