"""From what people have to a task, its scores and its report.

request   model and folders, opened as a task        drawn     pictures that the model draws
modules   networks in memory                         reports   scores, written
"""

from whence.task.drawn import Sampling, claim_pictures, drawing, generated, kept_pictures, prompts_in, trajectory_of
from whence.task.references import References
from whence.task.reports import REMOVED, explain, report_again, write_report
from whence.task.request import (
    Request,
    attribute,
    folder_images,
    note_images,
    run_folder,
    task_from_module,
    task_from_pretrained,
)

__all__ = [
    "REMOVED",
    "References",
    "Request",
    "Sampling",
    "attribute",
    "claim_pictures",
    "drawing",
    "explain",
    "folder_images",
    "generated",
    "kept_pictures",
    "note_images",
    "prompts_in",
    "report_again",
    "run_folder",
    "task_from_module",
    "task_from_pretrained",
    "trajectory_of",
    "write_report",
]
