"""Where sticker packs, sessions and the embedded model are; what is here asks for no torch, so that commands which need none begin at once."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from dataset_builders.schema import Session, Split
from dataset_builders.stickerconv.built import load_built_pack, read_built_sessions
from dataset_builders.stickerconv.register import INFO_FILE
from dataset_builders.stickerconv.sessions import RUN_FILE, SessionError, load_mini, read_sessions
from dataset_builders.stickers.openmoji import cached_folder
from dataset_builders.stickers.pack import PackError, StickerPack
from pegs.errors import InputError


CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
DEFAULT_MODEL = CHECKPOINTS / "pegs-mini"


def find_pack(name: str) -> Path:
    """
    Folder of a sticker pack, by name, folder or Hub id.

    Raises:
        InputError: If it is neither `openmoji` nor a folder nor a dataset repository.

    """
    return cached_folder() if name == "openmoji" else find_data(name, "--stickers")


def find_data(name: str, option: str) -> Path:
    """
    A file or folder, or that of a dataset repository on the Hub.

    Args:
        name (`str`): Where it is, or its Hub id.
        option (`str`): What names it.

    Raises:
        InputError: If the repository cannot be read.

    """
    try:
        on_hub = not Path(name).exists() and HUB_ID.fullmatch(name)
        return Path(snapshot_download(name, repo_type="dataset") if on_hub else name)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise InputError(f"{option} {name}: {str(error).splitlines()[0]}") from error


def load_pack(name: str) -> StickerPack:
    """
    A sticker pack by name, folder or Hub id; of a built dataset, the stickers in it.

    Raises:
        InputError: If there is none, or a broken one.

    """
    folder = find_pack(name)
    try:
        return load_built_pack(folder) if (folder / INFO_FILE).is_file() else StickerPack.load(folder)
    except (OSError, PackError, SessionError) as error:
        raise InputError(f"--stickers {name}: {str(error).splitlines()[0]}") from error


def load_sessions(name: str, split: Split) -> list[Session]:
    """
    The sessions of a split.

    Args:
        name (`str`): `mini` for StickerConv-mini, a JSON Lines file, the folder of a run, or the folder or Hub id of a built dataset.
        split (`str`): `train`, `validation` or `test`.

    Raises:
        InputError: If there is none, or a broken one.

    """
    if name == "mini":
        return load_mini(split)
    place = find_data(name, "--sessions")
    try:
        if (place / INFO_FILE).is_file():
            return read_built_sessions(place, split)
        sessions = read_sessions(place / RUN_FILE if place.is_dir() else place)
    except OSError as error:
        raise InputError(f"--sessions {name}: {error.strerror}.") from None
    except SessionError as error:
        raise InputError(str(error)) from None
    return [session for session in sessions if session.split == split]
