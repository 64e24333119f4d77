"""Dealing a pack into small vector databases that all have the same emotions (section 3.7, appendix B.1)."""

import random
from collections.abc import Mapping, Sequence

from dataset_builders.schema import EMOTIONS, Split


def split_databases(emotion_by_id: Mapping[str, str], num_databases: int, seed: int = 0) -> dict[str, int]:
    """
    Assign every sticker to one database.

    The stickers of each emotion are shuffled and dealt in turn, and the deal goes on where the last emotion stopped, so both the
    counts of any emotion and the sizes of any two databases differ by at most one.

    Args:
        emotion_by_id (`Mapping[str, str]`): Emotion of each sticker id.
        num_databases (`int`): How many databases; 100 in the paper.
        seed (`int`, *optional*, defaults to `0`): Seed of the shuffle.

    Returns:
        `dict[str, int]`: Database of each sticker id, from 1 to `num_databases`.

    Raises:
        ValueError: If there are fewer stickers than databases.

    """
    if not 1 <= num_databases <= len(emotion_by_id):
        raise ValueError(
            f"`num_databases` must be from 1 to {len(emotion_by_id)} (the pack's size), got {num_databases}."
        )
    rng = random.Random(seed)
    deal: list[str] = []
    for emotion in EMOTIONS:
        ids = sorted(sticker_id for sticker_id, label in emotion_by_id.items() if label == emotion)
        rng.shuffle(ids)
        deal += ids
    return {sticker_id: position % num_databases + 1 for position, sticker_id in enumerate(deal)}


def split_of_database(database: int, num_databases: int) -> Sequence[Split]:
    """Splits that may use a database: the first 80 % serve train and validation, the last 20 % only test (appendix A)."""
    return ("test",) if database > round(0.8 * num_databases) else ("train", "validation")
