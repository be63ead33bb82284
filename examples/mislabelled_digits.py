# %% [markdown]
# # Which digits have the wrong label?
#
# A classifier learns 600 handwritten digits, of which 30 have a wrong label. Which ones? Two signs that need nobody who knows the
# answer: *self-influence*, what the model learned of an image from that image alone, and the *vote of the neighbours*. About half a
# minute on one slow core; nothing is downloaded.

# %%
import numpy as np
import torch
from sklearn.datasets import load_digits

import whence

data, rng = load_digits(), np.random.default_rng(0)
x = torch.tensor(data.images[:600], dtype=torch.float32)[:, None] / 8 - 1
wrong = np.zeros(600, bool)
wrong[rng.permutation(600)[:30]] = True
labels = np.where(wrong, (data.target[:600] + rng.integers(1, 10, 600)) % 10, data.target[:600])
print(f"{wrong.sum()} of {len(labels)} labels are wrong")

# %% [markdown]
# The classifier sees the labels as they are. It is small, and learns most of the wrong ones by heart.

# %%
torch.manual_seed(0)
net = torch.nn.Sequential(
    torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16 * 64, 10)
)
optimizer, told = torch.optim.Adam(net.parameters(), 2e-3), torch.tensor(labels)
for _ in range(20):
    for rows in torch.randperm(600).split(50):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x[rows]), told[rows]).backward()
        optimizer.step()
print(f"right on {(net(x).argmax(1) == told).float().mean():.1%} of its training images, as they are labelled")

# %% [markdown]
# ## Self-influence
#
# `self_influence(method, task)` is the score of each training image for itself, without the whole matrix of scores.

# %%
from whence.methods import build

images = whence.tensor_images(x, labels=labels.tolist())
task = whence.task_from_module(net, whence.Classifier(), images, images, root="run")
method = build("influence", task.forward, {"dim": 512})  # by its name: with the output that fits a classifier
own = whence.self_influence(method, task)
first = own.argsort(descending=True)[:30].numpy()
print(f"of the 30 with the highest self-influence {wrong[first].sum()} have a wrong label; by chance it would be 1 or 2")

# %% [markdown]
# ## With the neighbours
#
# `curated` makes the lists of `whence clean`. Of the labels it says how sure it is: the share of wrong labels, put at random, that its
# list would hold. That is counted on these very images; look whether it is true.

# %%
from whence.evaluation.curated import Model, curated

found = curated(images, model=Model("influence", "labels", own.numpy())).lists["mislabelled"]
print(found.what)
print(found.sure)
listed = np.zeros(600, bool)
listed[found.drop] = True
print(f"listed: {listed.sum()}; of them with a wrong label: {(listed & wrong).sum()}; wrong and not listed: {(~listed & wrong).sum()}")

# %%
for row in found.order[:5]:
    print(f"{images.ids[row]}: labelled {labels[row]}, is {data.target[row]}; {found.evidence[row]}")

# %% [markdown]
# ## What to believe
#
# A list is where to look first. Where classes look alike in pixels, as photos of cats and dogs do, the same vote lists many labels that
# are right; `whence clean --encoder` has a better eye, and `benchmarks/clean.py` counts how often such lists are right.
