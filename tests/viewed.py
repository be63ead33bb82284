"""Run folders to be looked at, made without a model, and a browser's questions without a browser."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from whence.data.images import ImageFolder, image_folder
from whence.features.rows import identity
from whence.methods.strongest import Collected
from whence.storage.files import write_json
from whence.storage.scores import save_scores
from whence.types import Scores
from whence.view.app import viewer_app
from whence.view.run import Run, open_run

TOKEN = "a-token_for.tests"
N, M = 40, 6


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        assert self.status == 200, self.body
        return json.loads(self.body)


@dataclass(frozen=True)
class Client:
    """Asks the application of some runs, as a browser would."""

    app: Any

    def __call__(
        self, path: str, method: str = "GET", host: str | None = "127.0.0.1:8700", token: str = TOKEN
    ) -> Answer:
        """The answer to a path below the token; one that begins with "//" is asked for as it is, without its first slash."""
        raw = path[1:] if path.startswith("//") else f"/{token}/{path}"
        return asyncio.run(self.ask(raw, method, [] if host is None else [(b"host", host.encode("latin-1"))]))

    async def ask(self, raw: str, method: str, headers: Sequence[tuple[bytes, bytes]]) -> Answer:
        path, _, query = raw.partition("?")
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode("utf-8", "surrogateescape"),
            "query_string": query.encode(),
            "root_path": "",
            "headers": list(headers),
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8700),
        }
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}  # type: ignore[assignment]
        return Answer(sent[0]["status"], headers, b"".join(part.get("body", b"") for part in sent[1:]))  # type: ignore[arg-type]


def client(*runs: Run) -> Client:
    return Client(viewer_app(runs, TOKEN))


def pictures(folder: Path, rows: Sequence[Mapping[str, object]], side: int = 8, seed: int = 0) -> ImageFolder:
    """Random pictures with their metadata; `file_name` names each."""
    rng = np.random.default_rng(seed)
    for row in rows:
        path = folder / str(row["file_name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)).save(path)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    return image_folder(folder)


def train_rows(n: int = N) -> list[dict[str, object]]:
    return [
        {
            "file_name": f"part/{i:03}.png",
            "creator": ["anna", "ben", "chloé", "d'Arcy"][i % 4],
            "license": ["CC0", "CC-BY"][i % 2],
            "text": f"a thing {i}",
            "size": i,
        }
        for i in range(n)
    ]


def scores_of(train: ImageFolder, queries: ImageFolder, seed: int = 0, errors: bool = True, **more: Any) -> Scores:
    """Random scores of images, with standard errors, whose recipe is of these images."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(len(queries), len(train), generator=draw)
    recipe = {"method": "made up", "seed": seed, "train": identity(train), "queries": identity(queries)}
    found = Scores(values, queries.ids, train.ids, recipe, "upweight", train_meta=train.meta)
    if errors:
        stderr = 0.02 + 0.2 * torch.rand(values.shape, generator=draw)
        found = replace(found, stderr=stderr, stderr_of="draws")
    return replace(found, **more)


def of_some(scores: Scores, rows: Sequence[int]) -> Scores:
    """The scores of some training images, as a run with candidates leaves them."""
    meta = {name: [column[row] for row in rows] for name, column in scores.train_meta.items()}
    recipe = {**scores.recipe, "scored": "x", "candidates": {"count": 2, "by": "alpha"}}
    stderr = None if scores.stderr is None else scores.stderr[:, list(rows)]
    ids, values = [scores.train_ids[row] for row in rows], scores.values[:, list(rows)]
    return replace(scores, values=values, train_ids=ids, train_meta=meta, recipe=recipe, stderr=stderr)


def of_ends(scores: Scores, k: int) -> Scores:
    """The first and last k of each query, as a run with --top leaves them."""
    collected = Collected(k, len(scores.query_ids), scores.signed, [], scores.train_ids)
    collected.add(slice(0, len(scores.train_ids)), scores.values.double())
    kept = of_some(scores, collected.rows().tolist())
    return replace(kept, recipe={**scores.recipe, "top": k}, whole=collected.whole(scores.reliability))


def note(root: Path, train: ImageFolder, queries: ImageFolder) -> None:
    """images.json as `whence attribute` writes it."""
    sides = {
        name: {
            "folder": str(images.folder.resolve()) if images.folder else "",
            "classes": images.classes,
            "pictures": identity(images),
            "seen": identity(images),
            **images.preprocess,
        }
        for name, images in (("train", train), ("queries", queries))
    }
    write_json(
        root / "images.json", {"format_version": 1, "model": {"folder": "model", "caption_column": None}, **sides}
    )


def written(root: Path, results: Mapping[str, Scores], train: ImageFolder, queries: ImageFolder) -> Path:
    """A finished run folder."""
    for name, scores in results.items():
        save_scores(root / "scores" / name, scores)
    note(root, train, queries)
    page = {"title": "Which images made these?", "facts": [["Model", "none"]], "methods": list(results), "files": {}}
    write_json(root / "report.json", page)
    return root


def plain_run(folder: Path, n: int = N, m: int = M) -> Path:
    """A run of two methods with errors, and one of candidates alone."""
    pictures(folder / "train", train_rows(n))
    queries = pictures(folder / "queries", [{"file_name": f"q{j}.png", "text": f"query {j}"} for j in range(m)], seed=1)
    train = image_folder(folder / "train", cache=folder / "run" / "digests.json")
    first = scores_of(train, queries)
    results = {
        "alpha": first,
        "beta": scores_of(train, queries, 1),
        "some": of_some(scores_of(train, queries, 2), [3, 9, n // 2]),
    }
    return written(folder / "run", results, train, queries)


def opened(folder: Path) -> Run:
    return open_run(plain_run(folder))
