"""How fast is the viewer with 100,000 training images and 1,000 pictures, and how much memory does it take?

    python benchmarks/view.py       about five minutes and 1.5 GB in runs/view; benchmarks/results/view.json

A run folder is made up: 100,000 PNG files of scikit-learn's digits with noise (a name, a caption, one of 200 creators and
of 5 licences), 1,000 pictures, and random scores by two methods, one of them with standard errors: 1.2 GB of numbers.
`whence view` is started on it as people start it, and asked as its page asks. Seconds of the clock; the machine is shared,
so the load that others put on it is noted, the start is tried three times, and marks hold for the median:

    start          from the command until its address is printed, which it does when everything is verified and open;
                   and the seconds of work of that, which is what counts where nobody else works
    first picture  from there until page, runs, first hundred names and the first thumbnail have come
    query          everything that the methods say of a picture (the answer that its page waits for), of 20 pictures
    page           the same in Chromium, where it is installed: from the click until the lists are in the document

Marks: start below 3 s, query and page below 0.3 s, memory (the largest resident size of the whole session) below 500 MB.
"""

import json
import os
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from _record import ROOT, RUNS, SMOKE, record
from whence.data.images import image_folder
from whence.features.rows import identity
from whence.storage.arrays import write_checked
from whence.storage.files import file_digest, write_json

N, M = (300, 6) if SMOKE else (100_000, 1_000)
ASKED = 3 if SMOKE else 20
CHROMIUM = Path("/usr/bin/chromium")
MARKS = {"start": 3.0, "query": 0.3, "memory_mb": 500}


def main():
    root = RUNS / "view"
    if not (root / "run" / "report.json").is_file():
        make(root)
    starts, work = [], []
    for _ in range(1 if SMOKE else 2):
        with serving(root / "run") as (process, _, start):
            starts.append(start)
            work.append(cpu_seconds(process.pid))
    with serving(root / "run") as (process, where, start):
        starts.append(start)
        ask = asking(where)
        begun = perf_counter()
        for path in ("", "static/main.js", "api/runs", "api/0/list/queries?start=0&limit=100", "thumb/0/queries/0"):
            ask(path)
        found = {"starts": starts, "cpu_of_starts": work, "first_picture": perf_counter() - begun}
        queries = [int(j) for j in np.linspace(1, M - 1, ASKED)]
        times = {
            "query": [ask(f"api/0/query/{j}?k=12") for j in queries],
            "agreement": [ask(f"api/0/agreement/{j}") for j in queries],
            "training image": [ask(f"api/0/image/{i}") for i in range(0, N, N // 3)],
            "creator": [ask(f"api/0/group/0/{code}") for code in range(3)],
            "search": [ask(f"api/0/list/train?words={word}&start=0&limit=100") for word in ("anna%20seven", "zzz")],
            "often first": [ask("api/0/list/train?sort=often:alpha&start=0&limit=100")],
            "scatter": [ask(f"api/0/row/{queries[0]}/0")],
            "thumbnail": [ask(f"thumb/0/train/{i}") for i in range(0, N, max(1, N // 300))],
        }
        page = pages(where, queries)
        memory = peak_mb(process.pid)
    told = {name: {"median": median(each), "longest": max(each)} for name, each in times.items()}
    kept = {
        "start": median(starts) < MARKS["start"],
        "query": told["query"]["median"] < MARKS["query"],
        "page": None if page is None else page["median"] < MARKS["query"],
        "memory_mb": memory < MARKS["memory_mb"],
    }
    size = {"training images": N, "pictures": M, "load_of_the_machine": os.getloadavg()}
    question = __doc__.splitlines()[0]
    record(
        "view",
        {
            "question": question,
            **size,
            **found,
            "page": page,
            "seconds": told,
            "memory_mb": memory,
            "marks": MARKS,
            "kept": kept,
        },
    )


def make(root):
    """The run folder, and the images that it is of."""
    digits = load_digits().images
    sides = {"train": N, "queries": M}
    for name, count in sides.items():
        pictures(root / name, count, digits, seed=len(name))
    train = image_folder(root / "train", cache=root / "run" / "digests.json")
    queries = image_folder(root / "queries")
    recipe = {"method": "made up", "train": identity(train), "queries": identity(queries)}
    draw = torch.Generator().manual_seed(0)
    for method in ("alpha", "beta"):
        folder = root / "run" / "scores" / method
        tensors = {"values": torch.randn(M, N, generator=draw)}
        if method == "alpha":
            tensors["stderr"] = 0.1 + 0.1 * torch.rand(M, N, generator=draw)
        write_checked(folder / "scores.safetensors", tensors)
        ids = {"query_ids": list(queries.ids), "train_ids": list(train.ids), "train_meta": train.meta}
        about = {
            "recipe": recipe,
            "scale": "upweight",
            "signed": True,
            "stderr_of": "draws" if method == "alpha" else "",
        }
        files = {"scores.safetensors": file_digest(folder / "scores.safetensors")}
        write_json(folder / "scores.json", {"format_version": 1, **about, **ids, "files": files})
    notes = {
        name: {
            "folder": f"../{name}",
            "classes": images.classes,
            "pictures": identity(images),
            "seen": identity(images),
            **images.preprocess,
        }
        for name, images in (("train", train), ("queries", queries))
    }
    write_json(root / "run" / "images.json", {"format_version": 1, "model": None, **notes})
    write_json(root / "run" / "report.json", {"title": "A large run", "facts": [], "methods": ["alpha", "beta"]})


def pictures(folder, count, digits, seed):
    """Digits with noise, a thousand to a folder, and what is known of them."""
    rng = np.random.default_rng(seed)
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    target, lines = load_digits().target, []
    for i in range(count):
        name = f"{i // 1000:03}/{i:06}.png"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = digits[i % len(digits)] * 15 + rng.integers(0, 16, (8, 8))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        said = f"the digit {names[target[i % len(target)]]}"
        who = f"{('anna', 'ben', 'chloe', 'dario')[i % 4]} {i % 200:03}"
        lines.append(json.dumps({"file_name": name, "text": said, "creator": who, "license": f"CC-{i % 5}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


@contextmanager
def serving(run):
    """`whence view RUN`: its process, its address, and the seconds until it said it."""
    command = [sys.executable, "-m", "whence.cli.main", "view", str(run), "--no_browser", "--port", "0"]
    begun = perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stdout is not None
        where = next(line for line in process.stdout if line.startswith("http")).strip()
        try:
            yield process, where, perf_counter() - begun
        finally:
            process.terminate()


def asking(where):
    """Asks for a path, and returns the seconds that it took."""

    def ask(path):
        begun = perf_counter()
        with urllib.request.urlopen(where + path) as answer:
            answer.read()
        return perf_counter() - begun

    return ask


def pages(where, queries):
    """Seconds from one picture's page to the next one's in a browser; None where there is none."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if not CHROMIUM.is_file():
        return None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(f"{where}#/0/pictures")
        page.wait_for_selector(".grid li")
        times = [page.evaluate(TURN, int(j) - 1) for j in queries]
        browser.close()
    return {"median": median(times) / 1000, "longest": max(times) / 1000}


TURN = """async (row) => {
  const begun = performance.now();
  const old = document.querySelector("h1");
  location.hash = `#/0/picture/${row}`;
  const there = () => document.querySelector("h1") !== old && document.querySelector(".entries li");
  while (!there() && performance.now() < begun + 20000) await new Promise((later) => setTimeout(later, 2));
  return performance.now() - begun;
}"""


def cpu_seconds(pid):
    """Seconds that a process has worked so far: what a start takes where nobody else works."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def peak_mb(pid):
    """The largest resident size of a process so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    assert (ROOT / "src").is_dir()
    main()
