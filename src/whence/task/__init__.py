"""From what people have to a task, its scores and its report.

request   model and folders, opened as a task        drawn     pictures that the model draws
modules   networks in memory                         reports   scores, written
"""

from whence.task.attribution import attribute
from whence.task.checks import check_methods
from whence.task.drawn import Sampling, claim_pictures, drawing, generated, kept_pictures, prompts_in, trajectory_of
from whence.task.judged import keep_judged
from whence.task.references import References
from whence.task.reports import REMOVED, TITLE, explain, report_again, write_report
from whence.task.request import (
    Request,
    folder_images,
    note_images,
    run_folder,
    task_from_module,
    task_from_pretrained,
)

__all__ = [
    "REMOVED",
    "TITLE",
    "References",
    "Request",
    "Sampling",
    "attribute",
    "check_methods",
    "claim_pictures",
    "drawing",
    "explain",
    "folder_images",
    "generated",
    "keep_judged",
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
