import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from stages.lib.command.errors import LONGEST_MESSAGE, StageError
from stages.lib.report.report_inputs import SHOWN_SAMPLES, expectation, read_inputs
from stages.lib.settings.declaration import block
from stages.lib.settings.sample_pairs import SamplePairs
from stages.lib.settings.sections import default_params
from stages.report import named_in_params, page_of
from tests.loaded_python import loaded_python
from tests.real_files import PROJECT
from tests.stages.tiny_pipeline import inside, read_yaml, write_yaml

HOSTILE = '<script>alert(1)</script> {{ 7 * 7 }} {% raw %} "quoted" & </div> half of a pair: \ud83d'
CURVE = "step,loss,grad_norm,validation/loss\n1,0.9,2.0,\n2,0.5,1.0,0.6\n"
ARGUMENTS = ("--metrics", "metrics", "--samples", "data/samples", "--scores", "data/sample_scores")
ARGUMENTS += ("--out", "metrics/report.html")
GAINS = {"sft": 0.0, "dpo": 0.425, "ppo": 0.625}
ROWS = 16


def evaluation(policy, gold):
    gain = GAINS[policy]
    metrics = {"eos_rate": 1 - 1 / ROWS, "length_mean": 31.625, "prompts": ROWS}
    metrics |= {"distinct_1": 0.0712, "distinct_2": 0.2931, "sft_perplexity": 12.5, "sft_loss": 2.5257, "sft_rows": 400}
    if policy != "sft":
        metrics |= {"kl_to_reference_mean": 20 * gain}
        metrics |= {"kl_to_reference_ci_low": 18 * gain, "kl_to_reference_ci_high": 22 * gain}
        metrics |= interval("preference_accuracy", 0.74, 0.70, 0.78)
    return metrics | (compared("gold", policy) if gold else {})


def scores(policy, gold=True):
    residual = GAINS[policy] - 0.5
    ends = {"mean": residual, "ci_low": residual - 0.125, "ci_high": residual + 0.125}
    of_line = {f"gold_residual_{end}": value for end, value in ends.items()}
    return {"prompts": ROWS, **compared("reward", policy), **(of_line if gold else {})}


def compared(measure, policy):
    gain = GAINS[policy]
    metrics = {f"{measure}_mean": 0.1 + gain}
    if policy == "sft":
        return metrics
    metrics |= {f"{measure}_minus_reference_mean": gain}
    metrics |= {f"{measure}_minus_reference_ci_{end}": gain + off for end, off in (("low", -0.125), ("high", 0.125))}
    return metrics | interval(f"{measure}_win_rate_vs_reference", 0.5 + gain / 2, 0.45 + gain / 2, 0.55 + gain / 2)


def interval(name, value, low, high):
    return {name: value, f"{name}_ci_low": low, f"{name}_ci_high": high}


def sample(policy, row, gold):
    found = {
        "row": row,
        "source": "a",
        "prompt": [{"role": "user", "content": f"question {row} {HOSTILE}"}],
        "response": f"answer of {policy} to {row} {HOSTILE}",
        "length": 31 if row < 6 else 32,
        "ended": row != 1,
    }
    found |= {"gold": 0.1 + GAINS[policy]} if gold else {}
    if policy == "sft":
        return found
    found |= {"kl": 20 * GAINS[policy], "reference_response": f"own answer of sft to {row}", "reference_ended": True}
    return found | ({"reference_gold": 0.1} if gold else {})


def score(policy, row):
    found = {"row": row, "score": 0.1 + GAINS[policy] + (0.5 if row % 2 else -0.5)}
    return found if policy == "sft" else found | {"reference_score": 0.5}


def write(folder, name, values):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")


def write_run(folder, policies=("sft", "dpo", "ppo"), gold=True, reward=True):
    """All files of a finished run that the report reads."""
    kinds, splits = ("sft", "preference", "prompts"), ("train", "validation", "test")
    rows = {f"{kind}/{split}_rows": 400 for kind in kinds for split in splits}
    of_data = (
        {"bayes_accuracy": 0.803, "gold_label_accuracy": 0.791}
        if gold
        else {"dropped/empty_reply": 4, "dropped/duplicate": 0}
    )
    write(folder, "metrics/prepare_data.json", rows | of_data)
    for kind in kinds:
        counts = {"train_rows": 1388, "validation_rows": 199, "test_rows": 399, "mean_prompt_tokens": 31.5}
        counts |= {"train_tokens": 412345, "validation_tokens": 20111, "test_tokens": 41234}
        write(folder, f"metrics/tokenize_data/{kind}.json", counts | {"dropped/too_long": 12 if kind == "sft" else 0})
    for name in (*(policy for policy in policies), *(["rm"] if reward else [])):
        write(folder, f"metrics/training/{name}.json", training(name))
        write(folder, f"metrics/curves/{name}.csv", CURVE)
    for policy in policies:
        write(folder, f"metrics/evaluate/{policy}.json", evaluation(policy, gold))
        write_samples(folder, policy, [sample(policy, row, gold) for row in range(ROWS)])
        if reward:
            write(folder, f"metrics/score_samples/{policy}.json", scores(policy, gold))
            write_scores(folder, policy, [score(policy, row) for row in range(ROWS)])
    if reward:
        write(folder, "metrics/evaluate_rm/rm.json", of_pairs())
    write_params(folder, policies, reward=reward)
    return folder


def of_pairs():
    found = interval("accuracy", 0.78, 0.74, 0.82) | {"calibration_error": 0.0312, "margin_mean": 0.5, "pairs": 400}
    found |= interval("length_baseline_accuracy", 0.55, 0.5, 0.6) | {"length_correlation": -0.125}
    parts = {
        "reliability_60": (0.5, {"confidence": 0.55, "pairs": 300}),
        "reliability_70": (0.75, {"confidence": 0.65, "pairs": 100}),
        "length_difference_1": (0.6, {"mean": -12.5, "pairs": 200}),
        "length_difference_2": (0.9, {"mean": 3.0, "pairs": 200}),
    }
    for name, (accuracy, others) in parts.items():
        found |= interval(f"{name}_accuracy", accuracy, 0.4, 0.95)
        found |= {f"{name}_{key}": value for key, value in others.items()}
    return found


def write_params(folder, policies, *, reward):
    settings = default_params()
    for section in ("train_sft", "train_dpo", "train_ppo", "train_grpo"):
        settings[section] = {name: own for name, own in settings[section].items() if name in policies}
    settings["evaluate"]["policies"] = {policy: f"models/{policy}" for policy in policies}
    settings["score_samples"]["policies"] = [*policies] if reward else []
    if not reward:
        settings |= {"train_rm": {}, "evaluate_rm": {}}
    write_yaml(folder / "params.yaml", settings)


def training(name):
    if name == "ppo":
        return {"iterations": 2, "stopped_early": 0}
    of_rm = interval("validation_accuracy", 0.77, 0.73, 0.81) if name == "rm" else {}
    return {"validation_loss": 0.6 + 2e-8, "steps": 2, "kept_step": 2, **of_rm}


def write_samples(folder, policy, rows):
    write(folder, f"data/samples/{policy}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def write_scores(folder, policy, rows):
    write(folder, f"data/sample_scores/{policy}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def page_in(folder):
    with inside(folder):
        named = named_in_params()
    return page_of(read_inputs(named, folder / "metrics", folder / "data/samples", folder / "data/sample_scores"))


def report(folder, **environment):
    return subprocess.run(
        [*loaded_python(), "-m", "stages.report", *ARGUMENTS],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(PROJECT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


class Page(HTMLParser):
    """What a browser would make of a page: its elements, and the texts of table cells, figures and classes."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.tables, self.texts, self.open = [], [], {}, []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        self.open.append((tag, attributes.get("class", "")))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append([])
        if attributes.get("class"):
            self.texts.setdefault(attributes["class"], []).append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        data = data.replace("\N{NO-BREAK SPACE}", " ")
        if any(tag in ("th", "td") for tag, _ in self.open):
            self.tables[-1][-1][-1].append(data)
        for _, name in self.open:
            if name:
                self.texts[name][-1] += data


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run_folder):
    return page_in(run_folder)


@pytest.fixture(scope="module")
def parsed(page):
    return Page(page)


def test_two_runs_write_the_same_bytes(run_folder):
    written = []
    for seed in ("1", "2"):
        process = report(run_folder, PYTHONHASHSEED=seed)
        assert process.returncode == 0, process.stderr
        written.append((run_folder / "metrics/report.html").read_bytes())
    assert written[0] == written[1]
    assert not list(run_folder.rglob("*.partial"))


def test_table_of_policies(parsed):
    head, *rows = parsed.tables[0]
    assert [cell[0] for cell in head[1:]] == [
        *("perplexity", "reward", "gold utility", "gold less what its reward promises", "win rate by gold"),
        *("KL from SFT, nats", "ends with EOS", "length, tokens"),
        *("distinct-1", "distinct-2", "preference accuracy"),
    ]
    assert rows[0] == [
        *(["SFT"], ["12.50"], ["0.10"], ["0.10"], ["−0.50", "−0.62 to −0.38: over-optimised"], ["–"], ["–"]),
        *(["93.8 %"], ["31.6"], ["0.071"], ["0.293"], ["–"]),
    ]
    assert rows[1] == [
        *(["DPO"], ["12.50"]),
        *(["0.53", "+0.42 (+0.30 to +0.55)"], ["0.53", "+0.42 (+0.30 to +0.55)"], ["−0.08", "−0.20 to +0.05"]),
        ["71.2 %", "66.2 % to 76.2 %"],
        *(["8.50", "7.65 to 9.35"], ["93.8 %"], ["31.6"], ["0.071"], ["0.293"], ["74.0 %", "70.0 % to 78.0 %"]),
    ]
    assert rows[2][0] == ["PPO"]


def test_tables_of_reward_model_and_data(parsed):
    head, row = parsed.tables[1]
    assert [cell[0] for cell in head[3:6]] == ["longer reply", "score and length", "calibration error"]
    assert row == [
        *(
            ["rm"],
            ["78.0 %", "74.0 % to 82.0 %"],
            ["80.3 %", "79.1 % on these labels"],
            ["55.0 %", "50.0 % to 60.0 %"],
            ["−0.12"],
            ["0.031"],
        ),
        *(["77.0 %", "73.0 % to 81.0 %"], ["0.6000"]),
    ]
    assert parsed.tables[2] == [
        [[], ["accuracy"], ["pairs"]],
        [["sure of its pick to 55.0 %"], ["50.0 %", "40.0 % to 95.0 %"], ["300"]],
        [["sure of its pick to 65.0 %"], ["75.0 %", "40.0 % to 95.0 %"], ["100"]],
        [["chosen reply shorter by 12.5 tokens"], ["60.0 %", "40.0 % to 95.0 %"], ["200"]],
        [["chosen reply longer by 3.0 tokens"], ["90.0 %", "40.0 % to 95.0 %"], ["200"]],
    ]
    assert parsed.tables[3][1] == [
        *(["sft"], ["400"], ["400"], ["400"], ["1,388"], ["199"], ["399"], ["412,345"], ["20,111"], ["41,234"])
    ]
    assert parsed.tables[4][1:] == [[["tokenize_data sft: too long"], ["12"]]]


def test_a_reward_model_without_parts_has_no_table_of_them(tmp_path):
    write_run(tmp_path)
    whole = {key: value for key, value in of_pairs().items() if not key.startswith(("reliability", "length_diff"))}
    write(tmp_path, "metrics/evaluate_rm/rm.json", whole)
    assert "in parts of the test pairs" not in page_in(tmp_path)
    write(
        tmp_path, "metrics/evaluate_rm/rm.json", whole | {"reliability_60_accuracy": 0.5, "reliability_accuracy": 0.5}
    )
    with pytest.raises(StageError, match=r"rm\.json: 'reliability_60_confidence' is missing; run evaluate_rm@rm again"):
        page_in(tmp_path)


def test_rounds_of_replies_as_rows_have_a_table_and_what_they_dropped(tmp_path, parsed):
    write_run(tmp_path, policies=("dpo",), reward=False)
    first = {"prompts": 750, "replies": 3000, "rows": 741, "dropped/replies_alike": 31, "dropped/pairs_close": 0}
    first |= {"reward_mean": 0.512, "reward_best_mean": 1.25, "reward_worst_mean": -0.5, "margin_mean": 1.749}
    first |= {"replies_distinct_share": 0.9875, "eos_rate": 1.0, "length_mean": 21.04}
    best_of = {key: value for key, value in first.items() if key != "margin_mean"} | {"dropped/replies_alike": 0}
    with inside(tmp_path):
        settings = read_yaml(tmp_path / "params.yaml")
        settings["sample_pairs"] = {"best": block(SamplePairs), "first": block(SamplePairs)}
        write_yaml(tmp_path / "params.yaml", settings)
    write(tmp_path, "metrics/sample_pairs/first.json", first)
    write(tmp_path, "metrics/sample_pairs/best.json", best_of)
    tables = Page(page_in(tmp_path)).tables
    numbers = [[text] for text in ("750", "3,000", "741", "0.51", "1.25", "\N{MINUS SIGN}0.50", "1.75")]
    numbers += [["98.8 %"], ["100.0 %"], ["21.0"]]
    assert tables[-1][1] == [["best"], *numbers[:6], ["\N{EN DASH}"], *numbers[7:]]
    assert tables[-1][2] == [["first"], *numbers]
    assert tables[-2][1:] == [
        [["tokenize_data sft: too long"], ["12"]],
        [["sample_pairs first: replies alike"], ["31"]],
    ]
    assert "Replies of policies as rows" not in parsed.texts
    write(tmp_path, "metrics/sample_pairs/first.json", first | {"replies_distinct_share": 1.5})
    with pytest.raises(StageError, match=r"'replies_distinct_share' is 1\.5, expected a share from 0 to 1"):
        page_in(tmp_path)


def test_outcome_is_a_sentence_for_each_thing_measured(parsed):
    assert parsed.texts["outcome"][0].count("On 16 test prompts, DPO beats SFT in mean gold utility (+0.42") == 1
    after = next(index for index, (_, found) in enumerate(parsed.elements) if found.get("class") == "outcome")
    assert [tag for tag, _ in parsed.elements[after + 1 : after + 7]] == ["p", "p", "p", "p", "p", "h2"]


def test_what_went_wrong_in_rl_stands_below_the_outcome(tmp_path, parsed):
    assert "symptoms" not in parsed.texts
    write_run(tmp_path, policies=("dpo", "ppo"), reward=False)
    write(tmp_path, "metrics/curves/ppo.csv", "step,objective/kl,response/length\n1,0,20\n2,30,20\n")
    write(tmp_path, "metrics/curves/dpo.csv", "step,group/distinct,validation/loss\n1,0.1,\n2,0.1,0.6\n")
    (text,) = Page(page_in(tmp_path)).texts["symptoms"]
    assert "KL explodes in 1 of 2 phases, last in phase 2: 1.5 at the worst (" in text
    assert "the training of ppo" in text
    assert "dpo" not in text  # whose metrics are not those of phases


def test_every_model_has_its_curves_with_the_line_of_validation(parsed):
    labels = [found["aria-label"] for tag, found in parsed.elements if tag == "svg" and "aria-label" in found]
    for name in ("sft", "rm", "dpo", "ppo"):
        both = "training from 0.9 at step 1 to 0.5 at step 2; validation from 0.6 at step 2 to 0.6 at step 2"
        assert f"{name} loss: {both}" in labels
        assert f"{name} grad_norm: training from 2 at step 1 to 1 at step 2" in labels
    curve = "accuracy from 0.5 at confidence 0.55 to 0.75 at confidence 0.65"
    assert any(label.startswith(f"rm reliability: {curve}") for label in labels)
    assert len(labels) == 9


def test_what_models_and_data_say_is_text_and_nothing_else(page, parsed):
    assert {tag for tag, _ in parsed.elements} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "span", "i", "code", "small"),
        *("table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "svg", "g", "path", "defs", "use"),
        *("clippath", "rect", "details", "summary", "section", "strong"),
    }
    assert "{{ 7 * 7 }}" in page
    shown = HOSTILE.encode("utf-8", "xmlcharrefreplace").decode()
    assert "&#55357;" in shown
    first = parsed.texts["response"][0]
    assert 'answer of sft to 0 <script>alert(1)</script> {{ 7 * 7 }} {% raw %} "quoted" & </div>' in first


def test_half_a_surrogate_pair_is_written_as_a_reference(run_folder):
    assert report(run_folder).returncode == 0
    assert "half of a pair: &#55357;" in (run_folder / "metrics/report.html").read_text(encoding="utf-8")


def test_nothing_is_fetched_and_ids_are_unique(page, parsed):
    assert "http:" not in page
    assert "https:" not in page
    assert "url(" not in page.replace("url(#", "")
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0
    for _, attributes in parsed.elements:
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")


def test_samples_stand_side_by_side(parsed):
    responses = parsed.texts["response"]
    assert len(responses) == 3 * SHOWN_SAMPLES
    for row in range(SHOWN_SAMPLES):
        for policy, text in zip(("sft", "dpo", "ppo"), responses[3 * row : 3 * row + 3], strict=True):
            assert f"answer of {policy} to {row} " in text
            assert ("cut off before EOS" in text) == (row == 1)
    assert "reward −0.40, gold 0.10, 31 tokens" in responses[0]
    assert "reward 0.03, gold 0.53, KL 8.50, 31 tokens" in responses[1]
    assert len(parsed.texts["prompt"]) == SHOWN_SAMPLES


def test_real_data_without_gold_and_with_one_policy(tmp_path):
    parsed = Page(page_in(write_run(tmp_path, policies=("dpo",), gold=False)))
    head, row = parsed.tables[0]
    assert [cell[0] for cell in head[1:5]] == ["perplexity", "reward", "win rate by reward", "KL from models/sft, nats"]
    assert row[0] == ["DPO"]
    assert "Bayes accuracy" not in [cell[0] for cell in parsed.tables[1][0] if cell]
    assert parsed.tables[4][1:] == [[["prepare_data: empty reply"], ["4"]], [["tokenize_data sft: too long"], ["12"]]]
    assert "no gold utility to check it against" in parsed.texts["outcome"][0]
    # The reference's answer to the same prompt comes with the policy's own.
    assert "own answer of sft to 0" in parsed.texts["response"][0]
    assert "reward 0.50" in parsed.texts["response"][0]
    assert "answer of dpo to 0" in parsed.texts["response"][1]
    assert "gold" not in "".join(parsed.texts["response"])


def test_sft_alone_without_a_reward_model(tmp_path):
    page = page_in(write_run(tmp_path, policies=("sft",), reward=False))
    parsed = Page(page)
    assert "The perplexity of 400 test texts is 12.5 for SFT." in parsed.texts["outcome"][0]
    assert [row[0] for row in parsed.tables[0][1:]] == [["SFT"]]
    assert "Reward models" not in page
    assert "beats" not in page


def test_what_params_yaml_does_not_name_is_not_shown_and_not_read(tmp_path):
    write_run(tmp_path)
    write_params(tmp_path, ("sft", "dpo"), reward=True)
    write(tmp_path, "metrics/evaluate/ppo.json", "broken")
    page = page_in(tmp_path)
    assert "PPO" not in page
    assert "DPO" in page


def test_nothing_evaluated_is_a_report_of_data_and_curves(tmp_path):
    write_run(tmp_path)
    settings = default_params()
    settings["evaluate"]["policies"] = {}
    settings["evaluate_rm"] = {}
    settings["score_samples"]["policies"] = []
    settings["train_grpo"] = {}
    write_yaml(tmp_path / "params.yaml", settings)
    page = page_in(tmp_path)
    assert "Nothing was evaluated." in page
    assert "Policies" not in page
    assert "rm loss: training" in page


def test_each_source_is_a_row_below_the_whole(tmp_path):
    write_run(tmp_path)
    metrics = evaluation("dpo", True)
    metrics |= {f"{key}/{source}": value for key, value in metrics.items() for source in ("hh", "my_rows")}
    write(tmp_path, "metrics/evaluate/dpo.json", metrics)
    rows = json.loads((tmp_path / "metrics/prepare_data.json").read_text())
    more = {f"{source}/{key}": 7 for key in rows if "/" in key for source in ("hh", "my_rows")}
    write(tmp_path, "metrics/prepare_data.json", rows | more)
    tables = Page(page_in(tmp_path)).tables
    assert [row[0][0] for row in tables[0][1:]] == ["SFT", "DPO", "DPO, hh", "DPO, my_rows", "PPO"]
    assert tables[0][3][1] == ["12.50"]
    names = [row[0][0] for row in tables[3][1:]]
    assert names[:3] == ["sft", "sft, hh", "sft, my_rows"]
    assert tables[3][2][1:4] == [["7"], ["7"], ["7"]]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "metrics/prepare_data.json",
            "metrics/tokenize_data/prompts.json",
            "metrics/training/rm.json",
            "metrics/training/dpo.json",
        ),
        *("metrics/curves/sft.csv", "metrics/curves/ppo.csv", "data/samples/ppo.jsonl"),
    ],
)
def test_a_missing_file_is_named(tmp_path, name):
    (write_run(tmp_path) / name).unlink()
    with pytest.raises(StageError) as caught:
        page_in(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics/training/rm.json", "{", "not valid JSON"),
        ("metrics/training/rm.json", "[1]", "expected a JSON object of numbers, found list"),
        ("metrics/training/rm.json", '{"validation_loss": NaN}', "not usable JSON (NaN is not a JSON number"),
        (
            "metrics/training/rm.json",
            '{"validation_loss": "low"}',
            "'validation_loss' is 'low', expected a finite number",
        ),
        (
            "metrics/training/rm.json",
            '{"validation_loss": true}',
            "'validation_loss' is True, expected a finite number",
        ),
        ("metrics/evaluate_rm/rm.json", '{"pairs": 3}', "'accuracy' is missing; run evaluate_rm@rm again"),
        ("metrics/training/rm.json", '{"validation_loss": 0.6}', "'steps' is missing"),
        (
            "metrics/evaluate/dpo.json",
            '{"prompts": 16, "gold_mean": 0.5}',
            "'kl_to_reference_mean' is missing; run evaluate@dpo again",
        ),
        ("data/sample_scores/dpo.jsonl", '{"row": 0}\n', "line 1: expected a row and a score"),
        ("data/sample_scores/dpo.jsonl", '{"row": 0, "score": 1.0}\n', "is of other samples than evaluate has made"),
        ("metrics/curves/rm.csv", "step,loss\n1,low\n", "column 'loss' holds 'low'"),
        ("data/samples/dpo.jsonl", "", "is empty"),
        (
            "data/samples/dpo.jsonl",
            '{"row": 0}\n',
            "line 1: 'prompt' is missing, expected a text, or a list of messages",
        ),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, text, message):
    write(write_run(tmp_path), name, text)
    with pytest.raises(StageError) as caught:
        page_in(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert message in str(caught.value)


def test_samples_of_other_prompts_are_refused(tmp_path):
    write_run(tmp_path)
    rows = [sample("ppo", row, gold=True) for row in range(ROWS)]
    rows[-1]["prompt"][0]["content"] += "?"  # beyond those that are shown
    write_samples(tmp_path, "ppo", rows)
    with pytest.raises(StageError, match=r"ppo\.jsonl is of other prompts than .*sft\.jsonl.*evaluate@ppo"):
        page_in(tmp_path)


BIG = "1" + 400 * "0"  # an integer beyond every float
DEEP = 5000 * "[" + 5000 * "]"
BROKEN_METRICS = [
    ('{"validation_loss": ' + BIG + "}", "'validation_loss' is 1000", "expected a finite number of at most 1e+100"),
    ('{"validation_loss": %s}' % (12 * BIG), "rm.json", "not usable JSON"),
    ('{"validation_loss": 1e400}', "'validation_loss' is inf", "expected a finite number"),
    ('{"validation_loss": 1e308}', "'validation_loss' is 1e+308", "expected a finite number"),
    ('{"validation_loss": null}', "'validation_loss' is None", "run train_rm@rm again"),
    ('{"validation_loss": [0.5]}', "'validation_loss' is [0.5]", "run train_rm@rm again"),
    (
        '{"validation_loss": {"a": %s}}' % (900 * "[" + 900 * "]"),
        "'validation_loss' is {'a': [[[[",
        "run train_rm@rm again",
    ),
    ('{"validation_loss": ' + DEEP + "}", "rm.json", "brackets nested too deeply"),
    ('{"%s": "x"}' % (100_000 * "k"), "kkk", "run train_rm@rm again"),
    ('{"a\\nb": "x"}', "'a\nb' is 'x'", "run train_rm@rm again"),
    ('{"validation_accuracy": 1.5}', "'validation_accuracy' is 1.5", "expected a share from 0 to 1"),
    ('{"validation_accuracy_ci_low": -0.5}', "'validation_accuracy_ci_low' is -0.5", "expected a share from 0 to 1"),
    ('{"steps": -3}', "'steps' is -3", "expected a whole number, at least 0"),
    ('{"steps": 2.5}', "'steps' is 2.5", "expected a whole number, at least 0"),
    ("", "rm.json", "not valid JSON"),
    ("null", "rm.json", "found NoneType"),
    (b'{"validation_l\xffss": 1}', "rm.json", "not UTF-8"),
]
BROKEN_SAMPLES = [
    ({"prompt": [5]}, "'prompt' is [5]"),
    ({"prompt": [{"role": "user"}]}, "'prompt' is [{'role': 'user'}]"),
    ({"prompt": [{"role": ["user"], "content": "x"}]}, "'prompt' is [{"),
    ({"prompt": [{"role": "user", "content": None}]}, "'prompt' is [{"),
    ({"prompt": {"role": "user", "content": "x"}}, "'prompt' is {"),
    ({"gold": "x"}, "'gold' is 'x'"),
    ({"gold": None}, "'gold' is None"),
    ({"reference_gold": True}, "'reference_gold' is True"),
    ({"length": -1}, "'length' is -1"),
    ({"length": 2.5}, "'length' is 2.5"),
    ({"kl": 10**401}, "'kl' is 1000"),
    ({"kl": 1e308}, "'kl' is 1e+308"),
    ({"kl": [1]}, "'kl' is [1]"),
    ({"row": True}, "'row' is True"),
    ({"row": -1}, "'row' is -1"),
    ({"ended": 1}, "'ended' is 1"),
    ({"response": 5}, "'response' is 5"),
    ({"response": None}, "'response' is None"),
    ({"reference_response": ["a"]}, "'reference_response' is ['a']"),
]


def refusal(folder):
    """The one message, at its end the command's, that the report is refused with."""
    with pytest.raises(StageError) as caught:
        page_in(folder)
    return str(caught.value)


@pytest.fixture(scope="module")
def broken_run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("broken"))


@pytest.mark.parametrize("reward", ["steps", "accuracy", "length_tokens"])
def test_a_reward_may_have_a_name_that_means_a_share_or_a_count_elsewhere(reward):
    fits, _ = expectation(f"validation_rewards_{reward}")
    assert fits(-0.37)


@pytest.mark.parametrize(("content", "where", "what"), BROKEN_METRICS, ids=range(len(BROKEN_METRICS)))
def test_metrics_that_are_not_usable_are_named(broken_run, content, where, what):
    path = broken_run / "metrics/training/rm.json"
    good = path.read_bytes()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(broken_run)
    path.write_bytes(good)
    assert str(path) in message
    assert where in message
    assert what in message


@pytest.mark.parametrize(("change", "what"), BROKEN_SAMPLES, ids=[what for _, what in BROKEN_SAMPLES])
def test_samples_that_are_not_usable_are_named_beyond_those_shown_too(broken_run, change, what):
    rows = [sample("dpo", row, gold=True) for row in range(ROWS)]
    write_samples(broken_run, "dpo", [*rows[:-1], rows[-1] | change])
    message = refusal(broken_run)
    write_samples(broken_run, "dpo", rows)
    assert f"dpo.jsonl, line {ROWS}: {what}" in message
    assert message.endswith("run evaluate@dpo again")


@pytest.mark.parametrize("key", ["row", "prompt", "response", "length", "ended"])
def test_a_sample_without_a_key_is_named(broken_run, key):
    rows = [sample("dpo", row, gold=True) for row in range(ROWS)]
    write_samples(broken_run, "dpo", [{name: value for name, value in rows[0].items() if name != key}, *rows[1:]])
    message = refusal(broken_run)
    write_samples(broken_run, "dpo", rows)
    assert f"dpo.jsonl, line 1: '{key}' is missing" in message


def test_the_command_says_it_in_one_line_with_code_2(tmp_path):
    write(write_run(tmp_path), "metrics/training/rm.json", '{"a\\nb%s": "x"}' % (5000 * "\\ud83d"))
    process = report(tmp_path)
    assert process.returncode == 2
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: metrics/training/rm.json: 'a\\nb\\ud83d")
    assert len(line) < LONGEST_MESSAGE + 20


def test_samples_of_another_evaluation_are_refused(tmp_path):
    def refused(rows):
        write_samples(tmp_path, "dpo", rows)
        message = refusal(tmp_path)
        assert "dpo.jsonl" in message
        assert "evaluate/dpo.json" in message
        assert message.endswith("so they are of two evaluations; run evaluate@dpo again")
        return message

    write_run(tmp_path)
    rows = [sample("dpo", row, gold=True) for row in range(ROWS)]
    assert "has 15 rows" in refused(rows[:-1])
    assert "mean kl 8.500013, and" in refused([rows[0] | {"kl": rows[0]["kl"] + 2e-4}, *rows[1:]])
    assert "mean length" in refused([*rows[:-1], rows[-1] | {"length": 33}])
    assert "mean ended" in refused([*rows[:-1], rows[-1] | {"ended": False}])
    assert "mean gold" in refused([*rows[:-1], rows[-1] | {"gold": 9.0}])
    assert "gold utilities" in refused([sample("dpo", row, gold=False) for row in range(ROWS)])
    assert "mean kl" in refused([sample("ppo", row, gold=True) for row in range(ROWS)])
    # Samples are rounded to six decimals.
    write_samples(tmp_path, "dpo", [row | {"kl": row["kl"] + 4e-7} for row in rows])
    page_in(tmp_path)


def test_scores_of_another_reward_model_are_refused(tmp_path):
    write_run(tmp_path)
    rows = [score("dpo", row) for row in range(ROWS)]
    write_scores(tmp_path, "dpo", [rows[0] | {"score": 9.0}, *rows[1:]])
    message = refusal(tmp_path)
    assert "sample_scores/dpo.jsonl: mean score" in message
    assert message.endswith("run score_samples@dpo again")


def test_gold_of_a_part_of_the_prompts(tmp_path):
    write_run(tmp_path, policies=("dpo",))
    write(tmp_path, "metrics/evaluate/dpo.json", evaluation("dpo", True) | {"gold_prompts": 4})
    write_samples(tmp_path, "dpo", [sample("dpo", row, gold=row % 4 == 2) for row in range(ROWS)])
    parsed = Page(page_in(tmp_path))
    assert "DPO beats models/sft in mean gold utility on 4 of them (+0.42" in parsed.texts["outcome"][0]
    shown = ["gold" in text for text in parsed.texts["response"]]
    assert shown == [row % 4 == 2 for row in range(8) for _ in ("reference", "dpo")]
    write_samples(tmp_path, "dpo", [sample("dpo", row, gold=row % 5 == 2) for row in range(ROWS)])
    message = refusal(tmp_path)
    assert "data/samples/dpo.jsonl has gold utilities in 3 rows" in message
    assert "metrics/evaluate/dpo.json of 4 prompts" in message


def test_gold_in_the_samples_alone_is_refused(tmp_path):
    write_run(tmp_path, gold=False)
    write_samples(tmp_path, "dpo", [sample("dpo", row, gold=True) for row in range(ROWS)])
    assert "gold utilities" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "curve", "what"),
    [
        ("rm", "step,loss\n1,0.5\n", "rm.csv ends at step 1, and"),
        ("ppo", CURVE + "3,0.4,1.0,0.5\n", "ppo.csv ends at step 3, and"),
        ("dpo", CURVE.replace("0.6", "0.61"), "dpo.csv has validation loss 0.61 at step 2"),
        ("sft", "step,loss,validation/loss\n1,0.5,0.6\n2,0.5,\n", "sft.csv has validation loss nothing at step 2"),
    ],
)
def test_a_curve_of_another_run_is_refused(tmp_path, name, curve, what):
    write(write_run(tmp_path), f"metrics/curves/{name}.csv", curve)
    message = refusal(tmp_path)
    assert what in message
    assert f"metrics/training/{name}.json says" in message
    assert message.endswith(f"so they are of two runs; run train_{name}@{name} again")


def test_the_kept_step_may_come_before_the_last(tmp_path):
    metrics = training("rm") | {"validation_loss": 0.3, "steps": 3, "kept_step": 1}
    write(write_run(tmp_path), "metrics/training/rm.json", metrics)
    write(tmp_path, "metrics/curves/rm.csv", "step,loss,validation/loss\n1,0.5,0.3\n2,0.5,0.4\n3,0.5,0.5\n")
    page_in(tmp_path)


HOSTILE_COLUMNS = [
    "url(#x",
    'href="#x',
    "</script><b>",
    "line\nbreak",
    "x" * 5000,
    ' d="',
    "#010203",
    "a\x00b",
    "$x^2$",
]


def test_columns_of_any_name_are_drawn_and_ids_stay_unique(tmp_path):
    names = ["step", *(f'"{name}"'.replace('="', '=""') for name in HOSTILE_COLUMNS)]
    lines = [names, *([step] + [step] * len(HOSTILE_COLUMNS) for step in (1, 2))]
    write(write_run(tmp_path), "metrics/curves/ppo.csv", "\n".join(",".join(map(str, line)) for line in lines))
    page = page_in(tmp_path)
    parsed = Page(page)
    labels = [found["aria-label"] for tag, found in parsed.elements if tag == "svg" and "aria-label" in found]
    for name in HOSTILE_COLUMNS:
        assert f"ppo {name}: training from 1 at step 1 to 2 at step 2" in labels
    assert {tag for tag, _ in parsed.elements}.isdisjoint({"script", "b"})
    ids = [found["id"] for _, found in parsed.elements if "id" in found]
    assert len(ids) == len(set(ids))
    referred = re.findall(r'(?:href="#|: url\(#|"url\(#)([\w-]+)', page)
    assert set(referred) == set(ids)


def test_large_and_infinite_values_are_drawn_or_said_to_be_missing(tmp_path):
    write(write_run(tmp_path), "metrics/curves/ppo.csv", "step,a,b,c\n1,1e99,-inf,inf\n2,-1e100,3e38,inf\n")
    page = page_in(tmp_path)
    assert "ppo a: training from 1e+99 at step 1 to -1e+100 at step 2" in page
    assert "ppo b: training from 3e+38 at step 2 to 3e+38 at step 2" in page
    assert "<code>b</code> <small>1 infinite value not drawn</small>" in page
    assert "ppo c: no values" in page
    assert "<code>c</code> <small>2 infinite values not drawn</small>" in page
    assert "nan" not in page.lower().split("<h3><code>ppo")[1].split("<h2>")[0]


def test_folders_and_links_in_the_place_of_files_are_named(tmp_path):
    write_run(tmp_path)
    dpo, sft = (tmp_path / f"metrics/evaluate/{policy}.json" for policy in ("dpo", "sft"))
    dpo.unlink()
    dpo.symlink_to("nowhere")
    assert f"{dpo} is not a file" in refusal(tmp_path)
    dpo.unlink()
    dpo.mkdir()
    assert f"{dpo} is not a file" in refusal(tmp_path)
    dpo.rmdir()
    write_params(tmp_path, ("sft", "ppo"), reward=True)
    sft.rename(tmp_path / "elsewhere.json")
    sft.symlink_to(tmp_path / "elsewhere.json")
    page_in(tmp_path)
    curve = tmp_path / "metrics/curves/rm.csv"
    curve.unlink()
    os.mkfifo(curve)
    assert f"{curve} is not a file" in refusal(tmp_path)


def test_a_file_in_the_place_of_a_folder_is_one_message(tmp_path):
    write_run(tmp_path)
    shutil.rmtree(tmp_path / "metrics/evaluate")
    write(tmp_path, "metrics/evaluate", "x")
    assert "metrics/evaluate/sft.json does not exist; the report needs it: run evaluate@sft" in refusal(tmp_path)


def test_a_folder_in_the_place_of_the_page_stays(tmp_path):
    write(write_run(tmp_path), "metrics/report.html/kept", "x")
    process = report(tmp_path)
    assert process.returncode == 2
    assert process.stderr.startswith("error: metrics/report.html is a folder, expected an HTML file to write")
    assert (tmp_path / "metrics/report.html/kept").exists()


def test_what_is_missing_keeps_the_old_page(tmp_path):
    write_run(tmp_path)
    write(tmp_path, "metrics/report.html", "old")
    (tmp_path / "metrics/evaluate/sft.json").unlink()
    process = report(tmp_path)
    assert process.returncode == 2
    assert process.stderr.startswith("error: metrics/evaluate/sft.json does not exist; the report needs it")
    assert (tmp_path / "metrics/report.html").read_text(encoding="utf-8") == "old"


def test_help_waits_for_no_drawing_library():
    code = (
        "import sys, stages.report, stages.tools.plot_curves; print([name for name in sys.modules if '.' not in name])"
    )
    modules = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout
    for heavy in ("matplotlib", "pandas", "numpy", "jinja2", "torch"):
        assert f"'{heavy}'" not in modules
