"""StickerConv as a `datasets` builder."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from dataset_builders.stickerconv.features import FEATURES, turn_rows
from dataset_builders.stickerconv.inputs import (
    KnownStickers,
    SplitCheck,
    known_openmoji,
    known_stickers,
    open_pack,
    read_rows,
    sticker_rows,
)
from dataset_builders.stickerconv.sessions import load_openers
from dataset_builders.stickerconv.sources import Shard, Source, find_sources, split_into_shards, splits_in


SHARDS = 16  # parts of a file that processes can share
logger = datasets.logging.get_logger(__name__)


@dataclass
class StickerConvConfig(datasets.BuilderConfig):
    """
    What to build; `data_dir` or `data_files` say from which dialogues, the shipped ones if neither is given.

    Args:
        stickers (`str`, *optional*, defaults to `"openmoji"`): The pack that the sessions use: `openmoji` or a folder.
        images (`str`, *optional*): For the released StickerConv, an SER30K tree with its pictures.
        skip_bad (`bool`, *optional*, defaults to `False`): Leave rows that are wrong out, with a warning, instead of stopping.

    """

    stickers: str = "openmoji"
    images: str | None = None
    skip_bad: bool = False

    def create_config_id(self, config_kwargs: dict, custom_features: datasets.Features | None = None) -> str:
        """The cache's key: another one when the pack, or its databases, have changed."""
        files = [Path(self.stickers) / name for name in ("stickers.parquet", "databases.parquet")]
        states = [(file.stat().st_size, file.stat().st_mtime_ns) if file.is_file() else None for file in files]
        changed = {"stickers": f"{self.stickers}@{states}"} if any(states) else {}
        return super().create_config_id(config_kwargs | changed, custom_features)


class StickerConv(datasets.GeneratorBasedBuilder):
    """
    Dialogue sessions with stickers (section 3.7): `mini` and `sessions` a row each, `turns` a row a System turn, `stickers` with their pictures; and `openers`, first
    exchanges for training.
    """

    BUILDER_CONFIG_CLASS = StickerConvConfig
    BUILDER_CONFIGS = [
        StickerConvConfig(name="mini", description="StickerConv-mini, a row a session."),
        StickerConvConfig(
            name="openers", description="What people say first, with plain and warm replies, for training."
        ),
        StickerConvConfig(name="sessions", description="A row a session."),
        StickerConvConfig(name="turns", description="A row a System turn with all that was said before."),
        StickerConvConfig(name="stickers", description="The stickers, each picture once."),
    ]
    DEFAULT_CONFIG_NAME = "mini"

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES[self.config.name])

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        files = [file for files in (self.config.data_files or {}).values() for file in files]
        if files and self.config.name in ("mini", "openers"):
            raise ValueError(
                f"`{self.config.name}` ships with the project: for `data_dir` or `data_files` use `sessions` or `turns`."
            )
        if self.config.name == "openers":
            return [datasets.SplitGenerator("train")]
        sources = find_sources(files or ["mini"])
        released, name = sources[0].format != "sessions", self.config.stickers
        known = None
        if not released:
            known = known_openmoji() if name == "openmoji" else known_stickers(open_pack(name))
        splits = splits_in(sources)
        if self.config.name == "stickers":
            common = {"sources": tuple(sources), "stickers": None if released else name, "images": self.config.images}
            held_out = "test" in splits if known is None else known.count > 0
            names = [*(["train"] if known is not None or splits != ["test"] else []), *(["test"] if held_out else [])]
            return [datasets.SplitGenerator(split, common | {"is_test": split == "test"}) for split in names]
        shards = split_into_shards(sources, SHARDS)
        if known is None or not known.count:  # else every row is checked on its own
            SplitCheck(read_rows(shards, known, bad=[])).check()
        return [datasets.SplitGenerator(split, {"shards": shards, "split": split, "known": known}) for split in splits]

    def _generate_examples(self, **kwargs: Any) -> Iterator[tuple[str, dict]]:
        match self.config.name:
            case "stickers":
                rows = self._sticker_rows(**kwargs)
            case "openers":
                rows = (opener.model_dump() for opener in load_openers())
            case _:
                rows = self._dialogue_rows(**kwargs)
        for number, row in enumerate(rows):
            yield str(number), row

    def _dialogue_rows(self, shards: list[Shard], split: str, known: KnownStickers | None) -> Iterator[dict]:
        bad: list[str] | None = [] if self.config.skip_bad else None
        for row in read_rows(shards, known, bad):
            if row["split"] == split:
                yield from turn_rows(row) if self.config.name == "turns" else [row]
        for message in bad or ():
            logger.warning(f"left out {message}")

    def _sticker_rows(
        self, is_test: bool, sources: tuple[Source, ...], stickers: str | None, images: str | None
    ) -> Iterator[dict]:
        pack = open_pack(stickers) if stickers else None
        return (row for test, row in sticker_rows(sources, pack, images) if test == is_test)
