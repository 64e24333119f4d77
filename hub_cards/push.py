"""Uploads to the Hub, each with its card."""

import io
from collections import Counter
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from dataset_builders.schema import EMOTIONS
from dataset_builders.stickers.export import check_licence
from dataset_builders.stickers.pack import StickerPack
from dataset_builders.stickers.sheet import contact_sheet
from hub_cards.cards import render_card


PACK_FILES = ("pack.yaml", "stickers.parquet", "databases.parquet", "embeddings.safetensors")
HUB_LICENCES = ("cc0-1.0", "cc-by-4.0", "cc-by-3.0", "cc-by-sa-4.0", "cc-by-sa-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "mit", "apache-2.0", "unlicense", "pddl")  # fmt: skip
SHOWN = 40


def sticker_pack_card(pack: StickerPack, repo_id: str) -> str:
    """The card of a pack, from its own numbers."""
    count = len(pack.stickers)
    counts: Counter[str] = Counter(sticker.emotion or "not annotated" for sticker in pack.stickers)
    licence = pack.info.licence.lower().replace(" ", "-")
    return render_card(
        "sticker_pack_card",
        info=pack.info,
        repo_id=repo_id,
        hub_licence=licence if licence in HUB_LICENCES else "other",
        count=count,
        size_category=next(name for most, name in ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (float("inf"), "1M<n<10M")) if count < most),
        animated=sum(sticker.animated for sticker in pack.stickers),
        databases=pack.num_databases,
        emotions={name: counts[name] for name in (*EMOTIONS, "not annotated") if counts[name]},
        annotators=dict(Counter(sticker.annotated_by or "nobody" for sticker in pack.stickers).most_common()),
        other_licences=sorted({sticker.licence for sticker in pack.stickers if sticker.licence}),
    )  # fmt: skip


def push_sticker_pack(folder: Path, repo_id: str, private: bool = False, have_rights: bool = False) -> str:
    """
    Publish a pack as a dataset repository: the Hub shows its pictures, `load_dataset` reads it without code of ours.

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
    operations = [CommitOperationAdd(name, str(folder / name)) for name in PACK_FILES if (folder / name).is_file()]
    operations.append(CommitOperationAdd("assets/sheet.png", sheet.getvalue()))
    operations.append(CommitOperationAdd("README.md", sticker_pack_card(pack, repo_id).encode()))
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    message = f"Sticker pack {pack.info.name}, version {pack.info.version}"
    return api.create_commit(repo_id, operations, commit_message=message, repo_type="dataset").commit_url
