"""Is a caption that was trained on fifty times told from others, and do few neurons bring back its picture?

python benchmarks/neurons.py [FOLDER]      a quarter of an hour of one core; goes on where it was cut off

In FOLDER (runs/neurons) are made: 16 x 16 pictures of 150 of scikit-learn's digits with a caption each, of its digit and a
name, one of them 50 times; an autoencoder of 16 x 16 x 4 and a CLIP of random weights; a UNet2DConditionModel that predicts
the noise, trained on them by `whence train text`. Then `whence neurons` is asked about the caption that was there 50 times
and 20 that were there once, judged against 40 others of these. Marks: the first is flagged; of the 20 no more than the
nominal rate (one standard deviation above the mean: 16 %). Besides: how many neurons, and how near the pictures that are
drawn are to the one in training, before and after (cosine of pixels less their mean, of 8 pictures).
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from sklearn.datasets import load_digits
from torch.nn.functional import interpolate

import _record
from _record import RUNS, SMOKE, record
from latent import WIDTH, completed, text_encoder
from whence.data.images import image_folder
from whence.data.saving import save_png
from whence.storage.files import progress

SIDE, COUNT, COPIES, ASKED, REFERENCE = 16, 150, 50, 20, 40
NETWORK, STEPS = (32, 64), {"autoencoder": 500, "text": 2000, "drawing": 25}
if SMOKE:
    COUNT, COPIES, ASKED, REFERENCE, NETWORK = 14, 2, 2, 10, (8,)
    STEPS = dict.fromkeys(STEPS, 2)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def whence(*words):
    print("whence", *words, flush=True)
    done = _record.whence(*words)
    print(done.out, flush=True)
    if done.code:
        raise SystemExit(done.err)


def captions(count):
    """A caption per picture: its digit and a name of five letters."""
    rng = np.random.default_rng(0)
    classes = load_digits(return_X_y=True)[1][:count]
    names = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 5)) for _ in range(count)]
    return [f"{DIGITS[kind]} by {name}" for kind, name in zip(classes, names, strict=True)]


def pictures(folder):
    """The pictures, the first of them COPIES times."""
    if not folder.is_dir():
        x = torch.tensor(load_digits().images[:COUNT] / 8 - 1, dtype=torch.float32)[:, None]
        x = interpolate(x, SIDE, mode="bilinear").clamp(-1, 1).expand(-1, 3, -1, -1)
        rows = [*[0] * (COPIES - 1), *range(COUNT)]
        texts = captions(COUNT)
        part = folder.with_suffix(".tmp")
        shutil.rmtree(part, ignore_errors=True)
        save_png(part, x[rows], [f"{i:04d}" for i in range(len(rows))], [{"text": texts[row]} for row in rows])
        part.rename(folder)
    return folder


def autoencoder(x, folder):
    """Of as many pixels as latents: it has little to learn."""
    torch.manual_seed(0)
    model = AutoencoderKL(
        latent_channels=4, block_out_channels=(16,), down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",), norm_num_groups=8, sample_size=SIDE, mid_block_add_attention=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in progress(range(STEPS["autoencoder"]), "autoencoder"):
        rows = torch.randint(len(x), (16,), generator=torch.Generator().manual_seed(step))
        q = model.encode(x[rows]).latent_dist
        loss = (model.decode(q.sample()).sample - x[rows]).square().mean() + 1e-5 * q.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        z = model.encode(x).latent_dist.mode()
    model.register_to_config(scaling_factor=1 / float(z.std()))
    model.eval().save_pretrained(folder)


def parts(folder, x):
    """A pipeline folder whose network has no weights yet."""
    if (folder / "model_index.json").exists():
        return folder
    autoencoder(x, folder / "vae")
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    text_encoder(folder)
    UNet2DConditionModel(
        sample_size=SIDE, in_channels=4, out_channels=4, block_out_channels=NETWORK, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * len(NETWORK), up_block_types=("CrossAttnUpBlock2D",) * len(NETWORK),
        cross_attention_dim=WIDTH, attention_head_dim=8, norm_num_groups=8,
    ).save_config(folder / "unet")  # fmt: skip
    return completed(folder)


def nearness(folder, target):
    """Mean cosine of the pictures in a folder with one, pixels less their mean."""
    rows = image_folder(folder, SIDE).batch(range(len(list(folder.glob("*.png"))))).x0.flatten(1).double()
    rows, target = (each - each.mean(-1, keepdim=True) for each in (rows, target.flatten().double()))
    return float((rows @ target / (rows.norm(dim=1) * target.norm())).mean())


def main(folder):
    data = pictures(folder / "pictures")
    every = image_folder(data, SIDE)
    x = every.batch(range(len(every))).x0
    made = parts(folder / "parts", x[COPIES - 1 :])
    whence("train", "text", "--pretrained_model_name_or_path", made, "--train_data_dir", data, "--output_dir",
           folder / "model", "--max_train_steps", STEPS["text"], "--train_batch_size", 16, "--learning_rate", 1e-3,
           "--ema_decay", 0.99, "--checkpointing_steps", 100_000)  # fmt: skip
    texts = captions(COUNT)
    asked, reference = texts[: 1 + ASKED], texts[1 + ASKED : 1 + ASKED + REFERENCE]
    for name, some in (("asked", asked), ("reference", reference)):
        (folder / f"{name}.txt").write_text("\n".join(some) + "\n")
    out = folder / "found"
    whence("neurons", folder / "model", "--prompts", folder / "asked.txt", "--reference_prompts", folder / "reference.txt",
           "--generate", 8, "--guidance_scale", 1, "--num_inference_steps", STEPS["drawing"],
           "--output_dir", out)  # fmt: skip
    told = json.loads((out / "neurons.json").read_text())
    first, *others = told["prompts"]
    drawn = {kind: nearness(out / kind, x[0]) for kind in ("before", "after") if (out / kind).is_dir()}
    flagged = sum(each["memorised"] for each in others)
    record(
        "neurons",
        {
            "question": __doc__.splitlines()[0],
            "repeated": first,
            "threshold": told["threshold"],
            "nominal_rate": told["nominal_rate"],
            "references_above": [told["references_above"], told["references"]],
            "others_flagged": [flagged, len(others)],
            "similarities_of_others": sorted(each["similarity"] for each in others),
            "scales": told["scales"],
            "switched_off": [told["switched_off"], sum(told["layers"].values())],
            "nearness of what is drawn": drawn,
            "met": {"flagged": first["memorised"], "others": flagged <= told["nominal_rate"] * len(others)},
        },
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RUNS / "neurons")
