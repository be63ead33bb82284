"""Distilled retrieval (FastGDA): a student that was fitted to the ranking of a slow method (see `features.students`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from whence.features.students import Student, features, load_student
from whence.methods.errors import Stated, unmeasured
from whence.methods.inner_product import recorded
from whence.methods.registry import EMBEDS_FITTED, method
from whence.storage.files import file_digest
from whence.types import Scores, Task, WhenceError


@dataclass(frozen=True)
class Distilled:
    """Cosines of a student's embeddings.

    Args:
        student: its folder, as `whence distill` leaves it.
        name: in recipes.
    """

    student: str = ""
    name: str = "distilled"
    image_by_image = True

    def describe(self) -> dict[str, object]:
        """Name of the folder, and digest of what it says: of its weights, too."""
        if not self.student:
            return {"is": "Distilled", "student": "", "name": self.name}
        notes = file_digest(Path(self.student) / "student.json")[:32]
        return {"is": "Distilled", "student": Path(self.student).name, "digest": notes, "name": self.name}

    def opened(self) -> Student:
        """The student, read."""
        if not self.student:
            raise WhenceError(
                "a student is needed and none is given", self.name, "--set student=FOLDER, made by `whence distill`"
            )
        return load_student(self.student)

    def stated(self, task: Task) -> Stated:
        return Stated(because="how far another student of the same teacher would be is not known")

    def __call__(self, task: Task) -> Scores:
        student, point = self.opened(), task.trajectory[-1]
        student.check(task, point)
        phi = features(student.encoders, task, task.queries, point)
        values = student.scores(phi, task.to_score)
        return unmeasured(recorded(self, task, values, "rank", True, [(point, 1.0)]), self, task)


@method("Wang et al.", 2025, EMBEDS_FITTED, needs=("student",))
def distilled(student: str | Path = "") -> Distilled:
    """cos(g(q), g(i)), g a small network over features of an encoder, fitted so that it ranks the training images as a slow
    method does (Wang et al. 2025, FastGDA). A picture costs milliseconds; what it says is what the student learned of the
    teacher, and student.json says how much that was. Ranks alone: the numbers have no units.

    Args:
        student: folder of a student, made by `whence distill` from a run of the teacher on the same training images.
    """
    found = Distilled(str(student))
    if found.student:
        found.opened()
    return found
