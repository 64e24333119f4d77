"""Uploads to the Hub, each with its card."""

import io
from collections import Counter
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from dataset_builders.cards import sign_card, somebodys_card
from dataset_builders.schema import EMOTIONS
from dataset_builders.stickerconv.build import DatasetFolder
from dataset_builders.stickers.export import check_licence
from dataset_builders.stickers.pack import StickerPack
from dataset_builders.stickers.sheet import contact_sheet
from hub_cards.cards import check_card, render_card, size_category
from hub_cards.checkpoints import CardOptions, Kind, KindError, checkpoint_card, kind_of, licence_of, own_card
from hub_cards.dataset import STATISTICS_FILE, describe_dataset, write_dataset_card
from hub_cards.licences import hub_licence, require_free


PACK_FILES = ("pack.yaml", "stickers.parquet", "databases.parquet", "embeddings.safetensors")
REPO_TYPES: dict[Kind, str] = {"dataset": "dataset", "pack": "dataset", "space": "space"}  # everything else is a model
CARD_COMMANDS = {"space": "card --space", "pack": "stickers publish"}
# What a training leaves beside its result, and files that would be unpickled.
IGNORED = ["trainer/**", "checkpoint-*/**", "state/**", "runs/**", "done", "emissions.csv", ".*", "**/.*", "*.pt", "*.pth", "*.bin", "*.pkl", "*.ckpt"]  # fmt: skip
SHOWN = 40


def sticker_pack_card(pack: StickerPack, repo_id: str) -> str:
    """The card of a pack, from its own numbers."""
    count = len(pack.stickers)
    counts: Counter[str] = Counter(sticker.emotion or "not annotated" for sticker in pack.stickers)
    return render_card(
        "sticker_pack_card",
        info=pack.info,
        repo_id=repo_id,
        hub_licence=hub_licence(pack.info.licence),
        count=count,
        size_category=size_category(count),
        animated=sum(sticker.animated for sticker in pack.stickers),
        databases=pack.num_databases,
        emotions={name: counts[name] for name in (*EMOTIONS, "not annotated") if counts[name]},
        annotators=dict(Counter(sticker.annotated_by or "nobody" for sticker in pack.stickers).most_common()),
        other_licences=sorted({sticker.licence for sticker in pack.stickers if sticker.licence}),
    )


def push_folder(
    folder: Path,
    repo_id: str,
    private: bool = False,
    have_rights: bool = False,
    tag: str = "",
    options: CardOptions | None = None,
) -> str:
    """
    Publish what a folder holds: a model, processor, pipeline, adapter, Space, dataset or sticker pack, with its card, as one commit.

    What was uploaded by a call that was cut short is not sent again.

    Args:
        folder (`Path`): What to publish (see [`kind_of`]).
        repo_id (`str`): `user/name`; made if needed.
        private (`bool`, *optional*, defaults to `False`): Whether a new repository is private.
        have_rights (`bool`, *optional*, defaults to `False`): Publish although a licence does not say that one may.
        tag (`str`, *optional*): Name for this commit, to load it by as `revision=`.
        options ([`CardOptions`], *optional*): For the card of a checkpoint, unless somebody wrote it.

    Returns:
        `str`: Address of the commit.

    Raises:
        KindError: If the folder holds nothing that can be published.
        LicenceError: If a licence forbids it, or is not known to allow it.

    """
    kind = kind_of(folder)
    if kind == "pack":
        url = push_sticker_pack(folder, repo_id, private, have_rights)
    else:
        url = _push_files(folder, kind, repo_id, private, have_rights, options or CardOptions())
    if tag:
        _tag(repo_id, REPO_TYPES.get(kind, "model"), tag, url.rpartition("/")[2])
    return url


def _tag(repo_id: str, repo_type: str, tag: str, commit: str) -> None:
    """Give a commit a tag, unless a call that was cut short has done so."""
    api = HfApi()
    tags = api.list_repo_refs(repo_id, repo_type=repo_type).tags
    if not any(ref.name == tag and ref.target_commit == commit for ref in tags):
        api.create_tag(repo_id, tag=tag, revision=commit, repo_type=repo_type)


def _push_files(folder: Path, kind: Kind, repo_id: str, private: bool, have_rights: bool, options: CardOptions) -> str:
    require_free(licences_of(folder, options), have_rights)
    if own_card(folder) is None or (kind != "space" and somebodys_card(folder) is None):
        write_card(folder, repo_id, options)
    api, repo_type = HfApi(), REPO_TYPES.get(kind, "model")
    sdk = "gradio" if kind == "space" else None
    api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True, space_sdk=sdk)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        repo_type=repo_type,
        commit_message=f"{kind.title()} {folder.absolute().name}",
        ignore_patterns=IGNORED,
        delete_patterns=["*.parquet"] if kind == "dataset" else None,  # of a split that is gone
    )
    return commit.commit_url


def licences_of(folder: Path, options: CardOptions) -> dict[str, str]:
    """The licences of what is in a folder, by what they cover."""
    kind = kind_of(folder)
    if kind == "dataset":
        return DatasetFolder.load(folder).licences
    return {f"the {kind}": licence_of(folder, options)}


def write_card(folder: Path, repo_id: str, options: CardOptions) -> None:
    """
    Write a folder's `README.md` from its own numbers.

    Args:
        folder (`Path`): A dataset, model, pipeline, adapter or processor.
        repo_id (`str`): Where it will be; the folder's own name if it is empty.
        options ([`CardOptions`]): What a checkpoint's folder cannot tell.

    Raises:
        KindError: If the folder holds something else.
        CardError: If somebody wrote the card that is there.

    """
    kind = kind_of(folder)
    if kind in ("space", "pack"):
        raise KindError(f"{folder}: the card of a {kind} is written with it: `pegs {CARD_COMMANDS[kind]}`.")
    check_card(folder)
    if kind != "dataset":
        card = checkpoint_card(folder, repo_id or folder.absolute().name, options)
        (folder / "README.md").write_text(sign_card(card), "utf-8")
        return
    if not (folder / STATISTICS_FILE).is_file():
        describe_dataset(folder)
    write_dataset_card(folder, repo_id)


def push_sticker_pack(folder: Path, repo_id: str, private: bool = False, have_rights: bool = False) -> str:
    """
    Publish a pack as a dataset repository: the Hub shows its pictures, `load_dataset` reads it without code of ours. Its card is made from its numbers,
    unless the folder has one that somebody wrote.

    What was uploaded by a call that was cut short is not sent again.

    Args:
        folder (`Path`): The pack.
        repo_id (`str`): `user/name`; made if needed.
        private (`bool`, *optional*, defaults to `False`): Whether a new repository is private.
        have_rights (`bool`, *optional*, defaults to `False`): Publish although the licence does not say that one may.

    Returns:
        `str`: Address of the commit.

    Raises:
        LicenceError: See [`check_licence`].
        FileNotFoundError: If `folder` is not a pack.
        PackError: If a file of it is broken.

    """
    pack = StickerPack.load(folder)
    check_licence(pack, have_rights)
    step = max(1, len(pack.stickers) // SHOWN)
    shown = [sticker.id for sticker in pack.stickers[::step][:SHOWN]]
    sheet = io.BytesIO()
    images = [pack.image(sticker_id) for sticker_id in shown]
    contact_sheet(images, shown, footer=pack.info.attribution).save(sheet, "PNG", optimize=True)
    files = [name for name in PACK_FILES if (folder / name).is_file()]
    operations: list[CommitOperationAdd | CommitOperationDelete]
    operations = [CommitOperationAdd(name, str(folder / name)) for name in files]
    operations.append(CommitOperationAdd("assets/sheet.png", sheet.getvalue()))
    card = somebodys_card(folder) or sign_card(sticker_pack_card(pack, repo_id))
    operations.append(CommitOperationAdd("README.md", card.encode()))
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    there = api.list_repo_files(repo_id, repo_type="dataset")
    operations += [CommitOperationDelete(name) for name in PACK_FILES if name in there and name not in files]
    message = f"Sticker pack {pack.info.name}, version {pack.info.version}"
    return api.create_commit(repo_id, operations, commit_message=message, repo_type="dataset").commit_url
