"""A student of any task, for tests: of one step, which has learned nothing, and is made as any other."""

from __future__ import annotations

from pathlib import Path

import torch

from whence.diffusion.noise import key_of
from whence.features.distilling import Distillation, Side, fit
from whence.features.students import Student, encoder_named, features, set_of
from whence.types import Task, describe

ENCODERS = ("pixels", "representation")


def student_of(task: Task, folder: Path) -> str:
    """The folder of a student for the training images of a task, which reads pixels and representations."""
    point = task.trajectory[-1]
    phi = features(ENCODERS, task, task.train, point)
    side, scores = Side(phi, torch.tensor([key_of(one) for one in task.train.digests])), (phi @ phi.T).double()
    weights = fit(side, side, scores, scores, Distillation(hidden=1, width=8, steps=1))
    described = describe([encoder_named(name) for name in ENCODERS])
    notes = {"name": "", "train": set_of(task.train), "model": point.digest, "encoders_described": described}
    Student.of(weights, phi, task.train.digests, ENCODERS, notes).save(folder)
    return str(folder)
