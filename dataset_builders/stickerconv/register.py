"""The name `stickerconv` for `load_dataset`."""

import hashlib
from pathlib import Path

import datasets.load
from datasets.data_files import DataFilesDict, sanitize_patterns
from datasets.load import DatasetModule, LocalDatasetModuleFactory, PackagedDatasetModuleFactory
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

from dataset_builders.stickerconv.sessions import RUN_FILE


NAME, BUILDER = "stickerconv", "dataset_builders.stickerconv.builder"
INFO_FILE = "dataset.yaml"  # a folder with it is a built dataset


class StickerConvModuleFactory(PackagedDatasetModuleFactory):
    """
    What `load_dataset` asks for a packaged builder.

    The one of `datasets` lists every file below the working directory when no data is named: it fails in an empty folder and takes minutes in a large one.
    Here no data means a built `./stickerconv` if there is one, else the shipped sessions, and `data_dir` a run folder.
    """

    def get_module(self) -> DatasetModule:
        """The builder's module and what it is called with."""
        if self.name != NAME:
            return super().get_module()
        if self.data_dir is None and self.data_files is None and Path(NAME, INFO_FILE).is_file():
            return LocalDatasetModuleFactory(NAME, download_mode=self.download_mode).get_module()
        patterns = self.data_files or (RUN_FILE if self.data_dir else None)
        files = DataFilesDict()
        if patterns:
            base_path = Path(self.data_dir or "").expanduser().resolve().as_posix()
            files = DataFilesDict.from_patterns(sanitize_patterns(patterns), base_path=base_path)
        return DatasetModule(BUILDER, _hash(), {"data_files": files, "dataset_name": NAME})


def _hash() -> str:
    """Of the package's code and data: what is in the cache was made from them."""
    total = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*")):
        if file.suffix in (".py", ".jsonl"):
            total.update(file.read_bytes())
    return total.hexdigest()[:16]


def register() -> None:
    """Make `load_dataset("stickerconv")` work."""
    _PACKAGED_DATASETS_MODULES[NAME] = (BUILDER, "")
    datasets.load.PackagedDatasetModuleFactory = StickerConvModuleFactory
