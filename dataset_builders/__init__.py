"""Sticker packs and dialogues; importing this makes `load_dataset("stickerconv")` work."""

from dataset_builders.stickerconv.register import register


register()
