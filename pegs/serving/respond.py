"""A reply as files."""

import json
from dataclasses import asdict
from pathlib import Path

from pegs.errors import InputError
from pipelines.pipeline_pegs import PegsReply


def write_reply(reply: PegsReply, out: Path, load_seconds: float) -> dict:
    """
    Write `response.json`, and `sticker.png` if there is a sticker, into `out`.

    Args:
        reply ([`PegsReply`]): The reply.
        out (`Path`): Folder; made if missing. A `sticker.png` of an earlier reply is removed.
        load_seconds (`float`): Time it took to load the model.

    Returns:
        `dict`: What `response.json` says.

    Raises:
        InputError: If `out` cannot be written.

    """
    response = {
        "text": reply.text,
        "sticker": None if reply.sticker is None else "sticker.png",
        "variant": reply.variant,
        "why": reply.why,
        "retrieved": [asdict(item) for item in reply.retrieved],
        "blocked": reply.blocked,
        "seed": reply.seed,
        "seconds": {"load": round(load_seconds, 2), **{key: round(value, 2) for key, value in reply.seconds.items()}},
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "sticker.png").unlink(missing_ok=True)
        if reply.sticker is not None:
            reply.sticker.save(out / "sticker.png")
        (out / "response.json").write_text(json.dumps(response, ensure_ascii=False, indent=2) + "\n", "utf-8")
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error}).") from None
    return response
