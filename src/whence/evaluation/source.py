"""What a ledger retrains."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from whence.models import Adapter, CustomDiffusion, Lora, Model, encode_images, open_model
from whence.storage.files import read_json, write_json
from whence.task import folder_images
from whence.training.checkpoints import study_of, study_on
from whence.training.study import CustomStudy, LoraStudy, Study
from whence.types import Images, WhenceError


@dataclass(frozen=True)
class Source:
    """What a ledger retrains: a model of `whence train`, or a LoRA or Custom Diffusion on one; kept beside the plan, so that
    the later commands find it again."""

    model: Path
    adapter: Adapter | None
    caption_column: str

    @classmethod
    def read(cls, root: Path) -> Source:
        if not (root / "plan.json").is_file():
            raise WhenceError(f"{root} holds no plan.json; make one with `whence ledger plan`")
        found = read_json(root / "source.json")
        kinds = {kind.__name__: kind for kind in (Lora, CustomDiffusion)}
        adapter = found["adapter"] and kinds[found["adapter"]["is"]](Path(found["adapter"]["folder"]))
        return cls(Path(found["model"]), adapter, found["caption_column"])

    def write(self, root: Path) -> None:
        on = self.adapter and {"is": type(self.adapter).__name__, "folder": str(self.adapter.folder.resolve())}
        found = {"model": str(self.model.resolve()), "adapter": on, "caption_column": self.caption_column}
        write_json(root / "source.json", found)

    @cached_property
    def opened(self) -> Model:
        return open_model(self.model, self.adapter)

    def images(self, folder: Path, resolution: int | None, root: Path) -> Images:
        """As the network sees them; what is computed for that is kept in a folder."""
        pictures = folder_images(folder, resolution or self.opened.resolution, self.opened.channels, root)
        return encode_images(self.opened, pictures, root, caption_column=self.caption_column)

    def study(self, images: Images) -> Study | LoraStudy | CustomStudy:
        if self.adapter is None:
            return study_of(self.model)
        found = study_on(self.model, self.adapter, images)
        if found is None:
            option = "--lora" if isinstance(self.adapter, Lora) else "--custom_diffusion"
            raise WhenceError(
                f"{self.adapter.folder} was not made by `whence train {option}` from these images on {self.model}; only "
                "what was can be repeated"
            )
        return found
