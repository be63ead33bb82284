# %% [markdown]
# # How good is my method?
#
# The package ships what 579 retrained models said: 512 digits, a small diffusion model trained on random halves of them. A method's
# scores predict how the loss of a picture changes from half to half; their rank correlation with what happened is the *linear
# datamodelling score* (LDS), and retraining with other seeds shows the highest value anybody could reach. About a minute.

# %%
from pathlib import Path

import whence
from whence.evaluation import banks
from whence.evaluation.lds import bootstrap, predict

recipe = banks.digits()
bank = banks.load("digits", recipe)
masks, outputs = bank.tables["heldout"].role("test").averaged()
print(f"{len(masks)} halves of {masks.shape[1]} images, {outputs.shape[1]} held-out pictures")

# %% [markdown]
# ## A method of one's own
#
# It is a choice of parts: what is measured, how it is compressed, what stands in the middle, how rows are scaled. Any function from a
# task to scores will do as well.

# %%
from whence.diffusion.outputs import squared_norm
from whence.methods.normalize import cosine

mine = whence.InnerProduct(
    whence.Gradient(squared_norm, whence.uniform(10), whence.SJLT(512)),
    precondition=whence.Gram(damping=0.1),
    normalize=cosine,
    name="mine",
)

# %% [markdown]
# The model itself is trained here once, by the bank's recipe; the shipped figures are those of its retrainings.

# %%
model = banks.train_reference(recipe, Path("bank"))
opened = whence.Request(model, recipe.train, bank.queries["heldout"], "run").opened
task = whence.Task(opened.forward, (opened.final,), recipe.train, bank.queries["heldout"], Path("run"))
scores = {"mine": mine(task), "pixel_cosine": whence.pixel_cosine()(task)}

# %% [markdown]
# ## The figure, with its interval
#
# Subsets and pictures are drawn again together, the same way for both, so that the difference is paired. Whether damping 0.1 is a good
# choice must not be asked of these halves: choose on `role("tune")`, report on `role("test")`.

# %%
found = bootstrap({name: predict(each.values, masks) for name, each in scores.items()}, outputs)
for name in scores:
    each = found.interval(name)
    print(f"{name}: LDS {each.estimate:.2f} ({each.low:.2f} to {each.high:.2f})")
difference = found.difference("mine", "pixel_cosine")
print(f"mine is better by {difference.estimate:+.2f} ({difference.low:+.2f} to {difference.high:+.2f})")

# %% [markdown]
# `whence bench digits --methods mine:method` puts it beside all others, with ceiling and cost: `docs/extending.md` has how a file of
# your own is called by its path, `docs/bench.md` the table.
