# %% [markdown]
# # Which images made what your model drew?
#
# The whole way with a diffusion model of one's own: train it, let it draw, ask which images made that, ask how sure that is, and whom
# to credit. The model is tiny, so that it takes about a minute; the calls are those for a large one.

# %%
from pathlib import Path

import torch
from sklearn.datasets import load_digits

import whence
from whence.data.saving import save_png

data = load_digits()
if not Path("digits").exists():
    x = torch.tensor(data.images[:200], dtype=torch.float32)[:, None] / 8 - 1
    facts = [{"digit": int(digit), "creator": ["anna", "ben", "carla"][i % 3]} for i, digit in enumerate(data.target[:200])]
    save_png("digits", x, [f"{i:03d}" for i in range(200)], facts)

# %% [markdown]
# ## Train
#
# A recipe says all of a training; it lies in the model's folder as `recipe.toml`. What was cut off goes on where it stopped.

# %%
from whence.training.recipe import New, Schedule
from whence.training.runs import Pictures
from whence.training.study import unet_config

network = unet_config(8, channels=1, widths=(16, 16))
recipe = whence.Recipe(New(network), whence.AdamW(2e-3), Schedule(steps=300, warmup_steps=30), batch_size=32, ema=0.99)
study = whence.train(recipe, Pictures(Path("digits")), Path("ddpm"))
sorted(path.name for path in Path("ddpm").iterdir())

# %% [markdown]
# ## Draw, and ask
#
# `Sampling(4)` lets the model draw four pictures, which are kept in the run folder. D-TRAK compares gradients; ten draws of timesteps
# and noise per image are few, and the errors below say so.

# %%
task = whence.task_from_pretrained("ddpm", "digits", whence.Sampling(4, steps=20), root="run")
scores = whence.d_trak(draws=whence.uniform(10), dim=1024, damping=0.01)(task)
scores

# %%
name, score = scores.top(0, k=1)[0]
low, high = scores.ranks_between(0, [scores.train_ids.index(name)])[0]
print(f"strongest for the first picture: {name}; it may stand anywhere from rank {low + 1} to {high + 1}")
print("another run would correlate with this one by", [round(float(each), 2) for each in scores.reliability])

# %% [markdown]
# ## Whom to credit
#
# Shares of creators, with intervals over the pictures; what cannot be told from noise is nobody's. The digits were dealt out in turn,
# so there is nobody who should have much more.

# %%
from whence.evaluation.credit import credit, sums_of

found = credit(sums_of(scores, "creator"))
for name, share, low, high, advice in zip(found.names, found.share, found.low, found.high, found.advice):
    print(f"{name}: {share:.0%} ({low:.0%} to {high:.0%}), {advice}")

# %% [markdown]
# On the command line it is the same: `whence train new`, `whence attribute`, `whence credit`. How far such scores predict what
# retraining would do is another question: see the notebook on judging a method.
