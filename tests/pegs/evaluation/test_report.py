"""The report: tables of made-up models beside the paper's, in three forms; and the commands end to end."""

import json
import re

import numpy as np
import pytest

from pegs.errors import InputError
from pegs.evaluation import human, llm_judge, multimodal, text
from pegs.evaluation.report import (
    holm,
    make_report,
    read_results,
    table_5,
    table_9,
    to_latex,
    to_markdown,
    write_report,
)
from pegs.evaluation.results import make_result, mean_of, result_files, write_result
from tests.pegs.evaluation import make


PACK = make.make_pack()
MODELS = ("tool_1 & co", "pegs-ret", "<b>gen</b>", "rag|x")


def results_of(judges=("judge",), towers=("toy", "toy", "toy", "toy")):
    """Models that get better one by one, over 30 sessions."""
    turns, results = [f"s{n}/1" for n in range(30)], []
    for place, model in enumerate(MODELS):
        rng = np.random.default_rng(place)

        def near(value, spread=0.02, rng=rng):
            return value + rng.normal(0, spread, 30)

        pairs = [("a b c d e f", "a b c d e f" if n % 4 < place else "a b x d q f") for n in range(30)]
        columns = text.text_columns(*zip(*pairs, strict=True), with_meteor=False)
        texts = {name: s for name, s in text.STATISTICS.items() if name != "meteor" and "bertscore" not in name}
        results.append(make_result("text", model, turns, columns, texts, {"tokenizer": "t"}))
        names = ("frequency", "gold_frequency", "mmr", "mmr_precision", "mmr_recall", "mmr_f1", "recall_at_1", "recall_at_5", "recall_at_10", "mrr", "timing_agreement", "emotion_agreement", "sticker_logit", "id")  # fmt: skip
        columns = {name: near(0.5 + place / 10) for name in names} | {"gold_frequency": np.arange(30) % 2.0}
        columns["id"] = near(0.5 - place / 10)
        results.append(make_result("mm", model, turns, columns, {**multimodal.STATISTICS, "id": mean_of("id")}, {"tower": towers[place]}))  # fmt: skip
        for judge in judges:
            columns = {"emp_txt": near(3 + place / 2), "emp_mm": near(3 + place / 2), "con": near(4), "rank": near(4.0 - place)}  # fmt: skip
            results.append(make_result("llm", model, turns, columns, llm_judge.STATISTICS, {"judge": judge}))
        columns = {name: near(3 + place / 3) for name in human.STATISTICS} | {"StiGQ": np.full(30, np.nan)}
        results.append(make_result("human", model, turns, columns, human.STATISTICS, {}))
    return results


@pytest.fixture(scope="module")
def report():
    icc = {"Et": human.intraclass([[1, 2], [3, 3], [5, 4]]), "StiGQ": None}
    return make_report(results_of(), {"icc": icc})


def table(report, number):
    return next(table for table in report.tables if table.number == number)


def test_tables_stand_beside_the_papers(report):
    assert [t.number for t in report.tables] == ["1", "2", "2b", "3", "4", "9", "10"]
    two = table(report, "2")
    assert [name for name, _ in two.rows] == list(MODELS) and two.columns[2:] == ["f-MMr (alpha 0.8)", "f-MMr (alpha 0.2)"]  # fmt: skip
    paper = dict(two.paper)
    assert [cell.text for cell in paper["Vicuna-tool"]] == ["0.141", "0.725", "(0.227)", "0.602"]
    assert [cell.text for cell in dict(table(report, "4").paper)["PEGS-Ret"]][0] == "-"
    assert all(cell.text != "-" and cell.spread for cell in dict(two.rows)["pegs-ret"])


def test_the_best_is_marked_the_right_way_round(report):
    def best(number, column):
        t = table(report, number)
        return [name for name, cells in t.rows if cells[t.columns.index(column)].is_best]

    assert best("2", "MMr") == ["rag|x"] and best("2", "Freq") == []
    assert best("3", "Rank") == ["rag|x"] and best("2b", "ID") == ["tool_1 & co"]
    assert best("4", "StiGQ") == []


def test_differences_are_from_the_reference_model_and_corrected(report):
    rows = dict(table(report, "3").rows)
    assert report.against == MODELS[0] and not any(cell.mark for cell in rows[MODELS[0]])
    assert [cell.mark for cell in rows["pegs-ret"]] == ["*", "*", "", "*"]
    found = report.differences["3 pegs-ret"]
    assert found["rank"].value == pytest.approx(-1, abs=0.05) and found["con"].p > 0.05
    with pytest.raises(InputError, match="--against none: must be one of"):
        make_report(results_of(), {}, "none")


def test_holm():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({}) == {}


def test_names_are_escaped_in_every_form(report, tmp_path):
    files = {file.suffix: file.read_text("utf-8") for file in write_report(report, tmp_path)}
    assert "&lt;b&gt;gen" in files[".html"] and "<b>gen" not in files[".html"]
    assert r"tool\_1 \& co" in files[".tex"] and "rag\\|x" in files[".md"]
    assert set(json.loads(files[".json"])) == {"against", "tables", "differences"}
    assert not re.search(r'(src|href)="(?!data:|#)', files[".html"])  # it needs no other file
    assert files[".html"].count("<svg") == 5 and "Warning: 4 models are too few" in files[".html"]


def test_markdown_rows_have_as_many_cells_as_heads(report):
    for block in to_markdown(report).split("\n\n"):
        if block.startswith("|"):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_latex_is_balanced(report):
    latex = to_latex(report)
    plain = re.sub(r"\\[{}]", "", latex)
    assert plain.count("{") == plain.count("}") and latex.count(r"\begin{") == latex.count(r"\end{")
    for tabular in re.findall(r"\\toprule\n(.*?)\\bottomrule", latex, re.S):
        assert len({len(re.findall(r"(?<!\\)&", line)) for line in tabular.splitlines() if "&" in line}) == 1


def made_of(model, family, tower="toy", **columns):
    statistics = {**text.STATISTICS, **multimodal.STATISTICS}
    wanted = {*columns, *(name for name in statistics if family == "mm" and name.startswith("f_mmr"))}
    turns, figures = (
        [f"s{n}/1" for n in range(40)],
        {name: np.asarray(column, float) for name, column in columns.items()},
    )
    known = {name: statistics[name] for name in wanted & set(statistics)}
    return make_result(family, model, turns, figures, known, {"tower": tower})


def test_where_pegs_is_to_its_baselines_as_in_the_paper_is_said():
    """METEOR as in the paper (more), CIDEr the other way round, ROUGE-L too close; and MMr against the tool alone."""
    noise = np.random.default_rng(0).normal(0, 0.01, (2, 40))
    pegs = {"meteor": 0.4 + noise[0], "cider": 0.1 + noise[0], "rouge_l": 0.3 + noise[0], "predicted_length": [8] * 40, "reference_length": [16] * 40}  # fmt: skip
    base = {"meteor": 0.3 + noise[1], "cider": 0.4 + noise[1], "rouge_l": 0.3 + noise[1], "predicted_length": [12] * 40, "reference_length": [16] * 40}  # fmt: skip
    results = [made_of("pegs-gen", "text", **pegs), *(made_of(model, "text", **base) for model in ("baseline-text", "baseline-tool"))]  # fmt: skip
    for model, value in (("pegs-gen", 0.5), ("baseline-text", 0.9), ("baseline-tool", 0.8)):
        seldom = np.arange(40) % 2 if model == "pegs-gen" else np.zeros(40)
        results.append(made_of(model, "mm", mmr=value + noise[0], frequency=seldom, gold_frequency=np.arange(40) % 4 > 0))  # fmt: skip
    made = table(make_report(results, {}), "2c")
    assert [name for name, _ in made.rows] == ["pegs-gen - baseline-text", "pegs-gen - baseline-tool"]
    assert [name for name, _ in made.paper] == ["PEGS-Gen - Vicuna-text", "PEGS-Gen - Vicuna-tool"]
    cell = {title: (ours, theirs) for title, ours, theirs in zip(made.columns, made.rows[1][1], made.paper[1][1], strict=True)}  # fmt: skip
    assert cell["MET"][0].is_best and cell["MET"][0].mark == "*" and cell["MET"][1].text == "+0.080"
    assert not cell["CIDEr"][0].is_best and cell["CIDEr"][0].mark == "*" and cell["CIDEr"][0].text.startswith("-0.3")
    assert not cell["ROU_L"][0].is_best and not cell["ROU_L"][0].mark
    assert cell["f-MMr (alpha 0.8)"][1].text == "+0.344" and cell["BLEU-1"][0].text == "-"
    against_text, against_tool = made.notes[:2]
    assert against_text.startswith("pegs-gen against baseline-text: as in the paper in MET; the other way round in CIDEr; too close to tell in ROU_L.")  # fmt: skip
    assert "as in the paper in MET, MMr, f-MMr (alpha 0.8); the other way round in CIDEr, f-MMr (alpha 0.2); too" in against_tool  # fmt: skip
    assert "the references 16.0 tokens and stickers in 75%; pegs-gen 8.0 tokens and stickers in 50%; baseline-text 12.0 tokens and stickers in 0%" in made.notes[2]  # fmt: skip


def test_nothing_is_claimed_of_models_measured_by_different_towers():
    noise = np.random.default_rng(0).normal(0, 0.01, 40)
    results = [made_of(model, "text", rouge_l=value + noise, predicted_length=[8] * 40, reference_length=[16] * 40) for model, value in (("pegs-ret", 0.5), ("baseline-tool", 0.2))]  # fmt: skip
    for model, tower, value in (("pegs-ret", "clip", 0.75), ("baseline-tool", "mini", 0.35)):
        sent = np.arange(40) % 2
        results.append(made_of(model, "mm", tower, mmr=value + noise, frequency=sent, gold_frequency=sent))
    made = table(make_report(results, {}), "2c")
    cell = dict(zip(made.columns, made.rows[0][1], strict=True))
    assert cell["ROU_L"].text == "+0.300" and cell["MMr"].text == cell["f-MMr (alpha 0.8)"].text == "-"
    assert "MMr" not in made.notes[0] and any(note.startswith("Warning: not compared in MMr,") for note in made.notes)


def test_two_judges_are_two_tables_and_compared():
    made = make_report(results_of(("a", "b")), {})
    assert [t.title for t in made.tables if t.number == "3"] == ["LLM-based metrics by a", "LLM-based metrics by b"]
    assert table(made, "3b").rows and "3 pegs-ret a" in made.differences
    ten = table(made, "10")
    assert [title for title in ten.columns if title.startswith("CON")] == ["CON (judge a)", "CON (judge b)"]
    assert dict(ten.paper)["Spearman"][ten.columns.index("CON (judge b)")].text == "0.87"


def test_models_measured_by_different_towers_are_not_compared():
    made = make_report(results_of(towers=("clip", "clip", "mini", "mini")), {})
    two = table(made, "2")
    by_model = {name: dict(zip(two.columns, cells, strict=True)) for name, cells in two.rows}
    assert "mmr" in made.differences["2 pegs-ret"] and set(made.differences["2 rag|x"]) == {"frequency"}
    assert by_model["rag|x"]["Freq"].mark == "*" and not by_model["rag|x"]["MMr"].mark
    assert by_model["pegs-ret"]["MMr"].mark == "*"  # of the same tower as the reference model
    assert not any(cells[title].is_best for cells in by_model.values() for title in two.columns)
    warning = f"Warning: not compared in MMr, f-MMr (alpha 0.8), f-MMr (alpha 0.2), because the models were measured differently: tower clip ({MODELS[0]}, pegs-ret); tower mini (<b>gen</b>, rag|x)."  # fmt: skip
    assert warning in two.notes and not any("Warning" in note for note in table(made, "1").notes)


def test_ranks_beside_other_models_and_bertscores_of_other_layers_are_not_compared():
    turns, near = [f"s{n}/1" for n in range(30)], np.random.default_rng(0).normal(0, 0.1, 30)

    def judged(model, candidates, rank):
        columns = {"rank": rank + near, "con": rank + near}
        return make_result("llm", model, turns, columns, {n: mean_of(n) for n in columns}, {"judge": "j"}, {"candidates": candidates})  # fmt: skip

    def scored(model, layer, value):
        columns = {"bertscore": value + near}
        return make_result("text", model, turns, columns, {"bertscore": mean_of("bertscore")}, {"bertscore_encoder": "e", "bertscore_layer": layer})  # fmt: skip

    results = [judged("a", ["a", "b"], 1.0), judged("b", ["b", "a"], 2.0), judged("c", ["a", "c"], 3.0), scored("a", 5, 0.5), scored("b", 4, 0.8)]  # fmt: skip
    made = make_report(results, {})
    assert set(made.differences["3 b"]) == {"rank", "con"} and set(made.differences["3 c"]) == {"con"}
    assert "1 b" not in made.differences
    assert [note for note in table(made, "3").notes if note.startswith("Warning: not compared in Rank,")]
    assert [note for note in table(made, "1").notes if "bertscore_layer 5 (a); bertscore_layer 4 (b)" in note]


def test_table_5_and_what_is_no_statistics(tmp_path):
    file = tmp_path / "statistics.json"
    file.write_text(json.dumps({"table_5": {"train": {"sessions": 12000, "turns": 3}, "test": {"sessions": 2}}}))
    made = table_5(file)
    assert made.columns == ["Sessions", "Turns"] and [c.text for c in made.rows[0][1]] == ["12,000", "3"]
    assert made.rows[1][1][1].text == "-" and "10,785" in made.notes[0]
    for bad, said in (("[]", "must be a JSON object"), ("{}", "table_5: expected"), ("{", "Expecting")):
        file.write_text(bad)
        with pytest.raises(InputError, match=said):
            table_5(file)


def test_table_9_has_all_six_forms():
    made = table_9({"Et": human.intraclass([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8]])})
    assert [name for name, _ in made.rows] == ["ICC(1,1)", "ICC(2,1)", "ICC(3,1)", "ICC(1,k)", "ICC(2,k)", "ICC(3,k)"]
    assert all(cells[made.columns.index("Et")].spread for _, cells in made.rows)


def test_results_of_a_model_do_not_come_twice(tmp_path):
    result = results_of()[0]
    for folder in ("a", "b"):
        write_result(result, *result_files(tmp_path / folder, "text", {"m": "m"}))
    with pytest.raises(InputError, match="is also in"):
        read_results([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(InputError, match="no results there"):
        read_results([tmp_path])


def test_from_predictions_to_the_report_by_the_commands(tmp_path):
    PACK.save(tmp_path / "pack")
    files = [
        make.make_run(tmp_path / "predictions", model, every=n + 1).path for n, model in enumerate(("one", "two"))
    ]
    stickers = ("--stickers", tmp_path / "pack")
    done = make.pegs("text", *files, "--out", tmp_path / "results", "--no-bertscore", "--no-meteor", "--json")
    assert done.returncode == 0, done.stderr
    assert [row["model"] for row in json.loads(done.stdout)["results"]] == ["one", "two"]
    done = make.pegs("mm", *files, "--out", tmp_path / "results", "--tower", "mini", *stickers)
    assert done.returncode == 0 and "f_mmr_0.8" in done.stdout and "f_mmr_0.2" in done.stdout, done.stderr
    done = make.pegs("report", tmp_path / "results", "--predictions", tmp_path / "predictions", "--out", tmp_path / "report", *stickers, "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tables"] == ["1", "2", "2b"]
    html = (tmp_path / "report" / "report.html").read_text("utf-8")
    assert html.count('class="example"') == 4 and "data:image/png;base64," in html and "PEGS sticker tower" in html
    done = make.pegs("report", tmp_path / "results", "--out", tmp_path / "report" / "report.md")
    assert done.returncode == 2 and f"--out {tmp_path}/report/report.md: must be a folder (File exists)" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("text", "{tmp}/none.jsonl"), "{tmp}/none.jsonl: No such file"),
        (("text", "{tmp}/bad.jsonl"), "{tmp}/bad.jsonl:1: session_id: Field required"),
        (("agreement", "{tmp}", "--pair", "x"), "no results there"),
        (("human", "analyze", "--study", "{tmp}"), "has no study.sqlite3"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(tmp_path, args, said):
    (tmp_path / "bad.jsonl").write_text("{}\n")
    done = make.pegs(*(arg.format(tmp=tmp_path) for arg in args))
    assert done.returncode == 2 and done.stdout == "" and said.format(tmp=tmp_path) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
