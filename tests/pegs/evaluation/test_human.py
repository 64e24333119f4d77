"""The questionnaire without a browser: who may do what, what is saved, fuzzed forms; and the analysis."""

import asyncio
import random
import re
import socket
import sqlite3
import string

import numpy as np
import pytest
from starlette.testclient import TestClient

from pegs.errors import InputError
from pegs.evaluation import human
from pegs.evaluation.human import Study, analyze, begin_study, export_ratings, intraclass
from pegs.evaluation.predict import Said, SentSticker
from pegs.evaluation.questionnaire import make_app
from tests.pegs.evaluation import make


PACK = make.make_pack()
SHROUT_AND_FLEISS = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]


def make_study(folder, raters=3, sessions=4, models=("alpha", "beta", "gamma")):
    runs = [make.make_run(folder / "predictions", model, every=n + 1) for n, model in enumerate(models)]
    return begin_study(folder / "study", runs, PACK, raters, sessions, 0)


def tokens(study):
    return [token for _, token in study.links()]


def pages(study, rater):
    return [study.page(rater, n) for n in range(1, len(study.progress(rater)) + 1)]


def fill(study, rater, score=lambda page, question: 3):
    for page in pages(study, rater):
        study.save(rater, page.position, {q.key: str(score(page, q)) for q in page.questions})


def models_of(study, rater):
    with study.open() as db:
        return dict(db.execute("SELECT position, model FROM pages WHERE rater = ?", (rater,)))


def test_icc_equals_shrout_and_fleiss_1979():
    """Their worked example: 6 targets, 4 judges; Table 4's six coefficients, and the interval of ICC(2,1) that later texts print."""
    found = intraclass(SHROUT_AND_FLEISS)
    values = [found[form]["value"] for form in ("ICC1", "ICC2", "ICC3", "ICC1k", "ICC2k", "ICC3k")]
    assert values == pytest.approx([0.17, 0.29, 0.71, 0.44, 0.62, 0.91], abs=0.005)
    assert (found["ICC1"]["low"], found["ICC1"]["high"]) == pytest.approx((-0.13, 0.72), abs=0.01)
    assert (found["ICC2"]["low"], found["ICC2"]["high"]) == pytest.approx((0.02, 0.76), abs=0.01)
    assert (found["ICC3"]["low"], found["ICC3"]["high"]) == pytest.approx((0.34, 0.95), abs=0.01)
    assert found["targets"] == 6 and found["raters"] == 4


@pytest.mark.parametrize("scores", [[], [[1, 2]], [[1], [2]], [[3, 3]] * 5, [[1, 2], [2, 1]]])
def test_icc_of_too_little_is_none(scores):
    assert intraclass(scores) is None


def test_every_rater_gets_all_replies_in_an_order_of_its_own(tmp_path):
    study = make_study(tmp_path)
    orders = []
    for rater in (1, 2, 3):
        mine = pages(study, rater)
        replies = [page for page in mine if page.kind == "reply"]
        assert len(replies) == 4 * 3 and sum(page.kind == "check" for page in mine) == 1
        assert [page.number for page in replies] == [1, 2, 3] * 4  # a conversation's replies follow each other
        orders.append([page.reply["text"] for page in replies])
        assert mine[-1].kind == "diversity" and mine[0].kind == "reply"
    assert len({tuple(order) for order in orders}) == 3 and len({tuple(sorted(order)) for order in orders}) == 1


def test_what_is_asked_depends_on_what_is_shown(tmp_path):
    study = make_study(tmp_path)
    for page in pages(study, 1):
        asked = {question.key for question in page.questions}
        if page.kind == "diversity":
            assert asked == {"StiD"} and len(page.stickers) > 1
        else:
            assert {"Et", "Con", "Flu", "Inf"} <= asked and "StiGQ" not in asked  # all stickers here are the pack's
            assert ("Es" in asked) == (page.reply["picture"] is not None)


def test_pages_do_not_say_whose_reply_it_is(tmp_path):
    study = make_study(tmp_path, models=("zebra-model", "yak-model"))
    client = TestClient(make_app(study))
    for position in range(1, len(study.progress(1)) + 1):
        text = client.get(f"/r/{tokens(study)[0]}/{position}").text
        text = re.sub(r"(zebra|yak)-model hears you", "", text)  # the reply's own words
        assert "-model" not in text and "jsonl" not in text, position


def test_a_wrong_link_gets_403_and_a_right_one_its_pages_only(tmp_path):
    study = make_study(tmp_path)
    client, mine = TestClient(make_app(study), follow_redirects=False), tokens(study)[0]
    for wrong in ("x", mine[:-1], mine + "a", mine.swapcase(), "'; DROP TABLE answers; --", "%00"):
        for path in ("", "/1", "/picture/abc", "/999"):
            assert client.get(f"/r/{wrong}{path}").status_code == 403, wrong + path
        assert client.post(f"/r/{wrong}/1", data={"Et": "3"}).status_code == 403
    assert client.get(f"/r/{mine}").status_code == client.get(f"/r/{mine}/1").status_code == 200
    for path in ("/0", "/999", "/-1", "/1e1", "/٣", "/picture/abc"):
        assert client.get(f"/r/{mine}{path}").status_code == 404, path
    assert client.get("/").status_code == client.get("/static/page.html.jinja").status_code == 404
    answer = client.get(f"/r/{mine}/1")
    assert "default-src 'none'" in answer.headers["content-security-policy"] and answer.headers["referrer-policy"] == "no-referrer"  # fmt: skip
    assert all(token not in client.get(f"/r/{mine}/1").text for token in tokens(study)[1:])


def test_answers_are_saved_one_by_one_and_the_page_asks_for_the_rest(tmp_path):
    study = make_study(tmp_path)
    client, mine = TestClient(make_app(study), follow_redirects=False), tokens(study)[0]
    page = study.page(1, 1)
    first, *others = [q.key for q in page.questions]
    assert client.post(f"/r/{mine}/1", data={first: "4"}, headers={"x-autosave": "1"}).status_code == 204
    again = Study(tmp_path / "study").page(1, 1)
    assert again.scores == {first: 4} and not again.is_done
    left = client.post(f"/r/{mine}/1", data={first: "5"})
    assert left.status_code == 422 and f"{len(others)} questions are left" in left.text and 'class="missing"' in left.text  # fmt: skip
    done = client.post(f"/r/{mine}/1", data=dict.fromkeys([first, *others], "2"))
    assert done.status_code == 303 and done.headers["location"] == f"/r/{mine}/2"
    assert study.page(1, 1).scores == dict.fromkeys([first, *others], 2)
    assert "Go on with page 2" in client.get(f"/r/{mine}").text
    for bad in ({first: "6"}, {first: "0"}, {first: "3.5"}, {"Nope": "3"}, {first: "3", "Nope": "3"}, {first: "٣"}):
        assert client.post(f"/r/{mine}/1", data=bad).status_code == 400
    assert client.post(f"/r/{mine}/1", content=b"a" * 5000).status_code == 413
    assert study.page(1, 1).scores[first] == 2
    fill(study, 1)
    assert "Thank you" in client.get(f"/r/{mine}").text


async def post(app, path, body, header):
    """One POST into the ASGI app, without a client between."""
    status = []
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": header, "http_version": "1.1", "scheme": "http", "server": ("t", 80), "client": ("c", 1), "root_path": ""}  # fmt: skip

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        if message["type"] == "http.response.start":
            status.append(message["status"])

    await app(scope, receive, send)
    return status[0]


def test_ten_thousand_fuzzed_posts_change_no_other_raters_rows(tmp_path):
    study = make_study(tmp_path)
    fill(study, 2)
    fill(study, 3, lambda page, question: 5)
    app, mine = make_app(study), tokens(study)[0]

    def rows(where):
        with study.open() as db:
            return {table: db.execute(f"SELECT * FROM {table} {where if table in ('answers', 'pages') else ''} ORDER BY 1, 2").fetchall() for table in ("answers", "pages", "raters", "items", "replies", "study")}  # fmt: skip

    before = rows("WHERE rater > 1")
    rng = random.Random(0)
    keys = ["Et", "Es", "Con", "Flu", "Inf", "StiGQ", "StiD", "rater", "token", "position", "", "Et'--", "答"]
    values = ["1", "3", "5", "0", "6", "-1", "", "1e0", "NaN", "2; DROP TABLE answers", "%00", "99999999999999999999", "é", "1&Et=2"]  # fmt: skip
    places = [str(n) for n in range(-1, 20)] + ["a", "1/../2", "9" * 30, "%2e%2e", "1;2", "0x1"]
    links = [mine] * 6 + [mine[:-1], mine + "x", "", "..", "null"] + ["".join(rng.choices(string.ascii_letters, k=32))]

    def body():
        if rng.random() < 0.2:
            return rng.randbytes(rng.randrange(200))
        return "&".join(f"{rng.choice(keys)}={rng.choice(values)}" for _ in range(rng.randrange(6))).encode()

    async def fuzz():
        seen = set()
        for _ in range(100):
            batch = [post(app, f"/r/{rng.choice(links)}/{rng.choice(places)}", body(), rng.choice([[], [(b"x-autosave", b"1")]])) for _ in range(100)]  # fmt: skip
            seen.update(await asyncio.gather(*batch))
        return seen

    assert asyncio.run(fuzz()) <= {204, 303, 400, 403, 404, 422}
    assert rows("WHERE rater > 1") == before
    with sqlite3.connect(study.file) as db:
        assert (
            db.execute("SELECT COUNT(*) FROM answers WHERE rater = 1").fetchone()[0] > 0
        )  # some were right, and saved
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_study_goes_on_and_takes_more_raters(tmp_path):
    study = make_study(tmp_path, raters=2)
    fill(study, 1)
    links = study.links()
    assert begin_study(tmp_path / "study", [], PACK).links() == links
    more = begin_study(tmp_path / "study", [], PACK, 4, 4, 0)
    assert len(more.links()) == 4 and more.links()[:2] == links and all(more.progress(1))
    for other, said in (((100, 0), "--sessions 100: .* begun with 4"), ((4, 7), "--seed 7: .* begun with 0")):
        with pytest.raises(InputError, match=said):
            begin_study(tmp_path / "study", [], PACK, None, *other)
    with pytest.raises(InputError, match="is of other predictions"):
        begin_study(tmp_path / "study", [make.make_run(tmp_path, "delta")], PACK, 2, 4, 0)
    with pytest.raises(InputError, match="name predictions to begin a study"):
        begin_study(tmp_path / "none", [], PACK, 2, 4, 0)
    assert (tmp_path / "study" / human.FILE).stat().st_mode & 0o077 == 0
    with more.open() as db:
        db.execute("DELETE FROM study WHERE key = 'sessions'")  # as studies were before
    assert begin_study(tmp_path / "study", [], PACK, None, 100).links() == more.links()
    assert len(begin_study(tmp_path / "new", [make.make_run(tmp_path, "delta")], PACK).links()) == 5


def test_raters_are_shown_pictures_only(tmp_path):
    sent = Said(text="x", sticker=SentSticker(picture="one.jsonl"))
    rows = [row.model_copy(update={"predicted": sent}) for row in make.make_run(tmp_path, "one").rows]
    with pytest.raises(InputError, match=r"one.jsonl: one.jsonl is not a readable picture"):
        begin_study(tmp_path / "study", [make.write(tmp_path / "one.jsonl", rows)], PACK, 2, 4, 0)
    assert not (tmp_path / "study" / human.FILE).exists()


def test_models_whose_results_would_share_a_file_are_not_rated(tmp_path):
    with pytest.raises(InputError, match="its results and those of .* would both be .*a-b.human.json"):
        make_study(tmp_path, models=("a b", "a-b"))


def test_a_taken_port_is_one_line(tmp_path):
    PACK.save(tmp_path / "pack")
    run = make.make_run(tmp_path, "one")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = make.pegs("human", "serve", run.path, "--study", tmp_path / "study", "--stickers", tmp_path / "pack", "--port", port)  # fmt: skip
    assert done.returncode == 2 and f"--port {port}: Address already in use" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("command", [("analyze",), ("export",), ("serve",)])
@pytest.mark.parametrize(("content", "said"), [(b"no database at all", "file is not a database"), (b"", "no such table")])  # fmt: skip
def test_a_study_that_is_no_database_is_one_line(tmp_path, command, content, said):
    (tmp_path / human.FILE).write_bytes(content)
    done = make.pegs("human", *command, "--study", tmp_path)
    assert done.returncode == 2 and f"--study {tmp_path}: study.sqlite3: {said}" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_raters_and_checks_are_counted_not_links_and_questions(tmp_path):
    """Of five links two are used; rater 1 fails one question of its one check."""
    study = make_study(tmp_path, raters=5)
    for rater in (1, 2):
        fill(study, rater, lambda page, question: int(re.search(r"give a (\d)", page.reply["text"])[1]) if page.kind == "check" else 3)  # fmt: skip
    check = next(page for page in pages(study, 1) if page.kind == "check")
    study.save(1, check.position, {"Et": str(check.scores["Et"] % 5 + 1)})
    found = analyze(study)
    assert [result.settings["raters"] for result in found.results] == [2] * 3
    assert [(row["checks_passed"], row["checks"]) for row in found.raters.values()] == [(0, 1), (1, 1)] + [(0, 0)] * 3
    assert found.raters["1"]["flags"] == ["failed an attention check", "nearly always the same score"]
    assert analyze(study, without=[2, 5]).results[0].settings["raters"] == 1
    with pytest.raises(InputError, match=r"^--without 99: must be one of 1, 2, 3, 4, 5\.$"):
        analyze(study, without=[99])


TRUTH = {"alpha": 2, "beta": 3, "gamma": 5}


def test_analysis_finds_models_agreement_and_odd_raters(tmp_path):
    """Three raters who agree but for noise, one who gives the same always, one who answers at random and fails the checks."""
    study, rng = make_study(tmp_path, raters=5, sessions=6), np.random.default_rng(1)
    for rater in range(1, 6):
        models = models_of(study, rater)

        def score(page, question, rater=rater, models=models):
            if page.kind == "check":
                wanted = int(re.search(r"give a (\d)", page.reply["text"])[1])
                return wanted if rater < 5 else 6 - wanted if wanted != 3 else 1
            if rater == 4:
                return 4
            return int(rng.integers(1, 6)) if rater == 5 else TRUTH[models[page.position]]

        fill(study, rater, score)
    found = analyze(study, without=[4, 5])
    for result in found.results:
        assert result.metrics["Et"].value == result.metrics["StiD"].value == TRUTH[result.model]
        assert result.metrics["StiGQ"].value is None
    assert found.icc["Et"]["ICC1"]["value"] == pytest.approx(1) and found.icc["StiGQ"] is None
    flags = {rater: row["flags"] for rater, row in found.raters.items()}
    assert flags["1"] == flags["2"] == flags["3"] == [] and flags["4"] == ["nearly always the same score"]
    assert "failed an attention check" in flags["5"]
    everyone = analyze(study)
    assert everyone.icc["Et"]["ICC1"]["value"] < 0.9 and everyone.icc["Et"]["raters"] == 5
    lines = export_ratings(study).splitlines()
    assert len(lines) == 1 + sum(row["answers"] for row in found.raters.values()) + 5 * 4
    assert not any(token in line for token in tokens(study) for line in lines)
    with pytest.raises(InputError, match="has no answers yet"):
        analyze(make_study(tmp_path / "fresh"))
