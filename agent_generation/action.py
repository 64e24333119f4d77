"""Action module (section 3.5): what an agent says, as text that can be sent."""

import re
from collections.abc import Iterable


STICKER = r"\s*[\[【][^\]】]*(?:sticker|表情包)[^\]】]*[\]】]"  # as prompts show the other side's
QUOTES = {'"': '"', "“": "”", "「": "」", "'": "'", "«": "»"}


def clean_message(text: str, names: Iterable[str]) -> str:
    """
    A model's answer as a message: on one line, without quotation marks around it, without the speaker's own name before it, and without stickers in
    words, since the tool alone sends them.

    Nothing else is taken away: a colon inside the text is the speaker's.

    Args:
        text (`str`): The answer.
        names (`Iterable[str]`): What the speaker may be called.

    Returns:
        `str`: Possibly empty.

    """
    text = re.sub(STICKER, "", " ".join(text.split()), flags=re.IGNORECASE).strip()
    speaker = "|".join(re.escape(name) for name in names if name)
    text = re.sub(rf"^(?:\*\*)?(?:{speaker})(?:\*\*)?\s*[:：](?:\*\*)?\s*", "", text, flags=re.IGNORECASE)
    if len(text) > 1 and QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def cut_message(text: str, limit: int) -> str:
    """
    The first whole sentences of `text` that fit, or its first words where not even one does.

    Args:
        text (`str`): Longer than `limit`.
        limit (`int`): Characters.

    """
    ends = [match.end() for match in re.finditer(r"[.!?…]+(?=\s)|[。！？]", text[: limit + 1])]
    fitting = [end for end in ends if end <= limit]
    if fitting:
        return text[: fitting[-1]].strip()
    return text[:limit].rsplit(" ", 1)[0].rstrip(" ,;，；")
