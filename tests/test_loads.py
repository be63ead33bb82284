"""What is loaded: a network only when something is left to compute, and once per checkpoint; none for encoders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import refuses
from test_cli import World, succeeds, world  # noqa: F401
from test_doctor import pipeline as pipeline_folder
from whence.features.rows import Prepared
from whence.models import pipeline, weights

GRADIENTS = ("gradient_cosine", "influence", "trak")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that networks are loaded from."""
    found: list[Path] = []
    load = pipeline.load_network

    def loading(folder: Path) -> object:
        found.append(folder)
        return load(folder)

    monkeypatch.setattr(pipeline, "load_network", loading)
    Prepared.forget()
    return found


def of(*methods: str) -> list[str]:
    return [word for method in methods for word in ("--method", method)]


def words(world: World, run: Path, *methods: str) -> tuple[object, ...]:  # noqa: F811
    few = ("--query_data_dir", world.queries, "--draws", 2, "--dim", 8)
    return (*world.about(run), *few, *of(*methods))


def test_methods_on_one_feature_set_load_the_network_once(world: World, tmp_path, loads):  # noqa: F811
    succeeds(*words(world, tmp_path / "run", *GRADIENTS))
    assert len(loads) == 1


def test_a_finished_run_loads_nothing(world: World, tmp_path, loads):  # noqa: F811
    asked = (*words(world, tmp_path / "run", *GRADIENTS, "tracin", "das"), "--set", "residual=2")
    succeeds(*asked)
    loads.clear()
    Prepared.forget()
    succeeds(*asked)
    assert loads == []


def test_checkpoints_are_loaded_once_each_and_side(world: World, tmp_path, loads):  # noqa: F811
    succeeds(*words(world, tmp_path / "run", "tracin"))
    assert len(loads) == len(set(loads)) == 2


def test_what_is_left_to_compute_loads_what_it_needs(world: World, tmp_path, loads):  # noqa: F811
    run = tmp_path / "run"
    succeeds(*words(world, run, "trak"))
    next(run.glob("features/*/part-*.safetensors")).unlink()
    loads.clear()
    Prepared.forget()
    succeeds(*words(world, run, "trak"))
    assert len(loads) == 1


@pytest.mark.parametrize("method", ["pixel_dot", "pixel_cosine", "nda"])
def test_what_looks_at_pictures_loads_no_model(method, world: World, tmp_path, loads):  # noqa: F811
    succeeds(*world.about(tmp_path / "run"), "--query_data_dir", world.queries, *of(method))
    assert loads == []


def test_features_of_pictures_do_not_depend_on_the_checkpoint(world: World, tmp_path):  # noqa: F811
    succeeds(*world.about(tmp_path / "run"), "--query_data_dir", world.queries, *of("pixel_cosine"))
    manifests = [path.read_text() for path in (tmp_path / "run").glob("features/*/manifest.json")]
    assert len(manifests) == 2
    assert not any("checkpoint" in text for text in manifests)


def test_a_file_of_weights_is_read_once_and_again_only_to_name_what_is_wrong(tmp_path, monkeypatch):
    folder, again = pipeline_folder(tmp_path / "model") / "unet", []
    refuse = weights.refuse_infinite
    monkeypatch.setattr(weights, "refuse_infinite", lambda path: (again.append(path), refuse(path))[1])
    pipeline.load_network(folder)
    assert again == []
    file = folder / "diffusion_pytorch_model.safetensors"
    held = load_file(file)
    held["conv_in.bias"][0] = torch.inf
    save_file(held, file, {"format": "pt"})
    with refuses("1 weights hold NaN or Inf: conv_in.bias", where=str(file)):
        pipeline.load_network(folder)
    assert again == [folder]
    file.write_bytes(file.read_bytes()[:-8])
    with refuses("truncated or damaged", where=str(file)):
        pipeline.load_network(folder)
