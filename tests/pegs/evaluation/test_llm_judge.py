"""The judge: scripted endpoints with a known taste, a known bias, and answers that cannot be used."""

import json
import re
import threading

import numpy as np
import pytest

from agent_generation.engine import Prices
from pegs.endpoint import Endpoint
from pegs.errors import InputError
from pegs.evaluation import llm_judge
from pegs.evaluation.llm_judge import Trial, latin_square, position_bias, ranks_of
from tests.fixtures.llm_server import Server
from tests.pegs.evaluation import make


PACK = make.make_pack()
CANDIDATE = re.compile(r'<candidate number="(\d+)">\n.*?quality (\d+).*?</candidate>', re.S)
REPLY = re.compile(r"<reply>\n.*?quality (\d+)(.*?)\n</reply>", re.S)
WORTH = {"best": 5, "good": 4, "fair": 3, "poor": 2}


def make_runs(folder, turns=6, models=("best", "good", "fair", "poor")):
    runs = []
    for number, model in enumerate(models):
        rows = [
            make.row(model, f"s{t}/1", ("gold", None), (f"quality {WORTH[model]}", "blue" if (t + number) % 2 else None))
            for t in range(turns)
        ]  # fmt: skip
        runs.append(make.write(folder / f"{model}.jsonl", rows))
    return tuple(runs)


def text_of(body):
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else content[0]["text"]


def judge(bias=0.0, spoil=lambda number: False):
    """Scores by quality; ranks by quality with so much added for the first place; spoils some of its answers."""
    count, lock = iter(range(10**9)), threading.Lock()

    def script(body):
        with lock:
            number = next(count)
        if spoil(number):
            return ('{"reason": "x", "score": 0}', "five", '{"reason": "x", "ranking": [1, 1, 2, 3]}', "")[number % 4]
        prompt = text_of(body)
        if candidates := CANDIDATE.findall(prompt):
            worth = {int(n): int(q) + bias * (int(n) == 1) for n, q in candidates}
            return json.dumps({"reason": "r", "ranking": sorted(worth, key=lambda n: -worth[n])})
        quality, sticker = REPLY.search(prompt).groups()
        return json.dumps({"reason": "r", "score": min(5, int(quality) + ("sends" in sticker and "empathetic" in prompt))})  # fmt: skip

    return script


def run(folder, server, trial, **endpoint):
    values = {"concurrency": 8, "budget_usd": None, "prices": Prices(), "language": trial.language, **endpoint}
    return llm_judge.run_judge(trial, Endpoint(server.url, "scripted", **values), folder, lambda *_: None)


def trial_of(runs, shown="descriptions", language="en"):
    return Trial(runs, PACK, shown, language)


@pytest.mark.parametrize("count", range(2, 9))
def test_every_candidate_stands_once_at_every_place(count):
    square = np.array(latin_square(count))
    assert all(sorted(line) == list(range(count)) for line in [*square, *square.T])
    follows = [tuple(pair) for order in square for pair in zip(order, order[1:], strict=False)]
    assert count % 2 or len(set(follows)) == len(follows) == count * (count - 1)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_figures_are_the_judges(tmp_path, language):
    runs = make_runs(tmp_path)
    with Server(judge()) as server:
        if language == "zh":
            server.script = lambda body: judge()(json.loads(json.dumps(body).replace("\\u5171\\u60c5", "empathetic").replace("\\u53d1\\u9001", "sends")))  # fmt: skip
        results, cost = run(tmp_path, server, trial_of(runs, language=language))
        assert cost["calls"] == len(server.bodies) == 4 * 6 * 10 + 6 * 4
        assert not any(name in text_of(body) for body in server.bodies for name in ("fair", "poor"))
    value = {r.model: {name: metric.value for name, metric in r.metrics.items()} for r in results}
    assert value["good"] == {"emp_txt": 4, "emp_mm": 5, "con": 4, "rank": 2}
    assert value["poor"] == {"emp_txt": 2, "emp_mm": 3, "con": 2, "rank": 4}
    details = results[0].details
    assert details["self_consistency_sd"] == {"empathy": 0, "consistency": 0} and details["rank_self_consistency"] == 1
    assert details["position_bias"]["p"] > 0.99 and details["turns_not_ranked"] == 0


def test_a_fifth_of_malformed_answers_moves_no_mean(tmp_path):
    runs = make_runs(tmp_path, turns=10)
    with Server(judge()) as server:
        clean, _ = run(tmp_path / "clean", server, trial_of(runs))
    rng = np.random.default_rng(0)
    with Server(judge(spoil=lambda number: rng.random() < 0.2)) as server:
        # one after the other, so that chance is the same each time
        spoiled, cost = run(tmp_path / "spoiled", server, trial_of(runs), concurrency=1)
    assert cost["retried"] > 60
    for one, other in zip(clean, spoiled, strict=True):
        assert {n: m.value for n, m in one.metrics.items()} == pytest.approx({n: m.value for n, m in other.metrics.items()})  # fmt: skip
    lost = sum(result.details["unusable_answers"][metric] for result in spoiled for metric in ("empathy", "consistency"))  # fmt: skip
    assert 0 < lost < 20  # three tries each, then reported


def test_what_stays_malformed_is_unscored_not_zero(tmp_path):
    runs = make_runs(tmp_path)
    with Server(judge(spoil=lambda number: True)) as server:
        results, _ = run(tmp_path, server, trial_of(runs))
    for result in results:
        assert all(metric.value is None and metric.n == 0 for metric in result.metrics.values())
        assert result.details["unusable_answers"] == {"empathy": 30, "consistency": 30}
        assert result.details["replies_not_scored"] == {"empathy": 6, "consistency": 6}
        assert result.details["turns_not_ranked"] == 6 and result.details["position_bias"] is None


def test_a_biased_judge_fools_a_fixed_order_but_not_the_square(tmp_path):
    """Listed from worst to best, with the first place worth more than all quality."""
    runs = make_runs(tmp_path, turns=8)[::-1]
    script = judge(bias=1.5)
    with Server(script) as server:
        results, _ = run(tmp_path, server, trial_of(runs))
    ranks = {result.model: result.metrics["rank"].value for result in results}
    assert sorted(ranks, key=ranks.get) == ["best", "good", "fair", "poor"]
    bias = results[0].details["position_bias"]
    assert bias["p"] < 1e-3 and bias["mean_rank_by_place"][0] == min(bias["mean_rank_by_place"])
    steps = llm_judge.rank_replies([r.rows[0] for r in runs], [trial_of(runs).load(r) for r in runs], [range(4)], "descriptions", "en")  # fmt: skip
    [request] = next(steps)
    answer = request.parse(judge(bias=9)({"messages": request.messages}))
    fixed = ranks_of(range(4), [number - 1 for number in answer.ranking])
    assert fixed[0] == 1 and runs[0].model == "poor"  # the fixed order puts the worst first


def position_bias_of(bias, noise, turns=100, worth=range(7), seed=0):
    """Of a judge that adds `bias` to the first place and `noise` to what the replies are worth, in every turn as much more or less as the noise is."""
    rng, orders = np.random.default_rng(seed), np.array(latin_square(len(worth)))
    here = np.array(worth) + noise * rng.normal(size=(turns, 1, len(worth)))
    judged = here + noise * rng.normal(size=(turns, *orders.shape)) + bias * (np.argsort(orders, 1) == 0)
    return position_bias((-judged).argsort(2).argsort(2) + 1, orders)


def test_position_bias_of_fair_and_unfair_answers():
    fair = position_bias_of(0, noise=0, turns=5, worth=range(4))
    assert fair["p"] == 1 and fair["mean_rank_by_place"] == [2.5] * 4 and fair["answers"] == 20
    blind = position_bias_of(9, noise=0, turns=5, worth=(0, 0.1))
    assert blind["mean_rank_by_place"] == [1, 2] and blind["p"] == pytest.approx(0.0341, abs=1e-4)  # F(1, 4) of 10
    assert position_bias(np.array([]), [(0,)]) is None


def test_position_bias_is_seen_among_models_that_differ_and_by_chance_once_in_twenty():
    assert all(position_bias_of(0.3, noise=1, seed=seed)["p"] < 0.01 for seed in range(10))
    for turns, worth in ((100, range(7)), (10, (0, 1, 3)), (3, (0, 0, 1, 5))):
        alarms = sum(position_bias_of(0, 1, turns, worth, seed)["p"] < 0.05 for seed in range(400))
        assert 8 <= alarms <= 32, (turns, worth)  # within three standard errors of 20


def test_a_killed_run_pays_for_nothing_twice(tmp_path):
    runs = make_runs(tmp_path)
    script, answered = judge(), iter(range(100))

    def dies(body):
        return script(body) if next(answered, None) is not None else (401, b'{"error": {"message": "no"}}')

    with Server(dies) as server, pytest.raises(InputError, match="status 401"):
        run(tmp_path, server, trial_of(runs))
    with Server(script) as server:
        results, cost = run(tmp_path, server, trial_of(runs))
        assert cost["reused"] == 100 and len(server.bodies) == 264 - 100
    assert results[0].metrics["rank"].value == 1


def test_estimate_and_cap(tmp_path):
    runs, prices = make_runs(tmp_path), Prices(1.0, 2.0)
    expected = llm_judge.estimate(trial_of(runs), prices)
    assert expected["calls"] == 264 and 0 < expected["cost_usd"] < expected["most_usd"]
    with Server(judge()) as server:
        with pytest.raises(InputError, match="budget of 0.01 USD is used up"):
            run(tmp_path / "cap", server, trial_of(runs), budget_usd=0.01, prices=prices)
        _, cost = run(tmp_path / "free", server, trial_of(runs), budget_usd=expected["most_usd"], prices=prices)
        assert 0 < cost["cost_usd"] <= expected["most_usd"]
        with pytest.raises(InputError, match="--budget-usd needs --price-in"):
            run(tmp_path / "x", server, trial_of(runs), budget_usd=1.0)


def test_the_cap_counts_what_earlier_commands_spent(tmp_path):
    trial, prices = trial_of(make_runs(tmp_path)), Prices(1e-6, 1000.0)  # 0.3 USD at most for an answer
    with Server(lambda body: json.dumps({"reason": "r " * 200, "score": 3})) as server:  # 0.2 USD
        for _ in range(3):
            with pytest.raises(InputError, match="budget of 0.75 USD is used up"):
                run(tmp_path, server, trial, concurrency=1, budget_usd=0.75, prices=prices)
        assert len(server.bodies) == 3


def drawn_run(folder):
    (folder / "one.png").write_bytes(make.png("red"))
    row = make.row("artist", "s/1", ("gold", None), ("quality 3", None))
    said = row.predicted.model_copy(update={"sticker": llm_judge.SentSticker(picture="one.png")})
    return make.write(folder / "artist.jsonl", [row.model_copy(update={"predicted": said})])


def test_a_drawn_sticker_is_described_first(tmp_path):
    told = {"emotion": "anger", "description": "a furious red square", "emotion_description": "e", "recommendation": "r", "tags": []}  # fmt: skip

    def script(body):
        name = body["response_format"]["json_schema"]["name"]
        if name == "Annotation":
            assert body["messages"][0]["content"][0]["type"] == "image_url"
            return json.dumps(dict.fromkeys(("content", "emotion", "scenes", "tone", "humor"), "x"))
        return json.dumps(told) if name == "Knowledge" else judge()(body)

    with Server(script) as server:
        [result], _ = run(tmp_path, server, trial_of((drawn_run(tmp_path),)))
        assert all("a furious red square (anger)" in text_of(body) for body in server.bodies if "Score" in str(body))
    assert result.metrics["emp_mm"].value == 4 and result.details["turns_not_ranked"] is None
    with Server(lambda body: "no idea") as server:
        [result], _ = run(tmp_path / "blind", server, trial_of((drawn_run(tmp_path),)))
    assert result.metrics["emp_mm"].value is None and result.details["replies_not_scored"]["empathy"] == 1


def test_a_multimodal_judge_sees_the_pictures_in_order(tmp_path):
    runs = (*make_runs(tmp_path, turns=1, models=("good",)), drawn_run(tmp_path))
    runs = (
        make.write(tmp_path / "good.jsonl", [make.row("good", "s/1", ("g", None), ("quality 4", "blue"))]),
        runs[1],
    )
    with Server(judge()) as server:
        run(tmp_path, server, trial_of(runs, "images"))
        ranks = [body["messages"][0]["content"] for body in server.bodies if "Ranking" in str(body)]
    assert len(ranks) == 2
    for content in ranks:
        assert [part["type"] for part in content] == ["text", "text", "image_url", "text", "image_url"]
        assert re.findall(r"sticker (\d), shown below", content[0]["text"]) == ["1", "2"]
        assert "square" not in content[0]["text"]
    assert ranks[0][2] == ranks[1][4] and ranks[0][4] == ranks[1][2]


def test_the_sample_is_the_same_for_all_models():
    keys = [f"s{n}/1" for n in range(50)]
    chosen = llm_judge.sample_turns(keys, 10, 3)
    assert len(chosen) == 10 and chosen == sorted(chosen, key=keys.index)
    assert set(llm_judge.sample_turns(keys[::-1], 10, 3)) == set(chosen) != set(llm_judge.sample_turns(keys, 10, 4))
    assert llm_judge.sample_turns(keys, 0, 3) == llm_judge.sample_turns(keys, 99, 3) == keys


def test_the_command_estimates_judges_and_stops_at_the_cap(tmp_path):
    PACK.save(tmp_path / "pack")
    files = [str(run.path) for run in make_runs(tmp_path, turns=2)]

    def pegs(*args):
        return make.pegs("llm", *files, "--out", tmp_path / "results", "--stickers", tmp_path / "pack", *args)

    with Server(judge()) as server:
        endpoint = ("--llm", server.url, "--model", "scripted", "--extra-body", '{"top_k": 1}')
        guess = pegs(*endpoint, "--estimate", "--price-in", "1", "--price-out", "2", "--json")
        assert guess.returncode == 0 and json.loads(guess.stdout)["calls"] == 88 and not server.bodies, guess.stderr
        stopped = pegs(*endpoint, "--budget-usd", "0.000001", "--price-in", "1", "--price-out", "2")
        assert stopped.returncode == 2 and "the budget of 1e-06 USD is used up" in stopped.stderr
        done = pegs(*endpoint, "--json")
    assert done.returncode == 0, done.stderr
    assert all(body["top_k"] == 1 for body in server.bodies)
    found = json.loads(done.stdout)
    assert found["cost"]["calls"] == 88 and [row["metrics"]["rank"]["value"] for row in found["results"]] == [1, 2, 3, 4]  # fmt: skip
    assert found["results"][0]["settings"]["judge"] == "scripted"
    assert (tmp_path / "results" / "best.llm.json").is_file()
