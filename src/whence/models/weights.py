"""Files of weights: which of a folder are opened, and whether they are whole and finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from whence.data.layout import some
from whence.storage.files import is_beside, read_object
from whence.storage.opening import regular
from whence.types import WhenceError

NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # that diffusers and transformers open
WHOLE = ("I8", "U8")  # as safetensors names them; longer ones are positions and counts
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SAVE = "*.safetensors, without `variant`: save_pretrained(..., safe_serialization=True)"


def weight_files(folder: Path) -> list[Path]:
    """The files that are opened, whole or the shards of an index; a folder without any is refused."""
    for name in NAMES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            named = read_object(index).get("weight_map")
            shards = sorted({str(shard) for shard in named.values()}) if isinstance(named, dict) else []
            elsewhere = [shard for shard in shards if not is_beside(shard)]
            if elsewhere:  # an index may come from anywhere; it must not make us read files elsewhere
                raise WhenceError(f"names {elsewhere[0][:100]!r}", str(index), "files that lie beside it")
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing or not shards:
                told = f"names {some(missing)}, which is not there" if missing else "names no file"
                raise WhenceError(told, str(index), "all shards of the weights: download them again")
            return [folder / shard for shard in shards]
    inside = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    pickled = [name for name in inside if name.endswith(PICKLES)]
    if pickled and not any(name.endswith(".safetensors") for name in inside):
        raise WhenceError(f"only pickles, which whence never opens: {some(pickled)}", str(folder), SAVE)
    raise WhenceError(f"no weights that are opened (it holds {some(inside, 5) or 'nothing'})", str(folder), SAVE)


def refuse_damaged(folder: Path) -> None:
    """Refuse the weights of a folder that are cut short, damaged, or quantised to whole numbers, which would be read as if
    they were the weights. Only the beginning of each file is read."""
    for path in weight_files(folder):
        with _opened(path) as opened:
            whole = [name for name in opened.keys() if opened.get_slice(name).get_dtype() in WHOLE]  # noqa: SIM118
        if whole:
            told = f"{len(whole)} weights are whole numbers of 8 bits, quantised: {some(whole)}"
            raise WhenceError(told, str(path), "the weights as floating point numbers, as they were before")


def refuse_infinite(folder: Path) -> None:
    """Refuse the weights of a folder that are cut short, damaged, or hold NaN or Inf. The files are read from end to end."""
    for path in weight_files(folder):
        with _opened(path) as opened:
            bad = [name for name in opened.keys() if not finite(opened.get_tensor(name))]  # noqa: SIM118
        if bad:
            told = f"{len(bad)} weights hold NaN or Inf: {some(bad)}"
            raise WhenceError(told, str(path), "an earlier checkpoint: training diverged")


def refuse_loaded(network: nn.Module, folder: Path) -> None:
    """Refuse a network of which weights hold NaN or Inf; the files of its folder are read again only to name them."""
    if not all(finite(weight) for weight in network.state_dict().values() if weight.is_floating_point()):
        refuse_infinite(folder)


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with regular(path).open("rb") as file:
            pointer = file.read(24).startswith(b"version https://git-lfs")
        if pointer:
            raise WhenceError("a Git LFS pointer, not the weights", str(path), "the file: git lfs pull")
        with safe_open(path, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        accepted = "the whole file: copy or download it again"
        raise WhenceError(f"truncated or damaged ({error})", str(path), accepted) from None


def finite(weight: Tensor) -> bool:
    """Whether no number of it is NaN or Inf."""
    # Numbers of 8 bits know no isfinite.
    return bool(torch.isfinite(weight if weight.dtype.itemsize > 1 else weight.float()).all())
