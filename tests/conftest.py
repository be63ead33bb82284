"""One thread, no progress bars: the same numbers and the same log on every machine.

`pytest -m "not slow"` leaves out the files below, whose laws run over every method, family or training: for daily work.
"""

import errno
import gc
import os
import socket

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WHENCE_QUIET"] = "1"

import pytest
import torch

torch.set_num_threads(1)


def _not_waited_for(file: int) -> None:
    """In place of os.fsync: no test cuts the power. That a killed process loses nothing, and what is done where the disk
    refuses, does not depend on the waiting; processes that are started by tests do wait."""


os.fsync = _not_waited_for


def _unreachable(self: socket.socket, address: object) -> None:
    """In place of `connect`: there is no network, but for processes of this machine."""
    if self.family == socket.AF_UNIX or (
        isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1", "localhost")
    ):
        return _connect(self, address)
    raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))


_connect, socket.socket.connect = socket.socket.connect, _unreachable
gc.set_threshold(20_000, 20, 20)  # most of the objects are those of torch, transformers and pytest, and stay

SLOW = {
    "test_autoencoders", "test_banks", "test_captum", "test_checkpoints", "test_cli", "test_contract",
    "test_curvature", "test_custom", "test_das", "test_declared", "test_doctor_knows", "test_doctor_latents",
    "test_drawing", "test_encode", "test_families_contract", "test_files_fuzz", "test_formulas", "test_inputs_fuzz",
    "test_journey", "test_kfac", "test_kronfluence", "test_ledger", "test_loads", "test_lora_files", "test_lora_fuzz",
    "test_memory", "test_preview", "test_readme", "test_replay", "test_replay_scores", "test_shapes", "test_store",
    "test_text", "test_training", "test_traker", "test_tuning", "test_unroll",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker(pytest.mark.slow)
    # The long ones first, and before them the one that is a single test, so that processes end together.
    items.sort(key=lambda item: (item.path.stem != "test_scripts", item.get_closest_marker("slow") is None))


def pytest_collection_finish() -> None:
    """What is there before the first test is not looked through again by every collection of garbage."""
    gc.collect()
    gc.freeze()
