# %% [markdown]
# # Whom to credit?
#
# A model learned from the pictures of several creators. Which share of a picture is whose, and is that share right? The shares that
# scores give are set beside what *retraining* says: the model is trained anew on every coalition of the creators. About half a minute on
# a slow core.
#
# It is written for icons with a column `creator`: `ICONS=folder` names those of yours, of which the three creators with the most are
# taken. A fresh machine has none. Without them, as here, there are digits of three creators whom nobody has met: *upright* writes digits
# as they are, *mirrored* in a mirror, and *negative* black on white.

# %%
import os
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

import whence
from whence.data.images import image_folder, subset
from whence.data.owners import groups

if "ICONS" in os.environ:
    every = image_folder(os.environ["ICONS"], 16, channels=1)
else:
    x = torch.tensor(load_digits().images[:240], dtype=torch.float32)[:, None] / 8 - 1
    hands = ["upright"] * 120 + ["mirrored"] * 80 + ["negative"] * 40
    every = whence.tensor_images(torch.cat([x[:120], x[120:200].flip(-1), -x[200:]]), meta={"creator": hands})

# %% [markdown]
# Every eighth picture of a creator is not trained on: it is asked about. Whose hand it is in is known, so that one sees whom the credit
# goes to.

# %%
largest = sorted(groups(every.meta["creator"]).values(), key=len, reverse=True)[:3]
asked = subset(every, sorted(row for rows in largest for row in rows[::8]))
train = subset(every, sorted(row for rows in largest for i, row in enumerate(rows) if i % 8))
owned = {name: len(rows) for name, rows in groups(train.meta["creator"]).items()}
print(f"{len(train)} images to train on: {owned}; {len(asked)} to ask about")

# %% [markdown]
# ## The model, and a method
#
# A small network of pixels. D-TRAK says what each image did for each picture; summed over the images of a creator, what is below zero
# counting as nothing, that is a share.

# %%
from whence.evaluation.credit import credit, sums_of
from whence.training.recipe import New, Schedule
from whence.training.runs import train_study
from whence.training.study import Study

side = every.batch([0]).x0.shape[-1]
network = {"_class_name": "MLPDenoiser", "sample_size": side, "in_channels": 1, "width": 64, "layers": 2}
recipe = whence.Recipe(New(network), whence.AdamW(3e-3), Schedule(250, 20), batch_size=32, max_grad_norm=0.0, ema=0.98)
study = Study(recipe)
if not Path("model").exists():
    train_study(study, train, Path("model"), every=250)
task = whence.task_from_pretrained("model", train, asked, root="run")
scores = {
    "d_trak": whence.d_trak(draws=whence.uniform(20), dim=1024, damping=0.01)(task),
    "pixel_cosine": whence.pixel_cosine()(task),
}

# %% [markdown]
# ## What retraining says
#
# Three creators have eight coalitions; each is trained with two seeds, sixteen models as one computation. The *Shapley value* of a
# creator is how much better a picture is predicted with his images than without, over all orders in which the creators could have
# come; *leave-one-out* is that for whoever comes last.

# %%
from whence.diffusion.outputs import loss
from whence.evaluation.designs import coalitions
from whence.evaluation.ledger import Ledger
from whence.evaluation.values import values

subsets = coalitions(len(train), groups(train.meta["creator"]), [], seeds=(1, 2))
ledger = Ledger.plan(Path("ledger"), study, train, subsets, stack=16)
ledger.run()
ledger.measure("loss", asked, loss, whence.uniform(20))
for value in ("shapley", "leave_one_out"):
    scores[value] = values(ledger, value, by="creator")

# %% [markdown]
# ## The shares
#
# Of the pictures in each hand, who gets how much?

# %%
names, of_hand = list(owned), groups(asked.meta["creator"])
number = np.array([owned[name] / len(train) for name in names])
shares = {"by the number of images": {hand: number for hand in names}}
for method, each in scores.items():
    found = credit(sums_of(each, "creator"))
    place = [list(found.names).index(name) for name in names]
    shares[method] = {hand: found.of_picture[of_hand[hand]].mean(axis=0)[place] for hand in names}
print(f"{'paid by':26}{'pictures of':14}" + "".join(f"{name:>14}" for name in names))
for method, of in shares.items():
    for hand in names:
        print(f"{method:26}{hand:14}" + "".join(f"{share:14.0%}" for share in of[hand]))

# %%
for method in ("by the number of images", "pixel_cosine", "d_trak"):
    apart = np.mean([np.abs(shares[method][hand] - shares["leave_one_out"][hand]).sum() / 2 for hand in names])
    print(f"{method}: {apart:.0%} of the money goes to somebody else than by leave-one-out")

# %% [markdown]
# ## What to believe
#
# The Shapley values are nearly the same for all: most of what a model needs any of the creators could have given, and whoever comes first
# is paid for it. Leave-one-out pays for what nobody else could give, and says nothing of two creators who do the same. Which of the two
# is asked must be said before anybody is paid.
#
# Beside leave-one-out D-TRAK gives too much to the hand that a picture is in, and pixels cannot tell a mirrored digit from an upright
# one. Here the two are about as far from it as each other, which the shares alone would not have shown. `docs/credit.md` has the same for
# eight creators of real icons, on a better model, where D-TRAK is much nearer. With intervals, and what cannot be told from noise set
# aside: `whence credit run --by creator`.
