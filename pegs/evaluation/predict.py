"""Predictions: a model's reply to every System turn of a split (section 6), one JSON line a turn, the input of all metrics."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import torch
from PIL import Image
from pydantic import Field, ValidationError, model_validator

from agent_generation.engine import seed_of
from dataset_builders.schema import Emotion, Message, Record, Session, Sticker, Turn
from dataset_builders.stickerconv.sessions import describe
from dataset_builders.stickers.images import open_picture
from dataset_builders.stickers.pack import StickerPack
from pegs.errors import InputError
from pegs.evaluation.results import make_folder, write_json
from pegs.training.dialogues import turn_contexts
from pipelines.pipeline_pegs import PegsPipeline


class SentSticker(Record):
    """
    A sticker in a prediction row: one of the pack (`id`), or a drawn one (`picture`, a file named relative to the predictions).

    What is known of it comes along, so that a judge needs no pack; of a drawn one nothing is.
    """

    id: str | None = None
    picture: str | None = None
    emotion: Emotion | None = None
    description: str = ""

    @model_validator(mode="after")
    def _is_one_of_both(self) -> "SentSticker":
        if (self.id is None) == (self.picture is None):
            raise ValueError("a sticker has either an `id` or a `picture`")
        return self


class Said(Record):
    """Text and sticker of one side."""

    text: str
    sticker: SentSticker | None = None


class Line(Said):
    """A message of the context."""

    role: Literal["user", "assistant"]


class Prediction(Record):
    """
    A row: one System turn, what the dataset's System says there, and what a model says.

    `gold_rank` (0-based, among the `candidates` stickers of the session's database) and `sticker_logit` (log-odds of a sticker against the end of the reply)
    are the model's after the reference's text; `None` where the reference has no sticker or the model has no such scores.
    """

    session_id: str
    turn: int = Field(ge=1)
    context: tuple[Line, ...] = Field(min_length=1)
    reference: Said
    predicted: Said
    gold_rank: int | None = Field(default=None, ge=0)
    candidates: int | None = Field(default=None, ge=1)
    sticker_logit: float | None = None
    model: str = Field(min_length=1)
    seed: int

    @property
    def key(self) -> str:
        """Name of the turn, the same for all models."""
        return f"{self.session_id}/{self.turn}"


@dataclass(frozen=True)
class Predictions:
    """A predictions file: `rows` of one model, in order, each turn once."""

    path: Path
    rows: tuple[Prediction, ...]

    @property
    def model(self) -> str:
        """Name of the model that wrote them."""
        return self.rows[0].model

    @property
    def keys(self) -> list[str]:
        """Names of the turns."""
        return [row.key for row in self.rows]

    @cached_property
    def sha256(self) -> str:
        """Of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @cached_property
    def by_key(self) -> dict[str, Prediction]:
        """The rows by the names of their turns."""
        return {row.key: row for row in self.rows}

    def only(self, keys: Sequence[str]) -> "Predictions":
        """The rows of some turns, in their order."""
        return Predictions(self.path, tuple(self.by_key[key] for key in keys))

    def check_words(self, checkpoint: str, pack: StickerPack, seed: int) -> None:
        """
        Check that the words are those of a checkpoint (by its digest) at a seed, so that another variant of it can repeat them.

        Raises:
            InputError: If they are not, or `<path>.run.json` does not say so.

        """
        theirs, ours = _read_origin(self.path, "--replies"), {"model": checkpoint, "stickers": _digest_pack(pack)}
        differing = [key for key, value in ours.items() if theirs.get(key) != value]
        differing += ["seed"] if any(row.seed != seed for row in self.rows) else []
        if differing:
            raise InputError(f"--replies {self.path}: was made with other {', '.join(differing)}; its words are not this run's.")  # fmt: skip

    def replies_to(self, turns: Sequence["SystemTurn"], pack: StickerPack) -> list[Prediction]:
        """
        The rows of the turns, which another model repeats.

        Raises:
            InputError: If one is missing, or answers something else.

        """
        for turn in turns:
            if turn.key not in self.by_key:
                raise InputError(f"--replies {self.path}: has no turn {turn.key}.")
            if not _answers(self.by_key[turn.key], turn, pack):
                raise InputError(f"--replies {self.path}: context: {turn.key} is not as in this run's sessions.")
        return [self.by_key[turn.key] for turn in turns]

    def picture_bytes(self, sticker: SentSticker, pack: StickerPack) -> bytes:
        """
        A sticker's encoded picture.

        Raises:
            InputError: If the pack does not hold it, or the file cannot be read or is not in the folder of the predictions.

        """
        if sticker.id is not None:
            if sticker.id not in pack.by_id:
                raise InputError(f"{self.path}: sticker {sticker.id!r} is not in the pack {pack.info.name}.")
            return pack.still(sticker.id)
        file = self.path.parent / str(sticker.picture)
        if not file.resolve().is_relative_to(self.path.parent.resolve()):
            raise InputError(f"{self.path}: picture {sticker.picture}: must be in the folder of the predictions.")
        try:
            return file.read_bytes()
        except OSError as error:
            raise InputError(f"{self.path}: picture {file}: {error.strerror}.") from None

    def image(self, sticker: SentSticker, pack: StickerPack) -> Image.Image:
        """A sticker's picture, RGBA; raises as [`picture_bytes`] does, and if it is none."""
        data = self.picture_bytes(sticker, pack)
        try:
            return open_picture(data).convert("RGBA")
        except (OSError, ValueError, SyntaxError):
            raise InputError(f"{self.path}: {sticker.id or sticker.picture} is not a readable picture.") from None


def read_predictions(path: Path) -> Predictions:
    """
    Read a predictions file.

    Raises:
        InputError: If it cannot be read, a row is wrong, a turn comes twice or there are two models; the message names file, line and field.

    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}.") from None
    rows: dict[str, Prediction] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = Prediction.model_validate_json(line)
        except ValidationError as error:
            raise InputError(f"{path}:{number}: {describe(error)}") from None
        first = next(iter(rows.values()), row)
        if row.key in rows:
            raise InputError(f"{path}:{number}: turn: {row.key} was there before.")
        if row.model != first.model:
            raise InputError(f"{path}:{number}: model: expected {first.model!r} as in line 1, got {row.model!r}.")
        rows[row.key] = row
    if not rows:
        raise InputError(f"{path}: has no rows.")
    return Predictions(path, tuple(rows.values()))


def read_all(paths: Sequence[Path]) -> list[Predictions]:
    """
    Read the predictions of several models.

    Raises:
        InputError: As [`read_predictions`], or if two files are of the same model.

    """
    runs = [read_predictions(path) for path in paths]
    by_model: dict[str, Path] = {}
    for run in runs:
        if run.model in by_model:
            raise InputError(f"{run.path}: model: {run.model!r} is also in {by_model[run.model]}.")
        by_model[run.model] = run.path
    return runs


def common_turns(runs: Sequence[Predictions]) -> list[str]:
    """
    Names of the turns that all models answered, in the first one's order.

    Raises:
        InputError: If there are none, or one has another context in another file.

    """
    shared = set.intersection(*(set(run.keys) for run in runs))
    if not shared:
        raise InputError(f"{runs[-1].path}: session_id, turn: no turn is in all of the predictions.")
    for run in runs[1:]:
        for key in sorted(shared):
            if run.by_key[key].context != runs[0].by_key[key].context:
                raise InputError(f"{run.path}: context: {key} is not as in {runs[0].path}.")
    return [key for key in runs[0].keys if key in shared]


@dataclass(frozen=True)
class SystemTurn:
    """A turn to answer: its session, what the dataset's System says, and all messages before it in the chat format."""

    session: Session
    turn: Turn
    context: list[dict]

    @property
    def key(self) -> str:
        """Its name, as [`Prediction`] has it."""
        return f"{self.session.session_id}/{self.turn.turn}"


@dataclass
class Reply:
    """A model's answer to a [`SystemTurn`]; a sticker is one of the pack or drawn. The scores are those of [`Prediction`]."""

    text: str
    sticker_id: str | None = None
    drawn: Image.Image | None = None
    gold_rank: int | None = None
    candidates: int | None = None
    sticker_logit: float | None = None

    def score_reference(self, ranked: list[str], gold: str) -> None:
        """Note where the reference's sticker is among all candidates, if it is one."""
        if gold in ranked:
            self.gold_rank, self.candidates = ranked.index(gold), len(ranked)


class Predictor(Protocol):
    """A model under evaluation; baselines are others."""

    model: str

    def __call__(self, turns: Sequence[SystemTurn], seed: int) -> list[Reply]:
        """Answer a batch of turns; the same seed gives the same replies."""


def system_turns(sessions: Sequence[Session], pack: StickerPack) -> Iterator[SystemTurn]:
    """
    Every System turn with all earlier messages as context (section 6).

    Raises:
        InputError: If a sticker or the database of a session is not in the pack.

    """
    for session in sessions:
        for turn in session.turns:
            for message in (turn.user, turn.system):
                if message.sticker is not None and message.sticker.id not in pack.by_id:
                    raise InputError(f"--sessions: {session.session_id}/{turn.turn}: sticker {message.sticker.id!r} is not in the pack {pack.info.name}.")  # fmt: skip
        if not candidates_of(session, pack):
            raise InputError(f"--sessions: {session.session_id}: database {session.database} is not in the pack {pack.info.name}.")  # fmt: skip
        for turn, context in zip(session.turns, turn_contexts(session, pack), strict=True):
            yield SystemTurn(session, turn, context)


def sent(message: Message, pack: StickerPack) -> Said:
    """A dataset's message as predictions hold it."""
    if message.sticker is None:
        return Said(text=message.text)
    return Said(text=message.text, sticker=sent_sticker(pack.by_id[message.sticker.id]))


def sent_sticker(sticker: Sticker) -> SentSticker:
    """A pack's sticker as predictions hold it."""
    return SentSticker(id=sticker.id, emotion=sticker.emotion, description=sticker.description)


def run_predictions(
    predictor: Predictor,
    turns: Sequence[SystemTurn],
    pack: StickerPack,
    out: Path,
    seed: int = 0,
    batch_size: int = 16,
    on_row: Callable[[int], object] = lambda done: None,
    made_by: Mapping[str, str] = {},
) -> Predictions:
    """
    Write a model's replies to all turns, a batch at a time; the same call goes on where a killed one stopped.

    Batches begin at multiples of `batch_size` and draw from a seed of their own, so an interrupted run ends in the same file as a straight one. Drawn stickers go
    into the folder `<out>.pictures`, and what the replies depend on into `<out>.run.json`.

    Args:
        predictor ([`Predictor`]): Answers.
        turns (`Sequence[SystemTurn]`): All of them, in order.
        pack ([`StickerPack`]): What is known about the stickers.
        out (`Path`): JSON Lines file.
        seed (`int`, *optional*, defaults to 0): Seed of the run.
        batch_size (`int`, *optional*, defaults to 16): Turns at once.
        on_row (`Callable`, *optional*): Called with the number of rows done after each batch.
        made_by (`Mapping[str, str]`, *optional*): What else must be the same to go on: the predictor's settings, and digests of its files.

    Returns:
        [`Predictions`].

    Raises:
        InputError: If `out` holds the rows of another run or of an unknown one, or cannot be written.

    """
    make_folder(out.parent)
    if out.is_dir():
        raise InputError(f"--out {out}: must be a file, not a folder.")
    lines = _whole_lines(out)
    _check_same_origin(out, lines, {**made_by, "stickers": _digest_pack(pack), "batch_size": batch_size})
    _check_same_run(out, lines, turns, pack, predictor.model, seed)
    if len(lines) < len(turns):
        lines = lines[: len(lines) // batch_size * batch_size]
    with out.open("r+b" if out.is_file() else "w+b") as file:
        file.truncate(sum(map(len, lines)))
        file.seek(0, os.SEEK_END)
        for start in range(len(lines), len(turns), batch_size):
            batch = turns[start : start + batch_size]
            replies = predictor(batch, seed_of(f"{seed}/{batch[0].key}"))
            rows = [_row(turn, reply, predictor.model, seed, pack, out) for turn, reply in zip(batch, replies, strict=True)]  # fmt: skip
            file.write(b"".join(row.model_dump_json(exclude_defaults=True).encode() + b"\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())
            on_row(start + len(batch))
    return read_predictions(out)


def _whole_lines(out: Path) -> list[bytes]:
    """Lines that were written to their end."""
    if not out.is_file():
        return []
    return [line for line in out.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def digest_weights(folder: Path) -> str:
    """SHA-256 of an adapter's or a checkpoint's weights and configurations, those of its parts in folders of their own too."""
    digest = hashlib.sha256()
    for file in sorted(file for name in ("*.safetensors", "*config.json") for file in (*folder.glob(name), *folder.glob(f"*/{name}"))):  # fmt: skip
        with file.open("rb") as opened:
            digest.update(f"{file.relative_to(folder)} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _digest_pack(pack: StickerPack) -> str:
    lines = (f"{sticker.model_dump_json()} {pack.databases.get(sticker.id)}\n" for sticker in pack.stickers)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _origin_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.run.json")


def _read_origin(path: Path, option: str) -> dict[str, object]:
    """What made the rows of a file."""
    file = _origin_file(path)
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{option} {path}: has no {file.name} that says what made its rows; choose another file.") from None  # fmt: skip


def _check_same_origin(out: Path, lines: Sequence[bytes], ours: Mapping[str, object]) -> None:
    """Rows that are there were made by what makes the others, as `<out>.run.json` says; before the first row it is written."""
    if not lines:
        write_json(_origin_file(out), dict(ours))
        return
    theirs = _read_origin(out, "--out")
    differing = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    if differing:
        raise InputError(f"--out {out}: was begun with other {', '.join(differing)}; use the same to go on, or choose another file.")  # fmt: skip


def _check_same_run(
    out: Path, lines: Sequence[bytes], turns: Sequence[SystemTurn], pack: StickerPack, model: str, seed: int
) -> None:
    for number, (line, turn) in enumerate(zip(lines, turns, strict=False), start=1):
        try:
            row = Prediction.model_validate_json(line)
        except ValidationError as error:
            raise InputError(f"--out {out}:{number}: {describe(error)}") from None
        found, expected = (row.key, row.model, row.seed), (turn.key, model, seed)
        for field, is_value, must_be in zip(("turn", "model", "seed"), found, expected, strict=True):
            if is_value != must_be:
                raise InputError(f"--out {out}:{number}: {field}: this run has {must_be!r}, the file {is_value!r}; choose another file.")  # fmt: skip
        if not _answers(row, turn, pack):
            raise InputError(f"--out {out}:{number}: context: {turn.key} is not as in this run's sessions; choose another file.")  # fmt: skip
    if len(lines) > len(turns):
        raise InputError(f"--out {out}:{len(turns) + 1}: turn: this run has no more than {len(turns)} turns.")


def _answers(row: Prediction, turn: SystemTurn, pack: StickerPack) -> bool:
    return (row.context, row.reference) == (_context(turn, pack), sent(turn.turn.system, pack))


def _context(turn: SystemTurn, pack: StickerPack) -> tuple[Line, ...]:
    context = []
    for past in turn.session.turns[: turn.turn.turn]:
        context.append(Line(role="user", **dict(sent(past.user, pack))))
        if past.turn < turn.turn.turn:
            context.append(Line(role="assistant", **dict(sent(past.system, pack))))
    return tuple(context)


def _row(turn: SystemTurn, reply: Reply, model: str, seed: int, pack: StickerPack, out: Path) -> Prediction:
    sticker = sent_sticker(pack.by_id[reply.sticker_id]) if reply.sticker_id else None
    session, number = turn.session, turn.turn.turn
    if reply.drawn is not None:
        folder = out.with_name(f"{out.name}.pictures")
        folder.mkdir(exist_ok=True)
        name = f"{hashlib.sha256(session.session_id.encode()).hexdigest()[:16]}-{number}.png"
        reply.drawn.save(folder / name)
        sticker = SentSticker(picture=f"{folder.name}/{name}")
    return Prediction(
        session_id=session.session_id,
        turn=number,
        context=_context(turn, pack),
        reference=sent(turn.turn.system, pack),
        predicted=Said(text=reply.text, sticker=sticker),
        gold_rank=reply.gold_rank,
        candidates=reply.candidates,
        sticker_logit=reply.sticker_logit,
        model=model,
        seed=seed,
    )


def candidates_of(session: Session, pack: StickerPack) -> list[str]:
    """Stickers that a session can send: of its database, or where it has none, all that its split may use."""
    if session.database is not None and pack.databases:
        stickers = pack.database(session.database)
    else:
        stickers = pack.split(session.split) if pack.databases else pack.stickers
    return [sticker.id for sticker in stickers]


def first_unsent(turn: SystemTurn, ranked: Sequence[str]) -> str:
    """The best of ranked stickers that the System has not sent yet, as in the chat."""
    past = turn.session.turns[: turn.turn.turn - 1]
    seen = {before.system.sticker.id for before in past if before.system.sticker}
    return next((sticker_id for sticker_id in ranked if sticker_id not in seen), ranked[0])


class PegsPredictor:
    """
    PEGS under evaluation: replies in batches, stickers from the session's own database.

    Args:
        pipeline ([`PegsPipeline`]): Model, pack and decoder.
        variant (`str`): `"ret"`, `"gen"` or `"rag"`.
        model (`str`): Name that the rows carry.
        words ([`Predictions`], *optional*): Of the same checkpoint with another variant: words, timing and scores are theirs, and only stickers are made. Variants
            of a checkpoint differ in nothing else.
        generate_kwargs: More arguments of `PegsModel.generate`.

    """

    def __init__(
        self,
        pipeline: PegsPipeline,
        variant: str,
        model: str,
        words: Predictions | None = None,
        **generate_kwargs: object,
    ) -> None:
        self.pipeline, self.variant, self.model, self.generate_kwargs = pipeline, variant, model, generate_kwargs
        self.words = words
        self.pack: StickerPack = pipeline.pack  # type: ignore[assignment]
        self.rows = {sticker_id: row for row, sticker_id in enumerate(pipeline.pack_ids)}

    def __call__(self, turns: Sequence[SystemTurn], seed: int) -> list[Reply]:
        """Answer a batch of turns; see [`Predictor`]."""
        if self.words is not None:
            return self._repeat(self.words, turns, seed)
        processor, model = self.pipeline.processor, self.pipeline.model
        inputs = processor.apply_chat_template(
            [turn.context for turn in turns], add_generation_prompt=True, tokenize=True, return_tensors="pt"
        ).to(model.device)
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # noqa: TID251  transformers samples from the global generator only
            output = model.generate(**inputs, **self.generate_kwargs)
        new_ids = output.sequences[:, inputs["input_ids"].shape[1] :]
        replies = [Reply(processor.decode(ids, skip_special_tokens=True).strip()) for ids in new_ids]
        sending = output.sticker_mask.nonzero().flatten().tolist()
        queries, prompt_embeds = output.sticker_queries, output.sticker_prompt_embeds
        self._send(
            turns,
            replies,
            sending,
            None if queries is None else queries[sending],
            None if prompt_embeds is None else prompt_embeds[sending],
            seed,
        )
        self._score_references(turns, replies)
        return replies

    @torch.no_grad()
    def _repeat(self, words: Predictions, turns: Sequence[SystemTurn], seed: int) -> list[Reply]:
        """The words as they were, with stickers of this variant."""
        rows = words.replies_to(turns, self.pack)
        replies = [Reply(r.predicted.text, None, None, r.gold_rank, r.candidates, r.sticker_logit) for r in rows]
        sending = [number for number, row in enumerate(rows) if row.predicted.sticker is not None]
        if not sending:
            return replies
        model = self.pipeline.model
        _, spans = self._after([turns[row] for row in sending], [replies[row].text for row in sending])
        count = model.config.num_retrieval_tokens
        queries = model.retrieval_head.embed_text(spans[:, :count]).float() if count else None
        prompt_embeds = model.feature_mapper(spans[:, count:]).float() if self.variant != "ret" else None
        self._send(turns, replies, sending, queries, prompt_embeds, seed)
        return replies

    def _send(
        self,
        turns: Sequence[SystemTurn],
        replies: Sequence[Reply],
        sending: Sequence[int],
        queries: torch.Tensor | None,
        prompt_embeds: torch.Tensor | None,
        seed: int,
    ) -> None:
        """Give the replies `sending` their stickers, by a row of `queries` and `prompt_embeds` each: drawn, or the nearest one that was not sent before."""
        best = {}
        if queries is not None:
            for row, query in zip(sending, queries, strict=True):
                best[row] = first_unsent(turns[row], self._ranked(turns[row].session, query))
        if self.variant == "ret":
            for row, sticker_id in best.items():
                replies[row].sticker_id = sticker_id
        elif sending:
            self._draw(replies, sending, prompt_embeds, best, seed)

    def _ranked(self, session: Session, query: torch.Tensor) -> list[str]:
        ids = candidates_of(session, self.pack)
        vectors = self.pipeline.pack_embeds[[self.rows[i] for i in ids]]
        order = (vectors @ query.to(vectors)).argsort(descending=True, stable=True)
        return [ids[i] for i in order.tolist()]

    def _draw(
        self,
        replies: Sequence[Reply],
        sending: Sequence[int],
        prompt_embeds: torch.Tensor | None,
        best: dict[int, str],
        seed: int,
    ) -> None:
        """Draw the stickers of a batch; one that the safety check blocks is left out."""
        assert prompt_embeds is not None
        drawn = self.pipeline.decoder(
            prompt_embeds=prompt_embeds,
            init_image=[self.pack.image(best[row]) for row in sending] if self.variant == "rag" else None,
            generator=[torch.Generator().manual_seed((seed + row) % 2**31) for row in sending],
        )
        for row, image, blocked in zip(sending, drawn.images, drawn.blocked, strict=True):
            replies[row].drawn = None if blocked is not None else image

    @torch.no_grad()
    def _score_references(self, turns: Sequence[SystemTurn], replies: Sequence[Reply]) -> None:
        """After the reference's text: would a sticker follow, and where does the gold one rank? One forward pass, no sampling."""
        model = self.pipeline.model
        odds, spans = self._after(turns, [turn.turn.system.text for turn in turns])
        for row, (turn, reply) in enumerate(zip(turns, replies, strict=True)):
            reply.sticker_logit = odds[row]
            sticker = turn.turn.system.sticker
            if sticker is None or model.retrieval_head is None:
                continue
            query = model.retrieval_head.embed_text(spans[row : row + 1, : model.config.num_retrieval_tokens])[0]
            reply.score_reference(self._ranked(turn.session, query.float()), sticker.id)

    def _after(self, turns: Sequence[SystemTurn], said: Sequence[str]) -> tuple[list[float], torch.Tensor]:
        """After each turn's context and these words: log-odds of a sticker, and the [IMG] span's hidden states `(B, r, d)`."""
        processor, model = self.pipeline.processor, self.pipeline.model
        last = [{"role": "assistant", "content": [{"type": "text", "text": text}]} for text in said]
        dialogues = [[*turn.context, message] for turn, message in zip(turns, last, strict=True)]
        texts = [
            text.rpartition(processor.tokenizer.eos_token)[0] for text in processor.apply_chat_template(dialogues)
        ]
        images = [p["image"] for d in dialogues for m in d for p in m["content"] if p["type"] == "image"]
        inputs = processor(
            texts, images, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        ).to(model.device)
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        eos = model.generation_config.eos_token_id
        logits = output.logits[:, -1].float()
        ends = logits[:, eos if isinstance(eos, list) else [eos]].logsumexp(-1)
        odds = (logits[:, model.config.img_token_ids[0]] - ends).tolist()
        return odds, model.compute_img_span(inputs["attention_mask"], output.past_key_values)
