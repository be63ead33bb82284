"""LoRA similarity: the cosine of dW formed in full, whatever dW was split into, whoever wrote it and what lies beside it."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from agreement import close
from errors import refuses
from test_cli import refused, succeeds, whence
from test_lora import diffusers_lora, peft_lora
from whence.evaluation.loras import KINDS, Relations, labelled, nearest, products, relations
from whence.evaluation.related import pairs, related, tree
from whence.models.lora_changes import Change, changes, lora_collection

SHAPES = {
    "network a": (6, 5),
    "network conv": (4, 3, 3, 3),
    "text_encoder b": (3, 7),
    "network c": (5, 5),
    "network rare": (2, 3),
}
USUAL = tuple(SHAPES)[:4]
Lora = dict[str, Change]


def made(seed: int, layers: tuple[str, ...] = USUAL, rank: int = 2, common: float = 0.0) -> Lora:
    """A LoRA of normal numbers in float64. common: how much of it all have."""
    g, same = (torch.Generator().manual_seed(s) for s in (seed + 1, 0))
    found = {}
    for layer, shape in SHAPES.items():
        inputs = int(np.prod(shape[1:]))
        B, A = (torch.randn(*size, generator=g, dtype=torch.float64) for size in ((shape[0], rank), (rank, inputs)))
        b, a = (torch.randn(*size, generator=same, dtype=torch.float64) for size in ((shape[0], 1), (1, inputs)))
        if common:
            B, A = torch.cat([B, common * b], 1), torch.cat([A, common * a])
        if layer in layers:
            found[layer] = Change(B, A, 0.5 + seed % 3, shape)
    return found


def whole(change: Change) -> Tensor:
    return change.scale * (change.B @ change.A)


def by_hand(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The cosine over the layers of both."""
    shared = sorted(a.keys() & b.keys())
    x, y = (torch.cat([each[layer].flatten() for layer in shared]) for each in (a, b))
    return float(x @ y / (x.norm() * y.norm()))


def formed(loras: Mapping[str, Lora], collection: tuple[str, ...] | None = None) -> dict[str, np.ndarray]:
    """Both kinds, dW formed in full."""
    plain = [{layer: whole(change) for layer, change in lora.items()} for lora in loras.values()]
    inside = [each for name, each in zip(loras, plain, strict=True) if collection is None or name in collection]
    means = {}
    for layer in SHAPES:
        having = [each[layer] for each in inside if layer in each]
        if len(having) >= 3:
            means[layer] = torch.stack(having).mean(0)
    centred = [{layer: w - means[layer] for layer, w in each.items() if layer in means} for each in plain]
    return {
        kind: np.array([[by_hand(a, b) for b in each] for a in each])
        for kind, each in (("plain", plain), ("centred", centred))
    }


MIXED = {
    "all": made(0, tuple(SHAPES), common=1.0),
    "rank 1": made(1, rank=1, common=0.5),
    "rank 5": made(2, rank=5, common=2.0),
    "network": made(3, ("network a", "network conv"), common=1.0),
    "three": made(4, ("network a", "text_encoder b", "network c", "network rare")),  # of the last, two have no mean
}


def test_equal_to_the_cosine_of_what_is_formed_in_full():
    """Convolutions, text encoders, other ranks and scales, layers that only some have; in float64."""
    found, expected = relations(MIXED), formed(MIXED)
    for kind in KINDS:
        close(found.of(kind), expected[kind], 1e-10)
    assert not found.reasons
    names = list(MIXED)
    a, b = names.index("all"), names.index("network")
    assert (found.shared[a, b], found.shared[a, a], found.shared[b, b]) == (2, 5, 2)
    sizes = {layer: float(whole(change).square().sum()) for layer, change in MIXED["all"].items()}
    close([found.norms[a] ** 2], [sum(sizes.values())], 1e-10)
    close([found.coverage[a, b]], [(sizes["network a"] + sizes["network conv"]) / sum(sizes.values())], 1e-10)
    close([found.coverage[b, a]], [1.0], 1e-10)


def test_the_mean_is_that_of_the_collection():
    """Of another one that is asked about, nothing is in it."""
    some = tuple(MIXED)[:4]
    close(relations(MIXED, some).of("centred"), formed(MIXED, some)["centred"], 1e-10)


def test_it_does_not_depend_on_how_the_change_was_split():
    """(B R^-1)(R A); a larger rank that is not used; a scale of B instead of one beside it."""
    g = torch.Generator().manual_seed(9)

    def turned(change: Change) -> Change:
        R = torch.randn(len(change.A), len(change.A), generator=g, dtype=torch.float64)
        return Change(change.B @ torch.linalg.inv(R), R @ change.A, change.scale, change.shape)

    def padded(change: Change) -> Change:
        zeros = torch.zeros(len(change.B), 3, dtype=torch.float64)
        return Change(
            torch.cat([change.B, zeros], 1),
            torch.cat([change.A, change.A[:1].repeat(3, 1)]),
            change.scale,
            change.shape,
        )

    def scaled(change: Change) -> Change:
        return replace(change, B=change.B * change.scale, scale=1.0)

    expected = relations(MIXED)
    for way in (turned, padded, scaled):
        found = relations({name: {k: way(change) for k, change in lora.items()} for name, lora in MIXED.items()})
        for kind in KINDS:
            close(found.of(kind), expected.of(kind), 1e-9)


def test_strength_does_not_matter_and_the_sign_does():
    a = made(0)
    doubled = {layer: replace(change, scale=7 * change.scale) for layer, change in a.items()}
    against = {layer: replace(change, scale=-change.scale) for layer, change in a.items()}
    found = relations({"a": a, "doubled": doubled, "against": against}).of("plain")
    close(found, [[1, 1, -1], [1, 1, -1], [-1, -1, 1]], 1e-12)


def test_neither_order_nor_company_matter():
    found, names = relations(MIXED), list(MIXED)
    turned = relations({name: MIXED[name] for name in reversed(names)})
    for kind in KINDS:
        close(turned.of(kind)[::-1, ::-1], found.of(kind), 1e-12)
    less = relations({name: MIXED[name] for name in names[1:3]})
    close(less.of("plain"), found.of("plain")[1:3, 1:3], 1e-12)


def test_many_ranks_are_multiplied_in_pieces(monkeypatch):
    alike = [made(seed, ("network a",), rank=1 + seed % 4)["network a"] for seed in range(9)]
    expected = products(alike)
    for most in (1, 5, 7):
        monkeypatch.setattr("whence.evaluation.loras.RANKS", most)
        for found, whole_ in zip(products(alike), expected, strict=True):
            close(found, whole_, 1e-12)


def test_too_few_for_a_mean_are_refused():
    two = {name: MIXED[name] for name in ("all", "three")}
    with refuses("the mean of 2 LoRAs", "--similarity centred", "3 or more"):
        relations(two).of("centred")
    with refuses("1 LoRAs", accepted="2 or more"):
        relations({"all": MIXED["all"]})


# ------------------------------------------------------------------------------------------------ what cannot be compared


def test_what_changes_nothing_is_named_and_is_no_nan():
    """B = 0; B A = 0 though neither is; and zero only where two meet."""
    zero = {layer: replace(change, B=torch.zeros_like(change.B)) for layer, change in made(1).items()}
    cancelled = {
        layer: replace(change, B=torch.cat([change.B, -change.B], 1), A=torch.cat([change.A, change.A]))
        for layer, change in made(2).items()
    }
    partly = {layer: change if layer == "network c" else zero[layer] for layer, change in made(3).items()}
    loras = {
        "zero": zero,
        "cancelled": cancelled,
        "partly": partly,
        "a": made(5),
        "b": made(6),
        "network": MIXED["network"],
    }
    found = relations(loras)
    names = list(loras)
    assert found.norms[:2].tolist() == [0, 0]
    assert np.isnan(found.of("plain")[:2]).all()
    assert nearest(found.of("plain")).tolist()[:2] == [-1, -1]
    told = {(names[i], names[j]): why for (i, j), why in found.reasons.items()}
    assert told["zero", "a"] == "zero changes nothing"
    assert told["cancelled", "network"] == "cancelled changes nothing"
    assert told["partly", "network"] == "partly changes none of the layers that they share"
    assert ("partly", "a") not in told
    # They are no part of the mean, either.
    alone = relations({name: loras[name] for name in names[2:]}).of("centred")
    close(np.nan_to_num(found.of("centred")[2:, 2:], nan=9), np.nan_to_num(alone, nan=9), 1e-12)


def test_other_bases_and_other_layers_are_named():
    """A layer of the same name with another shape; none in common. Both can be compared with those that they fit."""
    other = made(1) | {"network a": Change(torch.ones(6, 1), torch.ones(1, 9), 1.0, (6, 9))}
    loras = {"sd 1": made(0), "sd 2": other, "c": made(2, ("network c",)), "text": made(3, ("text_encoder b",))}
    found, names = relations(loras), list(loras)
    told = {(names[i], names[j]): why for (i, j), why in found.reasons.items()}
    assert told.keys() == {("sd 1", "sd 2"), ("c", "text")}
    assert told["sd 1", "sd 2"] == "they are for other bases: network a is [6, 5] in one and [6, 9] in the other"
    assert told["c", "text"] == "they have no layer in common"
    turned = relations({name: loras[name] for name in reversed(names)})
    assert set(turned.reasons.values()) == set(told.values()), "one reason is not two where the LoRAs stand otherwise"
    assert np.isfinite(found.of("plain")).sum() == 12


def test_the_mean_itself_has_no_direction():
    same = {name: made(0) for name in "abc"}
    assert np.isnan(relations(same).of("centred")).all()
    close(relations(same).of("plain"), np.ones((3, 3)), 1e-12)


# ----------------------------------------------------------------------------------------------------------------- labels


def test_neighbours_tell_labels():
    """By hand: a neighbour each, how many are right, what chance has, and all ways to shuffle four labels."""
    cosine = np.array([[1, 0.9, 0.1, 0.2], [0.9, 1, 0.3, 0.1], [0.1, 0.3, 1, 0.25], [0.2, 0.1, 0.25, 1]])
    labels = ["x", "x", "y", "y"]
    assert nearest(cosine).tolist() == [1, 0, 1, 2]
    found = labelled(cosine, labels)
    assert (found.correct, found.count, found.labels) == (3, 4, 2)
    assert found.chance == pytest.approx(4 / 3)
    ways = [sum(way[i] == way[j] for i, j in enumerate([1, 0, 1, 2])) for way in permutations(labels)]
    assert found.p == pytest.approx(np.mean(np.array(ways) >= 3))


def test_those_without_label_or_neighbour_do_not_count():
    cosine = np.full((6, 6), np.nan)
    cosine[:4, :4] = [[1, 0.9, 0.1, 0.2], [0.9, 1, 0.3, 0.1], [0.1, 0.3, 1, 0.25], [0.2, 0.1, 0.25, 1]]
    cosine[4, :4] = cosine[:4, 4] = 0.99  # the nearest of all has no label
    found = labelled(cosine, ["x", "x", "y", "y", None, "y"])
    assert (found.correct, found.count) == (3, 4)
    assert found.chance == pytest.approx(4 / 3)


def test_labels_at_random_are_at_chance():
    g = np.random.default_rng(0)
    ps, shares = [], []
    for _ in range(60):
        rows = g.normal(size=(12, 30))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        found = labelled(rows @ rows.T, [*"abc" * 4])
        ps.append(found.p)
        shares.append(found.correct / found.chance)
    assert np.mean(shares) == pytest.approx(1, abs=0.2)
    assert np.mean(np.array(ps) <= 0.1) <= 0.2


@pytest.mark.parametrize("labels", [["x"] * 3, ["x", "y", "z"], [None] * 3, ["x", "x", None]], ids=str)
def test_labels_that_cannot_be_asked_about_are_refused(labels):
    with refuses("labels of", accepted="2 labels or more"):
        labelled(np.eye(3), labels)


def test_the_tree_puts_relatives_side_by_side():
    groups = np.array([0, 1, 0, 1, 0, 2])
    cosine = np.where(np.equal.outer(groups, groups), 0.8, 0.1)
    cosine[5] = cosine[:, 5] = np.nan
    links, order = tree(cosine)
    assert len(links) == 4
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert groups[order].tolist() in ([0, 0, 0, 1, 1], [1, 1, 0, 0, 0])


# ------------------------------------------------------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """One change, as diffusers, peft (alpha and rank, and use_rslora) and kohya write it."""
    root = tmp_path_factory.mktemp("writers")
    diffusers_lora(root / "diffusers")
    peft_lora("sd", root / "peft")
    peft_lora("sd", root / "rslora", use_rslora=True)
    peft_lora("sd", root / "rank", r=4, lora_alpha=1)
    return root


def test_scales_and_names_of_every_writer(written, tmp_path):
    """The same A and B: 3/2, 3/sqrt(2), and kohya's names with alpha, once for half the layers a third as strong."""
    every = {path.name: changes(path) for path in written.iterdir()}
    a, peft, rslora = every["diffusers"], every["peft"], every["rslora"]
    assert a.keys() == peft.keys() == rslora.keys() == every["rank"].keys()
    layer = next(iter(peft))
    assert (peft[layer].scale, rslora[layer].scale) == (1.5, 3 / 2**0.5)
    tensors = {}
    for i, (name, change) in enumerate(sorted(peft.items())):
        key = f"lora_unet_{name.removeprefix('network ')}"
        tensors |= {f"{key}.lora_down.weight": change.A.clone(), f"{key}.lora_up.weight": change.B.clone()}
        tensors[f"{key}.alpha"] = torch.tensor(3.0 if i % 2 else 1.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    kohya = changes(tmp_path / "kohya.safetensors")
    found = relations({"peft": peft, "rslora": rslora, "kohya": kohya, "rank": every["rank"]})
    expected = formed_any({"peft": peft, "rslora": rslora, "kohya": kohya, "rank": every["rank"]})
    close(found.of("plain"), expected, 1e-10)
    assert found.of("plain")[0, 1] == pytest.approx(1, abs=1e-12)
    assert found.of("plain")[0, 2] < 0.99


def formed_any(loras: Mapping[str, Lora]) -> np.ndarray:
    every = [
        {name: change.scale * (change.B.double() @ change.A.double()) for name, change in lora.items()}
        for lora in loras.values()
    ]
    return np.array([[by_hand(a, b) for b in every] for a in every])


def save(path: Path, seed: int, layers: Mapping[str, tuple[int, ...]], rank: int = 2, zero: bool = False) -> Path:
    """A LoRA as diffusers writes it. layers: shapes of the weights, by name with its part."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in layers.items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, *shape[1:], generator=g)
        up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=g)
        tensors[f"{name}.lora_B.weight"] = 0 * up if zero else up
    file = path if path.suffix else path / "pytorch_lora_weights.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)
    return path


UNET = {"unet.a.to_k": (6, 5), "unet.a.conv": (4, 3, 3, 3), "text_encoder.text_model.layers.0.q_proj": (4, 4)}


def test_convolutions_and_text_encoders_of_files(tmp_path):
    one, two = (changes(save(tmp_path / f"{seed}.safetensors", seed, UNET)) for seed in (0, 1))
    assert {name: change.shape for name, change in one.items()} == {
        "network a_to_k": (6, 5),
        "network a_conv": (4, 3, 3, 3),
        "text_encoder layers_0_q_proj": (4, 4),
    }
    conv, A = one["network a_conv"], torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    assert conv.A.shape == (2, 27)
    assert A.shape == (2, 3, 3, 3)
    close(relations({"one": one, "two": two}).of("plain"), formed_any({"one": one, "two": two}), 1e-10)


def test_a_kernel_in_b_is_refused(tmp_path):
    save_file({"unet.a.lora_A.weight": torch.ones(2, 3, 1, 1), "unet.a.lora_B.weight": torch.ones(4, 2, 3, 3)},
              tmp_path / "x.safetensors")  # fmt: skip
    with refuses("B is [4, 2, 3, 3]", "x.safetensors: a", "B of 1x1"):
        changes(tmp_path / "x.safetensors")


def test_what_lies_in_a_folder(tmp_path):
    """Folders of diffusers and peft count as one LoRA, with all in them; other files each by itself."""
    save(tmp_path / "cats" / "one", 0, UNET)
    save(tmp_path / "cats" / "one" / "checkpoint-5", 0, UNET)
    save(tmp_path / "cats" / "two.safetensors", 1, UNET)
    save(tmp_path / "dogs.safetensors", 2, UNET)
    save(tmp_path / ".cache" / "x.safetensors", 2, UNET)
    (tmp_path / "old.bin").write_bytes(b"\x80\x04")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("hello")
    found = lora_collection(tmp_path)
    assert list(found.loras) == ["cats/one", "cats/two.safetensors", "dogs.safetensors"]
    assert found.others.keys() == {"old.bin", "empty/"}
    assert found.inside == ("cats/one/checkpoint-5/pytorch_lora_weights.safetensors",)
    with refuses("it is one LoRA", "one", "a folder of several"):
        lora_collection(tmp_path / "cats" / "one")
    with refuses("there is no such folder"):
        lora_collection(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two LoRAs of each of three makers, which have something in common; and one that changes nothing."""
    g = torch.Generator().manual_seed(0)
    for k, maker in enumerate(("anna", "ben", "carl")):
        base = {
            name: (torch.randn(4, shape[1], generator=g), torch.randn(shape[0], 4, generator=g))
            for name, shape in FLAT.items()
        }
        for seed in range(2):
            tensors = {}
            for name, (A, B) in base.items():
                noise = torch.Generator().manual_seed(10 * k + seed)
                tensors[f"{name}.lora_A.weight"] = A + 0.3 * torch.randn(A.shape, generator=noise)
                tensors[f"{name}.lora_B.weight"] = B
            at = tmp_path / "loras" / maker / f"{seed}.safetensors"
            at.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, at)
    return tmp_path / "loras"


FLAT = {"unet.a.to_k": (6, 5), "unet.b.to_v": (7, 9)}


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_neighbours_labels_and_files(folder, tmp_path):
    out = tmp_path / "out"
    done = succeeds("loras", folder, "--output_dir", out)
    assert "anna/0.safetensors (anna): nearest anna/1.safetensors (anna), cosine 0.9" in done.out
    assert "6 of 6 have a nearest neighbour with their label (3 labels); chance has 1.2, p = 0.067" in done.out
    told = json.loads((out / "loras.json").read_text())
    assert told["labels"]["correct"] == told["labels"]["count"] == 6
    assert told["unread"] == {}
    makers = [name.split("/")[0] for name in told["order"]]
    assert makers[0::2] == makers[1::2]
    every = {row["lora"]: row for row in rows(out / "loras.csv")}
    assert {row["nearest_label"] == row["label"] for row in every.values()} == {True}
    matrix = rows(out / "plain.csv")
    pair = next(
        row
        for row in rows(out / "pairs.csv")
        if (row["lora"], row["other"]) == ("anna/0.safetensors", "ben/1.safetensors")
    )
    cell = next(row for row in matrix if row[""] == "anna/0.safetensors")["ben/1.safetensors"]
    assert float(cell) == float(pair["plain"])
    found = related(folder)
    assert float(cell) == found.relations.of("plain")[0, 3]
    assert Image.open(out / "loras.png").size[0] > 300
    kept = {path: path.read_bytes() for path in out.iterdir()}
    assert succeeds("loras", folder, "--output_dir", out).out == done.out
    assert {path: path.read_bytes() for path in out.iterdir()} == kept


def test_a_lora_that_is_asked_about(folder, tmp_path):
    """From elsewhere, or one of them; it is no part of the mean and has no label."""
    asked = tmp_path / "asked.safetensors"
    (folder / "ben" / "1.safetensors").rename(asked)
    out = tmp_path / "out"
    done = succeeds("loras", folder, "--query", asked, "--output_dir", out)
    assert f"{asked}: nearest ben/0.safetensors (ben)" in done.out
    best, *others = rows(out / "query.csv")
    assert (best["lora"], best["other"]) == (str(asked), "ben/0.safetensors")
    assert len(others) == 4
    inside = related(folder, folder / "ben" / "0.safetensors")
    assert inside.query == "ben/0.safetensors"
    assert len(inside.relations.names) == 5
    close(related(folder, asked).relations.of("centred")[:5, :5], inside.relations.of("centred"), 1e-12)
    assert pairs(inside, "ben/0.safetensors")["lora"] == ["ben/0.safetensors"] * 4
    succeeds("loras", folder, "--output_dir", out)
    assert not (out / "query.csv").exists(), "of the question before"


def test_one_that_has_nothing_to_do_with_them_gets_no_label(folder, tmp_path):
    """Whatever its nearest neighbour is called: it is no nearer than LoRAs of different labels are to each other."""
    layers = {"unet.a.to_k": (6, 5), "unet.b.to_v": (7, 9)}
    told = [
        succeeds(
            "loras",
            folder,
            "--query",
            save(tmp_path / f"{seed}.safetensors", seed, layers),
            "--output_dir",
            tmp_path / "o",
        ).out
        for seed in range(100, 112)
    ]
    unknown = ["is no nearer to any of them" in text for text in told]
    assert any(unknown)
    near = tmp_path / "near.safetensors"
    near.write_bytes((folder / "ben" / "1.safetensors").read_bytes())
    (folder / "ben" / "1.safetensors").unlink()
    assert "is no nearer" not in succeeds("loras", folder, "--query", near, "--output_dir", tmp_path / "p").out


def test_labels_of_a_file(folder, tmp_path):
    file = tmp_path / "labels.csv"
    names = list(lora_collection(folder).loras)
    file.write_text("lora,label\n" + "".join(f"{name},{'xxyyz'[i]}\n" for i, name in enumerate(names[:5])))
    done = succeeds("loras", folder, "--labels", file, "--output_dir", tmp_path / "out")
    assert "4 of 5 have a nearest neighbour with their label (3 labels)" in done.out
    assert "LoRAs without a label, which count for none: 1" in done.out
    for text, says in {
        "lora;label\n": "its columns are lora;label",
        "lora,label\nnobody,x\n": "there is no LoRA 'nobody'",
        f"lora,label\n{names[0]},\n": "has no label",
        f"lora,label\n{names[0]},x\n{names[0]},y\n": "has two labels",
        f"lora,label\n{names[0]},x\n": "1 labels of 1 LoRAs",
    }.items():
        file.write_text(text)
        refused("loras", folder, "--labels", file, "--output_dir", tmp_path / "out", says=says)
    refused("loras", folder, "--labels", tmp_path / "none.csv", "--output_dir", tmp_path / "out", says="no such file")


def test_what_cannot_be_read_or_compared_is_named_and_counted(folder, tmp_path):
    """Damaged, cut, another kind, a pickle, NaN, B = 0, another base: one line each, and the others as before."""
    expected = related(folder)
    whole_ = (folder / "anna" / "0.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole_[: len(whole_) // 2])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "old.ckpt").write_bytes(b"\x80\x04.")
    save_file({"unet.a.lora_magnitude_vector": torch.ones(3)}, folder / "dora.safetensors")
    save_file({"unet.a.lora_A.weight": torch.full((2, 3), torch.nan), "unet.a.lora_B.weight": torch.ones(3, 2)},
              folder / "nan.safetensors")  # fmt: skip
    save(folder / "zero.safetensors", 0, FLAT, zero=True)
    save(folder / "xl.safetensors", 0, {"unet.a.to_k": (6, 11)})
    out = tmp_path / "out"
    done = succeeds("loras", folder, "--output_dir", out)
    notes = {row["lora"]: row["note"] for row in rows(out / "loras.csv") if row["note"]}
    assert notes.keys() == {"cut.safetensors", "empty.safetensors", "old.ckpt", "dora.safetensors", "nan.safetensors",
                            "zero.safetensors", "xl.safetensors"}  # fmt: skip
    for name, word in {
        "cut": "damaged",
        "empty": "damaged",
        "dora": "DoRA",
        "nan": "NaN",
        "zero": "changes nothing",
    }.items():
        assert word in notes[f"{name}.safetensors"]
    assert "a_to_k is [6, 5] in one and [6, 11] in the other" in notes["xl.safetensors"]
    assert "pickle" in notes["old.ckpt"]
    assert "left out, since not read: 5 (" in done.out
    assert "pairs that cannot be compared: 13, such as " in done.out
    told = json.loads((out / "loras.json").read_text())
    assert len(told["unread"]) == 5
    assert len(told["not_compared"]) == 13
    found = related(folder)
    close(found.relations.of("plain")[:6, :6], expected.relations.of("plain"), 1e-12)
    assert found.told == expected.told


def test_bases_that_loras_tell_of_are_compared_with_a_warning(tmp_path):
    for k, base in enumerate(("sd-1", "sd-2")):
        peft_lora("sd", tmp_path / "loras" / str(k))
        config = tmp_path / "loras" / str(k) / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
    warns = r"2 bases: sd-1 \(0\), sd-2 \(1\); if these differ"
    done = succeeds("loras", tmp_path / "loras", "--output_dir", tmp_path / "out", warns=warns)
    assert "pairs that change the same, up to strength: 1 (0 = 1)" in done.out


def test_mistakes_are_told(folder, tmp_path):
    out = ("--output_dir", tmp_path / "out")
    refused("loras", tmp_path / "nowhere", *out, says="there is no such folder")
    refused("loras", folder, "--query", tmp_path / "nothing", *out, says="does not exist")
    refused("loras", folder, "--similarity", "cosine", *out, says="accepted: plain, centred")
    (tmp_path / "few").mkdir()
    save(tmp_path / "few" / "one.safetensors", 0, FLAT)
    (tmp_path / "few" / "two.safetensors").write_bytes(b"no")
    done = whence("loras", tmp_path / "few", *out)
    assert done.code == 2
    assert "1 LoRAs in it can be read; two.safetensors: " in done.err
    save(tmp_path / "few" / "two.safetensors", 1, FLAT)
    refused("loras", tmp_path / "few", "--similarity", "centred", *out, says="the mean of 2 LoRAs")
    assert not (tmp_path / "out").exists()


def test_relations_are_of_their_names():
    found = relations(MIXED)
    assert isinstance(found, Relations)
    assert found.names == tuple(MIXED)
