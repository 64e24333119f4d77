"""The dataset as a folder in Hub layout: parquet for each configuration and split, and `dataset.yaml`, which says where it comes from."""

import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import DatasetInfo, Features, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard, DatasetCardData
from pydantic import BaseModel, ConfigDict, ValidationError

from dataset_builders.cards import sign_card, somebodys_card
from dataset_builders.stickerconv.features import FEATURES, turns_table
from dataset_builders.stickerconv.inputs import SplitCheck, known_stickers, open_pack, read_rows, sticker_rows
from dataset_builders.stickerconv.register import INFO_FILE
from dataset_builders.stickerconv.sessions import SessionError, describe
from dataset_builders.stickerconv.sources import SPLITS, Format, Source, find_sources, split_into_shards
from dataset_builders.stickers import ser30k
from dataset_builders.stickers.pack import ROWS_A_GROUP, StickerPack


CONFIGS = ("sessions", "turns", "stickers")
BUILT = (*CONFIGS, "README.md", INFO_FILE)
STAGE = ".pegs-build."  # and the process's id: a build is written inside its folder, which may be a disk of its own
ROWS = 1000  # rows a row group and sessions a table; stickers have their pictures with them and fewer
# What the sets' own pages say; neither is ours to change.
RELEASED = {
    "released": ("apache-2.0", "StickerConv (Zhang et al., arXiv:2402.01679)"),
    "mod": ("research only, not to be distributed", "MOD (Fei et al., DSTC10 track 1)"),
}


class SplitSize(BaseModel):
    """How much one split of one configuration holds; `num_bytes` is its size in memory, `file_bytes` on disk."""

    rows: int
    num_bytes: int
    file_bytes: int


class DatasetFolder(BaseModel):
    """
    What `dataset.yaml` says.

    `licences` maps what is covered to its licence, `sizes` configurations to their splits, `left_out` counts the rows that were wrong.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    language: str
    sources: list[str]
    licences: dict[str, str]
    attribution: list[str]
    left_out: int
    sizes: dict[str, dict[str, SplitSize]]

    @classmethod
    def load(cls, folder: Path) -> "DatasetFolder":
        """
        Open a built dataset.

        Raises:
            SessionError: If `folder` holds none, or a broken one.

        """
        try:
            return cls.model_validate(yaml.safe_load((folder / INFO_FILE).read_text("utf-8")))
        except OSError:
            raise SessionError(
                f"{folder}: no dataset, it has no {INFO_FILE}; `pegs dataset build` makes one."
            ) from None
        except ValidationError as error:
            raise SessionError(f"{folder / INFO_FILE}: {describe(error)}") from None
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise SessionError(f"{folder / INFO_FILE}: not YAML ({str(error).splitlines()[0]}).") from None

    @property
    def is_released(self) -> bool:
        """Whether it is of a set that others released."""
        return any(line in self.attribution for _, line in RELEASED.values())

    def save(self, folder: Path) -> None:
        """Write `dataset.yaml`."""
        text = yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
        (folder / INFO_FILE).write_text(text, "utf-8")


def card_data(info: DatasetFolder) -> DatasetCardData:
    """What the card's front matter says of configurations and splits: with it and the parquet files, `load_dataset` needs no code."""
    data = DatasetCardData(pretty_name=info.name)
    configs, infos = MetadataConfigs(), DatasetInfosDict()
    for config, sizes in info.sizes.items():
        files = [{"split": split, "path": f"{config}/{split}-*.parquet"} for split in sizes]
        configs[config] = {"data_files": files} | ({"default": True} if config == CONFIGS[0] else {})
        infos[config] = DatasetInfo(
            features=FEATURES[config],
            splits=SplitDict({n: SplitInfo(n, size.num_bytes, size.rows) for n, size in sizes.items()}),
            download_size=sum(size.file_bytes for size in sizes.values()),
            dataset_size=sum(size.num_bytes for size in sizes.values()),
        )
    configs.to_dataset_card_data(data)
    infos.to_dataset_card_data(data)
    return data


class SplitWriter:
    """
    One configuration's parquet files, a split each, written in a thread beside the rows that are being read. A context manager: files are whole after it.

    Args:
        folder (`Path`): Where they go.
        features (`Features`): The columns.
        rows (`int`, *optional*, defaults to 1000): Rows a row group.

    Attributes:
        sizes (`dict[str, SplitSize]`): Of each split, in the usual order, after the context.

    """

    def __init__(self, folder: Path, features: Features, rows: int = ROWS) -> None:
        self.folder, self.schema, self.rows = folder, features.arrow_schema, rows
        self.writers: dict[str, pq.ParquetWriter] = {}
        self.sizes: dict[str, SplitSize] = {}
        self.thread, self.unwritten = ThreadPoolExecutor(1), Future[None]()
        self.unwritten.set_result(None)
        folder.mkdir(parents=True)

    def add(self, split: str, table: pa.Table, convert: Callable[[pa.Table], pa.Table] | None = None) -> None:
        """Write a table to a split; `convert` makes it of another one, in the thread."""
        self.unwritten.result()  # one table at a time: memory does not grow
        self.unwritten = self.thread.submit(self._write, split, table, convert)

    def _write(self, split: str, table: pa.Table, convert: Callable[[pa.Table], pa.Table] | None) -> None:
        if split not in self.writers:
            file = self._file(split)
            self.writers[split] = pq.ParquetWriter(file, self.schema, compression="zstd", write_page_index=True)
            self.sizes[split] = SplitSize(rows=0, num_bytes=0, file_bytes=0)
        table = convert(table) if convert else table
        self.writers[split].write_table(table, row_group_size=self.rows)
        self.sizes[split].rows += len(table)
        self.sizes[split].num_bytes += table.nbytes

    def _file(self, split: str) -> Path:
        return self.folder / f"{split}-00000-of-00001.parquet"

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.thread.shutdown()  # waits, so that nothing is written after a build has given up
        for split, writer in self.writers.items():
            writer.close()
            self.sizes[split].file_bytes = self._file(split).stat().st_size
        self.sizes = {split: self.sizes[split] for split in SPLITS if split in self.sizes}
        if error is None:
            self.unwritten.result()


def tables_of(rows: Iterable[tuple[str, dict]], schema: pa.Schema, size: int) -> Iterator[tuple[str, pa.Table]]:
    """Tables of at most `size` rows, each with its split, of rows with their splits."""
    waiting: dict[str, list[dict]] = defaultdict(list)
    for split, row in rows:
        waiting[split].append(row)
        if len(waiting[split]) == size:
            yield split, pa.Table.from_pylist(waiting.pop(split), schema)
    for split, left in waiting.items():
        yield split, pa.Table.from_pylist(left, schema)


def build_dataset(
    paths: Sequence[str | Path],
    out: Path,
    stickers: str = "openmoji",
    images: str | None = None,
    licence: str = "",
    language: str = "",
    skip_bad: bool = False,
    on_row: Callable[[int], object] = lambda count: None,
) -> tuple[DatasetFolder, list[str]]:
    """
    Build the dataset. Rows are read, checked and written one after the other, so memory does not grow with them. `out` is whole or as it was before; after
    a kill in the moment when the one takes the place of the other it has no `dataset.yaml`, and the next build begins by putting back what was there.

    Args:
        paths (`Sequence[str | Path]`): Run folders, files, or `mini` (see [`find_sources`]).
        out (`Path`): Folder to write: new, empty, or an earlier build.
        stickers (`str`, *optional*, defaults to `"openmoji"`): The pack that the sessions use: `openmoji` or a folder.
        images (`str`, *optional*): For the released StickerConv, an SER30K tree with its pictures.
        licence (`str`, *optional*): Of the dialogues; that of the pack, or of the released set, if none is given.
        language (`str`, *optional*): Of the dialogues, as ISO 639 code; English, and Chinese for MOD, if not given.
        skip_bad (`bool`, *optional*, defaults to `False`): Leave rows that are wrong out instead of stopping.
        on_row (`Callable`, *optional*): Called after every session with how many there are so far.

    Returns:
        `tuple[DatasetFolder, list[str]]`: What was built, and what was wrong with the rows that were left out.

    Raises:
        SessionError: If a row is wrong, no row is left, a test sticker is used in training, or `out` holds something else.
        FileNotFoundError: If `stickers` is no pack.
        PackError: If it is a broken one.

    """
    is_new = not out.exists()
    for stale in out.glob(f"{STAGE}*"):
        _clear(stale)
    if not is_new and not (out.is_dir() and ((out / INFO_FILE).is_file() or not any(out.iterdir()))):
        raise SessionError(f"{out}: holds something else than a dataset; give an empty or new folder.")
    sources = find_sources(paths)
    bad: list[str] | None = [] if skip_bad else None
    pack = open_pack(stickers) if sources[0].format == "sessions" else None
    partial = out / f"{STAGE}{os.getpid()}"
    try:
        sizes = _write_dialogues(sources, pack, partial, bad, on_row)
        sizes["stickers"] = _write_stickers(sources, pack, partial, images)
        licences, attribution = _origin(sources[0].format, pack, images)
        info = DatasetFolder(
            name=out.absolute().name,
            language=language or ("zh" if sources[0].format == "mod" else "en"),
            sources=["/".join(source.file.absolute().parts[-2:]) for source in sources],
            licences=licences | ({"the dialogues": licence} if licence else {}),
            attribution=attribution,
            left_out=len(bad or ()),
            sizes=sizes,
        )
        info.save(partial)
        (partial / "README.md").write_text(_card(info, out), "utf-8")
        _replace(out, partial)
    finally:
        _clear(partial)
        if is_new and out.exists() and not any(out.iterdir()):
            out.rmdir()
    return info, bad or []


def _write_dialogues(
    sources: list[Source],
    pack: StickerPack | None,
    folder: Path,
    bad: list[str] | None,
    on_row: Callable[[int], object],
) -> dict[str, dict[str, SplitSize]]:
    known, splits = known_stickers(pack) if pack is not None else None, SplitCheck()

    def rows() -> Iterator[tuple[str, dict]]:
        for count, row in enumerate(read_rows(split_into_shards(sources, 1), known, bad), start=1):
            splits.add(row)
            on_row(count)
            yield row["split"], row

    with (
        SplitWriter(folder / "sessions", FEATURES["sessions"]) as sessions,
        SplitWriter(folder / "turns", FEATURES["turns"]) as turns,
    ):
        for split, table in tables_of(rows(), sessions.schema, ROWS):
            sessions.add(split, table)
            turns.add(split, table, turns_table)
    if not sessions.sizes:
        raise SessionError(f"{sources[0].file}: no session" + (f" that is right, e.g. {bad[0]}" if bad else "."))
    splits.check()
    return {"sessions": sessions.sizes, "turns": turns.sizes}


def _write_stickers(
    sources: list[Source], pack: StickerPack | None, folder: Path, images: str | None
) -> dict[str, SplitSize]:
    rows = (("test" if is_test else "train", row) for is_test, row in sticker_rows(sources, pack, images))
    with SplitWriter(folder / "stickers", FEATURES["stickers"], ROWS_A_GROUP) as writer:
        for split, table in tables_of(rows, writer.schema, ROWS_A_GROUP):
            writer.add(split, table)
    return writer.sizes


def _origin(found: Format, pack: StickerPack | None, images: str | None) -> tuple[dict[str, str], list[str]]:
    """Licences by what they cover, and lines to show."""
    if pack is None:
        licence, attribution = RELEASED[found]
        pictures = {"the stickers": ser30k.INFO.licence} if images else {}
        return {"the dialogues": licence} | pictures, [attribution, *([ser30k.INFO.attribution] if images else [])]
    own = {sticker.licence: f"sticker {sticker.id}" for sticker in reversed(pack.stickers) if sticker.licence}
    licences = {"the dialogues": pack.info.licence, "the stickers": pack.info.licence}
    return licences | {name: licence for licence, name in own.items()}, [pack.info.attribution]


def _card(info: DatasetFolder, out: Path) -> str:
    """The bare card of a build; one that somebody wrote for the build before keeps its text and learns the new splits."""
    data, written = card_data(info), somebodys_card(out)
    if written is None:
        return sign_card(f"---\n{data.to_yaml()}\n---\n# {info.name}\n")
    try:
        card = DatasetCard(written)
    except (ValueError, yaml.YAMLError) as error:
        raise SessionError(f"{out / 'README.md'}: {str(error).splitlines()[0]}") from None
    for key in ("configs", "dataset_info"):
        card.data[key] = data[key]
    return str(card)


def _replace(out: Path, built: Path) -> None:
    """Put a build in the place of an earlier one, which is kept in `old` until all is there; files that are not the build's stay."""
    old = built / "old"
    old.mkdir()
    for name in (INFO_FILE, "README.md", "statistics.json", "assets", *CONFIGS):
        if (out / name).exists():
            (out / name).rename(old / name)
    for name in BUILT:  # `dataset.yaml` last: a folder with it is whole
        (built / name).rename(out / name)
    old.rename(built / "replaced")


def _clear(built: Path) -> None:
    """Remove a build's stage; if the build was cut short while it replaced an earlier one, that one is put back."""
    out, old = built.parent, built / "old"
    if old.exists():
        for name in BUILT:
            if not (built / name).exists() and (out / name).exists():
                (out / name).rename(built / name)
        for path in old.iterdir():
            path.rename(out / path.name)
        old.rmdir()
    shutil.rmtree(built, ignore_errors=True)
