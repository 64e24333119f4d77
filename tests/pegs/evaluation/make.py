"""A pack of coloured squares, sessions that send them, and predictions files of made-up models."""

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from subprocess import CompletedProcess
from unittest.mock import patch

from dataset_builders.schema import Generator, Message, Profile, Session, Sticker, StickerUse, Turn
from dataset_builders.stickers.pack import PackInfo, StickerPack
from pegs.cli import main
from pegs.evaluation.predict import Line, Prediction, Predictions, Said, SentSticker, read_predictions
from tests.fixtures import tiny


EMOTIONS = {
    "red": "anger",
    "green": "disgust",
    "black": "fear",
    "yellow": "happiness",
    "white": "neutral",
    "blue": "sadness",
}


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    tiny.picture(color).save(buffer, "PNG")
    return buffer.getvalue()


def make_pack(databases: bool = True) -> StickerPack:
    stickers = [
        Sticker(id=c, image_path=f"{c}.png", emotion=e, description=f"a {c} square", tags=(c,), width=40, height=40, sha256=c)
        for c, e in EMOTIONS.items()
    ]  # fmt: skip
    info = PackInfo(name="squares", version="1", licence="CC0-1.0", attribution="Squares", source="made here")
    numbers = {c: 1 + (c in ("yellow", "white", "blue")) for c in EMOTIONS} if databases else {}
    return StickerPack(info, stickers, {c: png(c) for c in EMOTIONS}, numbers)


def said(text: str, color: str | None) -> Message:
    use = StickerUse(id=color, emotion=EMOTIONS[color], query=color, rank=0, intention="enhancing empathy") if color else None  # fmt: skip
    return Message(text=text, sticker=use)


def make_session(name: str = "one", turns: int = 3, split: str = "test") -> Session:
    lines = [
        Turn(
            turn=n,
            user=said(f"user line {n}", "blue" if n == 2 else None),
            system=said(f"system line {n}", ("yellow", None, "white")[(n - 1) % 3]),
        )
        for n in range(1, turns + 1)
    ]
    profile = Profile(name="Ana", emotion="sadness", persona="You are Ana.", situation="Your dog died.")
    return Session(session_id=name, split=split, database=2, profile=profile, turns=tuple(lines), ended_by="closure", generator=Generator(name="hand", version="1"))  # fmt: skip


def sticker(color: str | None) -> SentSticker | None:
    return SentSticker(id=color, emotion=EMOTIONS[color], description=f"a {color} square") if color else None


def row(model: str, key: str, gold: tuple[str, str | None], answer: tuple[str, str | None], **fields) -> Prediction:
    session, turn = key.rsplit("/", 1)
    return Prediction(
        session_id=session,
        turn=int(turn),
        context=(Line(role="user", text=f"I feel odd in {key}."),),
        reference=Said(text=gold[0], sticker=sticker(gold[1])),
        predicted=Said(text=answer[0], sticker=sticker(answer[1])),
        model=model,
        seed=0,
        **fields,
    )


def write(path: Path, rows: list[Prediction]) -> Predictions:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row.model_dump_json(exclude_defaults=True) + "\n" for row in rows), "utf-8")
    return read_predictions(path)


def make_run(folder: Path, model: str, sessions: int = 6, turns: int = 2, every: int = 2) -> Predictions:
    """Predictions of a model that sends a sticker on every so many-th turn."""
    colors, rows = list(EMOTIONS), []
    for s in range(sessions):
        for t in range(1, turns + 1):
            n = s * turns + t
            gold = (f"That is hard, session {s} turn {t}.", colors[n % 6] if n % 2 else None)
            answer = (f"{model} hears you in session {s}, part {t}.", colors[(n + 1) % 6] if n % every == 0 else None)
            rows.append(row(model, f"s{s}/{t}", gold, answer))
    return write(folder / f"{model}.jsonl", rows)


def pegs(*args: object) -> CompletedProcess:
    """`pegs evaluate` with arguments, in this process: what it prints, and how it ends."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = ["pegs", "evaluate", *map(str, args)]
    with patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
    return CompletedProcess(argv, code, out.getvalue(), err.getvalue())
