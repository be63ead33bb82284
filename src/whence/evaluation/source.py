"""What a ledger retrains."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from whence.models import Model, encode_images
from whence.storage.files import read_json, write_json
from whence.task import folder_images, opened_with
from whence.training.checkpoints import known_custom_study, known_lora_study, study_of
from whence.training.study import CustomStudy, LoraStudy, Study
from whence.types import Images, WhenceError


@dataclass(frozen=True)
class Source:
    """What a ledger retrains: a model of `whence train`, or a LoRA or Custom Diffusion on one; kept beside the plan, so that
    the later commands find it again."""

    model: Path
    lora: Path | None
    custom_diffusion: Path | None
    caption_column: str

    @classmethod
    def read(cls, root: Path) -> Source:
        if not (root / "plan.json").is_file():
            raise WhenceError(f"{root} holds no plan.json; make one with `whence ledger plan`")
        found = read_json(root / "source.json")
        lora, custom = (found[name] and Path(found[name]) for name in ("lora", "custom_diffusion"))
        return cls(Path(found["model"]), lora, custom, found["caption_column"])

    def write(self, root: Path) -> None:
        paths = {"model": self.model, "lora": self.lora, "custom_diffusion": self.custom_diffusion}
        found = {name: path and str(path.resolve()) for name, path in paths.items()}
        write_json(root / "source.json", {**found, "caption_column": self.caption_column})

    @cached_property
    def opened(self) -> Model:
        return opened_with(self.model, None, self.custom_diffusion)

    def images(self, folder: Path, resolution: int | None, root: Path) -> Images:
        """As the network sees them; what is computed for that is kept in a folder."""
        pictures = folder_images(folder, resolution or self.opened.resolution, self.opened.channels, root)
        return encode_images(self.opened, pictures, root, caption_column=self.caption_column)

    def study(self, images: Images) -> Study | LoraStudy | CustomStudy:
        if self.lora is not None and self.custom_diffusion is not None:
            raise WhenceError("give a LoRA or a Custom Diffusion folder, not both")
        found: LoraStudy | CustomStudy | None
        if self.lora is not None:
            what, option, found = self.lora, "--lora", known_lora_study(self.model, self.lora, images)
        elif self.custom_diffusion is not None:
            what, option = self.custom_diffusion, "--custom_diffusion"
            found = known_custom_study(self.model, self.custom_diffusion, images)
        else:
            return study_of(self.model)
        if found is None:
            raise WhenceError(
                f"{what} was not made by `whence train {option}` from these images on {self.model}; only what was can be "
                "repeated"
            )
        return found
