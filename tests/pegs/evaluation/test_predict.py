"""Predictions: what rows hold, batches, kills, and files that are wrong."""

import json

import pytest
import torch

from pegs import adapters, assemble
from pegs.errors import InputError
from pegs.evaluation.predict import (
    PegsPredictor,
    Predictions,
    Reply,
    SentSticker,
    common_turns,
    digest_weights,
    read_all,
    read_predictions,
    run_predictions,
    system_turns,
)
from pipelines.pipeline_pegs import PegsPipeline
from pipelines.pipeline_sticker import StickerPipelineOutput
from tests.fixtures import tiny
from tests.pegs.evaluation import make


PACK = make.make_pack()


class Killed(Exception):
    pass


class Echo:
    """Repeats the user, sends a sticker on odd turns, draws one on turn 3; dies after so many batches."""

    model = "echo"

    def __init__(self, batches: int = 99):
        self.batches, self.asked = batches, []

    def __call__(self, turns, seed):
        if not self.batches:
            raise Killed
        self.batches -= 1
        self.asked += [(turn.session.session_id, turn.turn.turn) for turn in turns]
        return [
            Reply(f"{turn.turn.user.text} {seed}", "red" if turn.turn.turn == 1 else None, tiny.picture() if turn.turn.turn == 3 else None)
            for turn in turns
        ]  # fmt: skip


@pytest.fixture
def turns():
    return list(system_turns([make.make_session("one"), make.make_session("two", 4)], PACK))


def test_a_row_holds_context_reference_and_reply(turns, tmp_path):
    run = run_predictions(Echo(), turns, PACK, tmp_path / "echo.jsonl", batch_size=2)
    assert run.keys == ["one/1", "one/2", "one/3", "two/1", "two/2", "two/3", "two/4"] and run.model == "echo"
    first, third = run.rows[0], run.rows[2]
    assert [line.role for line in third.context] == ["user", "assistant", "user", "assistant", "user"]
    assert third.context[2].sticker.id == "blue" and third.context[1].sticker.emotion == "happiness"
    assert third.reference.text == "system line 3" and third.reference.sticker.description == "a white square"
    assert first.predicted.sticker.id == "red" and run.rows[1].predicted.sticker is None
    drawn = third.predicted.sticker
    assert drawn.id is None and run.image(drawn, PACK).size == (40, 40)


@pytest.mark.parametrize("torn", [b"", b'{"session_id": "one", "tu'])
@pytest.mark.parametrize("batches", [0, 1, 2, 3])
def test_a_killed_run_goes_on_to_the_same_file(turns, tmp_path, batches, torn):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run_predictions(Echo(), turns, PACK, whole, batch_size=2)
    with pytest.raises(Killed):
        run_predictions(Echo(batches), turns, PACK, cut, batch_size=2)
    if batches:
        kept = cut.read_bytes().splitlines(keepends=True)
        cut.write_bytes(b"".join(kept[: 2 * batches - 1]) + torn)  # killed while it wrote
    again = Echo()
    run_predictions(again, turns, PACK, cut, batch_size=2)
    assert cut.read_bytes().replace(b"cut.jsonl.pictures", b"whole.jsonl.pictures") == whole.read_bytes()
    assert len(again.asked) == len(turns) - 2 * max(0, batches - 1)
    idle = Echo()
    run_predictions(idle, turns, PACK, cut, batch_size=2)
    assert idle.asked == []


@pytest.mark.parametrize(("seed", "model", "said"), [(1, "echo", "seed: this run has 1, the file 0"), (0, "other", "model: this run has 'other'")])  # fmt: skip
def test_another_runs_file_is_not_touched(turns, tmp_path, seed, model, said):
    out = tmp_path / "echo.jsonl"
    run_predictions(Echo(), turns, PACK, out)
    before, predictor = out.read_bytes(), Echo()
    predictor.model = model
    with pytest.raises(InputError, match=f"echo.jsonl:1: {said}"):
        run_predictions(predictor, turns, PACK, out, seed=seed)
    with pytest.raises(InputError, match="echo.jsonl:4: turn: this run has no more than 3 turns"):
        run_predictions(Echo(), turns[:3], PACK, out)
    assert out.read_bytes() == before


@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize(("pack", "model", "batch_size", "said"), [(PACK, "old", 3, "batch_size"), (PACK, "new", 2, "model"), (make.make_pack(databases=False), "old", 2, "stickers")])  # fmt: skip
def test_rows_that_something_else_made_are_not_taken_for_its_own(turns, tmp_path, batches, pack, model, batch_size, said):  # fmt: skip
    out = tmp_path / "echo.jsonl"
    if batches == 4:
        run_predictions(Echo(), turns, PACK, out, batch_size=2, made_by={"model": "old"})
    else:
        with pytest.raises(Killed):
            run_predictions(Echo(batches), turns, PACK, out, batch_size=2, made_by={"model": "old"})
    before = out.read_bytes()
    with pytest.raises(InputError, match=f"echo.jsonl: was begun with other {said}; use the same"):
        run_predictions(Echo(), turns, pack, out, batch_size=batch_size, made_by={"model": model})
    assert out.read_bytes() == before
    assert len(run_predictions(Echo(), turns, PACK, out, batch_size=2, made_by={"model": "old"}).rows) == len(turns)


def test_rows_of_unknown_origin_are_read_but_not_gone_on_with(turns, tmp_path):
    out = tmp_path / "echo.jsonl"
    run_predictions(Echo(), turns, PACK, out)
    (tmp_path / "echo.jsonl.run.json").unlink()
    with pytest.raises(InputError, match=r"echo.jsonl: has no echo.jsonl.run.json that says what made its rows"):
        run_predictions(Echo(), turns, PACK, out)
    assert len(read_predictions(out).rows) == len(turns)


def test_rows_of_sessions_that_were_changed_are_not_taken_for_theirs(turns, tmp_path):
    out = tmp_path / "echo.jsonl"
    run_predictions(Echo(), turns[:3], PACK, out)
    assert len(run_predictions(Echo(), turns, PACK, out).rows) == len(turns)  # more sessions are no other ones
    session = turns[0].session
    last = session.turns[2].model_copy(update={"system": make.said("something else", None)})
    changed = session.model_copy(update={"turns": (*session.turns[:2], last)})
    with pytest.raises(InputError, match="echo.jsonl:3: context: one/3 is not as in this run's sessions"):
        run_predictions(Echo(), list(system_turns([changed], PACK)), PACK, out)


def test_predictions_of_an_old_checkpoint_are_not_those_of_a_retrained_one(predictor, tmp_path, monkeypatch):
    monkeypatch.setattr(assemble, "load_pipeline", lambda *_: predictor("ret", None).pipeline)
    checkpoint = tmp_path / "checkpoint"
    (checkpoint / "adapter").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "adapter/adapter_model.safetensors"):
        (checkpoint / name).write_text("old")
    PACK.save(tmp_path / "pack")
    (tmp_path / "sessions.jsonl").write_text(make.make_session("one", 1).model_dump_json())
    command = ("predict", "--sessions", tmp_path / "sessions.jsonl", "--stickers", tmp_path / "pack", "--model", checkpoint, "--out", tmp_path / "ret.jsonl")  # fmt: skip
    for _ in range(2):
        done = make.pegs(*command)
        assert done.returncode == 0, done.stderr
    (checkpoint / "adapter" / "adapter_model.safetensors").write_text("new")
    done = make.pegs(*command)
    assert done.returncode == 2 and "ret.jsonl: was begun with other model" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("variant", ["ret", "gen", "rag"])
def test_another_checkpoints_words_are_not_repeated(turns, tmp_path, variant):
    (tmp_path / "checkpoint").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "checkpoint" / name).write_text("ours")
    PACK.save(tmp_path / "pack")
    (tmp_path / "sessions.jsonl").write_text(make.make_session().model_dump_json())
    words = tmp_path / "words.jsonl"

    def refusal(model, pack=PACK, seed=0):
        words.unlink(missing_ok=True)
        run_predictions(Echo(), turns[:3], pack, words, seed, made_by={"model": model})
        done = make.pegs("predict", "--sessions", tmp_path / "sessions.jsonl", "--stickers", tmp_path / "pack", "--model", tmp_path / "checkpoint", "--variant", variant, "--replies", words, "--out", tmp_path / "out.jsonl")  # fmt: skip
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
        return done.stderr

    ours = digest_weights(tmp_path / "checkpoint")
    assert f"--replies {words}: was made with other model; its words" in refusal("theirs")
    assert "was made with other seed;" in refusal(ours, seed=1)
    assert "was made with other stickers;" in refusal(ours, make.make_pack(databases=False))
    assert "--replies" not in refusal(ours)  # the checkpoint is no real one
    (tmp_path / "words.jsonl.run.json").unlink()
    with pytest.raises(InputError, match=r"--replies .*words.jsonl: has no words.jsonl.run.json"):
        read_predictions(words).check_words(ours, PACK, 0)


def test_a_digest_is_of_weights_and_configurations_alone(tmp_path):
    def digest(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return digest_weights(tmp_path)

    first = digest("model.safetensors", "a")
    assert (
        digest("README.md", "a") == digest("figures.json", "a") == digest("trainer/step/x.safetensors", "a") == first
    )
    others = [digest(name, "a") for name in ("unet/diffusion.safetensors", "generation_config.json", "unet/config.json")]  # fmt: skip
    assert len({first, *others, digest("model.safetensors", "b")}) == 5


@pytest.mark.parametrize("picture", ["../secret.png", "{tmp}/secret.png", "link.png", "deep/../../secret.png"])
def test_a_picture_outside_of_the_predictions_folder_is_refused(tmp_path, picture):
    (tmp_path / "secret.png").write_bytes(make.png("red"))
    run = make.make_run(tmp_path / "predictions", "one")
    (tmp_path / "predictions" / "deep").mkdir()
    (tmp_path / "predictions" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(InputError, match=r"one.jsonl: picture .*png: must be in the folder of the predictions"):
        run.picture_bytes(SentSticker(picture=picture.format(tmp=tmp_path)), PACK)


def test_sessions_of_another_pack_are_named(tmp_path):
    PACK.save(tmp_path / "pack")
    stranger = make.make_session()
    use = make.said("hi", "red").sticker.model_copy(update={"id": "mauve"})
    turn = stranger.turns[0].model_copy(update={"user": stranger.turns[0].user.model_copy(update={"sticker": use})})
    for session, said in (
        (stranger.model_copy(update={"turns": (turn, *stranger.turns[1:])}), "one/1: sticker 'mauve' is not in the pack"),
        (stranger.model_copy(update={"database": 9}), "one: database 9 is not in the pack"),
    ):  # fmt: skip
        (tmp_path / "sessions.jsonl").write_text(session.model_dump_json())
        done = make.pegs("predict", "--sessions", tmp_path / "sessions.jsonl", "--stickers", tmp_path / "pack", "--out", tmp_path / "out.jsonl")  # fmt: skip
        assert done.returncode == 2 and f"--sessions: {said} squares." in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [(None, "No such file"), ("{", "JSONDecodeError"), ("{}", "KeyError: 'base_model_name_or_path'"), ("[]", "TypeError")],
)  # fmt: skip
def test_a_baseline_that_is_no_adapter_is_named_by_its_option(tmp_path, config, said):
    PACK.save(tmp_path / "pack")
    (tmp_path / "sessions.jsonl").write_text(make.make_session().model_dump_json())
    if config is not None:
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text(config)
    done = make.pegs("predict", "--sessions", tmp_path / "sessions.jsonl", "--stickers", tmp_path / "pack", "--variant", "text", "--baseline", tmp_path / "adapter", "--out", tmp_path / "out.jsonl")  # fmt: skip
    assert done.returncode == 2 and f"--baseline {tmp_path}/adapter: " in done.stderr and said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device")
def test_a_baseline_on_a_device_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "load_adapted", lambda *_: (torch.nn.Linear(1, 1), None))
    PACK.save(tmp_path / "pack")
    (tmp_path / "sessions.jsonl").write_text(make.make_session().model_dump_json())
    done = make.pegs("predict", "--sessions", tmp_path / "sessions.jsonl", "--stickers", tmp_path / "pack", "--variant", "text", "--baseline", tmp_path, "--device", "cuda", "--out", tmp_path / "out.jsonl")  # fmt: skip
    assert done.returncode == 2 and "--device cuda: " in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(("out", "said"), [("folder", "must be a file"), ("file/x.jsonl", "must be a folder")])
def test_an_out_of_the_wrong_kind_is_named(turns, tmp_path, out, said):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"--out .*: {said}"):
        run_predictions(Echo(), turns, PACK, tmp_path / out)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row.pop("seed"), ":2: seed: Field required"),
        (lambda row: row["predicted"].pop("text"), ":2: predicted.text: Field required"),
        (lambda row: row["reference"].update(sticker={"emotion": "joy", "id": "x"}), ":2: reference.sticker.emotion: Input should be 'anger'"),
        (lambda row: row["reference"].update(sticker={"id": "x", "picture": "y"}), ":2: reference.sticker: Value error, a sticker has either"),
        (lambda row: row.update(turn=1), ":2: turn: one/1 was there before"),
        (lambda row: row.update(model="b"), ":2: model: expected 'echo' as in line 1, got 'b'"),
        (lambda row: row.update(extra=1), ":2: extra: Extra inputs"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_by_file_line_and_field(turns, tmp_path, change, said):
    out = tmp_path / "echo.jsonl"
    run_predictions(Echo(), turns, PACK, out)
    lines = out.read_text().splitlines()
    row = json.loads(lines[1])
    change(row)
    out.write_text("\n".join([lines[0], json.dumps(row), *lines[2:]]))
    with pytest.raises(InputError) as caught:
        read_predictions(out)
    assert f"{out}{said}" in str(caught.value) and "\n" not in str(caught.value)


def test_turns_of_other_sessions_are_not_compared(tmp_path):
    one, other = (make.make_run(tmp_path, model) for model in ("one", "other"))
    assert common_turns([one, other]) == one.keys
    rows = [row.model_copy(update={"context": other.rows[0].context}) for row in other.rows]
    with pytest.raises(InputError, match=r"other.jsonl: context: s0/2 is not as in .*one.jsonl"):
        common_turns([one, make.write(other.path, rows)])


def test_files_that_are_not_there_empty_or_of_one_model(tmp_path, turns):
    (tmp_path / "empty.jsonl").touch()
    for name, said in (("none.jsonl", "No such file"), ("empty.jsonl", "has no rows")):
        with pytest.raises(InputError, match=said):
            read_predictions(tmp_path / name)
    for name in ("a.jsonl", "b.jsonl"):
        run_predictions(Echo(), turns, PACK, tmp_path / name)
    with pytest.raises(InputError, match=r"b.jsonl: model: 'echo' is also in .*a.jsonl"):
        read_all([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])


def test_a_split_without_sessions_is_named(tmp_path):
    (tmp_path / "sessions.jsonl").write_text(make.make_session().model_dump_json())
    done = make.pegs("predict", "--sessions", tmp_path / "sessions.jsonl", "--split", "train", "--out", tmp_path / "out.jsonl")  # fmt: skip
    assert done.returncode == 2 and "no session is of the split 'train'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.fixture
def predictor(model, processor, decoder):
    vectors = torch.nn.functional.normalize(torch.randn(6, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    pipeline = PegsPipeline(model, processor, PACK, vectors, decoder)
    return lambda variant, bias: PegsPredictor(pipeline, variant, f"pegs-{variant}", sticker_bias=bias, max_new_tokens=4, forced_eos_token_id=tiny.EOS)  # fmt: skip


def test_pegs_retrieves_in_the_sessions_database_and_repeats_itself(predictor, turns):
    replies = predictor("ret", torch.inf)(turns[:3], 5)
    assert all(reply.sticker_id in ("yellow", "white", "blue") for reply in replies)
    assert replies[1].sticker_id != "yellow" and replies[2].sticker_id != "yellow"  # was sent in turn 1
    again = predictor("ret", torch.inf)(turns[:3], 5)
    assert [r.text for r in again] == [r.text for r in replies]
    assert [r.sticker_id is None for r in predictor("ret", -torch.inf)(turns[:3], 5)] == [True] * 3


@pytest.mark.parametrize("variant", ["gen", "rag"])
def test_pegs_draws(predictor, turns, variant):
    replies = predictor(variant, torch.inf)(turns[:2], 5)
    assert all(reply.drawn is not None and reply.sticker_id is None for reply in replies)


@pytest.mark.parametrize("variant", ["gen", "rag"])
def test_a_blocked_drawing_leaves_the_reply_without_a_sticker(predictor, turns, variant):
    answer = predictor(variant, torch.inf)
    answer.pipeline.decoder = lambda **_: StickerPipelineOutput([tiny.picture()] * 2, ["unsafe", None])
    blocked, drawn = answer(turns[:2], 5)
    assert blocked.drawn is None and blocked.sticker_id is None and drawn.drawn is not None


def test_another_variant_keeps_words_timing_and_scores(predictor, turns, tmp_path):
    ret, gen = predictor("ret", 0.0), predictor("gen", 0.0)
    words = run_predictions(ret, turns, PACK, tmp_path / "ret.jsonl", batch_size=3)
    sent = [row.predicted.sticker is not None for row in words.rows]
    assert any(sent) and not all(sent)
    gen.words = words
    run = run_predictions(gen, turns, PACK, tmp_path / "gen.jsonl", batch_size=3)
    kept = ("gold_rank", "candidates", "sticker_logit")
    assert [[getattr(row, name) for name in kept] for row in run.rows] == [[getattr(row, name) for name in kept] for row in words.rows]  # fmt: skip
    assert [row.predicted.text for row in run.rows] == [row.predicted.text for row in words.rows]
    assert [bool(row.predicted.sticker and row.predicted.sticker.picture) for row in run.rows] == sent
    gen.words = Predictions(words.path, words.rows[:2])
    with pytest.raises(InputError, match=r"--replies .*ret.jsonl: has no turn one/3"):
        gen(turns[:3], 0)
    said = turns[0].turn.model_copy(update={"user": make.said("something else", None)})
    changed = turns[0].session.model_copy(update={"turns": (said, *turns[0].session.turns[1:])})
    with pytest.raises(InputError, match=r"--replies .*ret.jsonl: context: one/1 is not as in this run's sessions"):
        gen(list(system_turns([changed], PACK)), 0)


def test_scores_after_the_reference_do_not_depend_on_the_batch(predictor, turns):
    answer = predictor("ret", -torch.inf)
    together = answer(turns[:3], 1)
    for alone, reply in zip([answer([turn], 1)[0] for turn in turns[:3]], together, strict=True):
        assert alone.sticker_logit == pytest.approx(reply.sticker_logit, abs=1e-4)
        assert alone.gold_rank == reply.gold_rank
    assert [reply.candidates for reply in together] == [3, None, 3] and together[1].gold_rank is None


def test_the_gold_rank_is_that_of_a_whole_forward_pass(predictor, turns):
    """The span written out after the reference's text, in one pass without a cache."""
    answer, turn = predictor("ret", -torch.inf), turns[2]
    pipeline = answer.pipeline
    gold = {"type": "text", "text": turn.turn.system.text}
    dialogue = [*turn.context, {"role": "assistant", "content": [gold, {"type": "image", "image": make.png("red")}]}]
    inputs = pipeline.processor.apply_chat_template(dialogue, tokenize=True, return_tensors="pt")
    with torch.no_grad():
        output = pipeline.model(**inputs)
        spans = pipeline.model.get_img_hidden_states(inputs["input_ids"], output.last_hidden_state)
        query = pipeline.model.retrieval_head.embed_text(spans[-1:, :2])[0]
    ids = ["yellow", "white", "blue"]
    scores = pipeline.pack_embeds[[pipeline.pack_ids.index(i) for i in ids]] @ query
    expected = scores.argsort(descending=True).tolist().index(1)
    assert answer([turn], 1)[0].gold_rank == expected
    where = int((inputs["input_ids"][0] == pipeline.model.config.img_token_ids[0]).nonzero()[-1]) - 1
    logits = output.logits[0, where]
    odds = logits[pipeline.model.config.img_token_ids[0]] - logits[tiny.EOS]
    assert answer([turn], 1)[0].sticker_logit == pytest.approx(odds.item(), abs=1e-4)
