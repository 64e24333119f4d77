"""SER30K (Liu et al., ACM MM 2022) as a sticker source: `Images/<theme>/*.jpg` with its annotations."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dataset_builders.schema import EMOTIONS
from dataset_builders.stickers.folder import SourceError, find_pictures, list_source, read_json
from dataset_builders.stickers.ingest import Found
from dataset_builders.stickers.pack import PackInfo, first_line


INFO = PackInfo(
    name="ser30k",
    version="1",
    licence="other",
    attribution="SER30K (Liu et al., SER30K: A Large-Scale Dataset for Sticker Emotion Recognition, ACM MM 2022), for academic use on request",
    source="SER30K",
)


class Annotation(BaseModel):
    """One row of an annotation file; `anno` counts the emotions from 1, `text` is what is written on the sticker."""

    model_config = ConfigDict(extra="ignore")

    topic: str
    file_name: str
    anno: int = Field(ge=1, le=len(EMOTIONS))
    text: str = ""


def is_ser30k(source: Path) -> bool:
    """Whether a folder is laid out like SER30K."""
    return (source / "Images").is_dir() and (source / "Annotations").is_dir()


def find_ser30k(source: Path) -> Iterator[Found]:
    """
    Stickers of an SER30K tree with their themes and emotions; a picture without annotation has no emotion.

    Args:
        source (`Path`): Folder with `Images/` and `Annotations/` (`train.json`, `val.json`, `test.json`, there or in `image-level/`).

    Raises:
        SourceError: If an annotation file is broken, naming file and row.

    """
    annotations: dict[str, Annotation] = {}
    for file in sorted((source / "Annotations").rglob("*.json")):
        content = read_json(file.read_bytes(), str(file))
        rows = content.get("annotations") if isinstance(content, dict) else content
        if not isinstance(rows, list):
            raise SourceError(f'{file}: expected a list under "annotations"')
        for number, row in enumerate(rows, 1):
            try:
                annotation = Annotation.model_validate(row)
            except ValidationError as error:
                raise SourceError(f"{file}: row {number}: {first_line(error)}") from error
            annotations[f"{annotation.topic}/{annotation.file_name}"] = annotation
    for item in find_pictures(list_source(source / "Images")):
        found = annotations.get(item.name)
        fields = {"theme": item.fields.get("theme")}
        if found is not None:
            fields["emotion"] = EMOTIONS[found.anno - 1]
            if found.text.strip():
                fields["tags"] = (found.text.strip(),)
        yield Found(item.name, item.read, fields)
