import json
import os
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from stages.lib.errors import StageError
from stages.write_report import SHOWN_SAMPLES, page_of, read_inputs
from tests.real_files import PROJECT

HOSTILE = '<script>alert(1)</script> {{ 7 * 7 }} {% raw %} "quoted" & </div> half of a pair: \ud83d'
CURVE = "step,loss,grad_norm,eval/loss\n1,0.9,2.0,\n2,0.5,1.0,0.6\n"
ARGUMENTS = ("--metrics", "metrics", "--samples", "data/samples", "--out", "metrics/report.html")
GAINS = {"sft": 0.0, "dpo": 0.425, "ppo": 0.625}


def evaluation(policy, gold):
    gain = GAINS[policy]
    metrics = {"kl_to_sft_mean": 20 * gain, "kl_to_sft_ci_low": 18 * gain, "kl_to_sft_ci_high": 22 * gain}
    metrics |= {"eos_rate": 0.9925, "length_mean": 31.62, "prompts": 400}
    metrics |= {"distinct_1": 0.0712, "distinct_2": 0.2931, "rm_calibration_error": 0.0312}
    metrics |= interval("preference_accuracy", 0.74, 0.70, 0.78)
    for measure in ("reward", "gold") if gold else ("reward",):
        metrics[f"{measure}_mean"] = 0.1 + gain
        metrics |= {f"{measure}_minus_sft_mean": gain}
        metrics |= {f"{measure}_minus_sft_ci_{end}": gain + off for end, off in (("low", -0.125), ("high", 0.125))}
        metrics |= interval(f"{measure}_win_rate_vs_sft", 0.5 + gain / 2, 0.45 + gain / 2, 0.55 + gain / 2)
    return metrics


def interval(name, value, low, high):
    return {name: value, f"{name}_ci_low": low, f"{name}_ci_high": high}


def sample(policy, row, gold):
    found = {
        "row": row,
        "prompt": [{"role": "user", "content": f"question {row} {HOSTILE}"}],
        "response": f"answer of {policy} to {row} {HOSTILE}",
        "reward": 1.5,
        "kl": 3.25,
        "length": 21,
        "ended": row != 1,
        "sft_response": f"own answer of sft to {row}",
        "sft_reward": 0.5,
    }
    return found | ({"gold": -0.75, "sft_gold": 0.25} if gold else {})


def write(folder, name, values):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")


def write_run(folder, policies=("sft", "dpo", "ppo"), gold=True):
    """All files of a finished run that the report reads."""
    rows = {f"{kind}/{split}_rows": 400 for kind in ("sft", "preference", "prompts") for split in ("train", "eval")}
    of_data = (
        {"bayes_accuracy": 0.803} if gold else {"raw_rows": 2312, "dropped/empty_reply": 4, "dropped/duplicate": 0}
    )
    write(folder, "metrics/prepare_data.json", rows | of_data)
    for kind in ("sft", "preference", "prompts"):
        counts = {"train_rows": 1388, "eval_rows": 399, "train_tokens": 412345, "eval_tokens": 41234}
        write(folder, f"metrics/tokenize/{kind}.json", counts | {"dropped/too_long": 12 if kind == "sft" else 0})
    for stage in ("train_sft", "train_rm", *(f"train_{policy}" for policy in policies if policy != "sft")):
        write(folder, f"metrics/{stage}.json", {"eval_loss": 0.4812, **interval("eval_accuracy", 0.78, 0.74, 0.82)})
        write(folder, f"metrics/curves/{stage}.csv", CURVE)
    for policy in policies:
        write(folder, f"metrics/evaluate/{policy}.json", evaluation(policy, gold))
        lines = [json.dumps(sample(policy, row, gold)) for row in range(SHOWN_SAMPLES + 2)]
        write(folder, f"data/samples/{policy}.jsonl", "\n".join(lines) + "\n")
    return folder


def page_in(folder):
    return page_of(read_inputs(folder / "metrics", folder / "data/samples"))


def report(folder, **environment):
    return subprocess.run(
        [sys.executable, "-m", "stages.write_report", *ARGUMENTS],
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
        *("reward", "gold utility", "win rate by gold", "KL from SFT, nats", "ends with EOS", "length, tokens"),
        *("distinct-1", "distinct-2", "preference accuracy"),
    ]
    assert rows[0] == [
        *(["SFT"], ["0.10"], ["0.10"], ["–"], ["0.00"], ["99.2 %"], ["31.6"], ["0.071"], ["0.293"], ["–"])
    ]
    assert rows[1] == [
        ["DPO"],
        *(["0.53", "+0.42 (+0.30 to +0.55)"], ["0.53", "+0.42 (+0.30 to +0.55)"], ["71.2 %", "66.2 % to 76.2 %"]),
        *(["8.50", "7.65 to 9.35"], ["99.2 %"], ["31.6"], ["0.071"], ["0.293"], ["74.0 %", "70.0 % to 78.0 %"]),
    ]
    assert rows[2][0] == ["PPO"]


def test_tables_of_reward_model_and_data(parsed):
    assert parsed.tables[1][1] == [
        *(["Reward model"], ["78.0 %", "74.0 % to 82.0 %"], ["80.3 %"], ["0.4812"], ["0.031"]),
    ]
    assert parsed.tables[2][1] == [["sft"], ["400"], ["400"], ["1,388"], ["399"], ["412,345"], ["41,234"]]
    assert parsed.tables[3][1:] == [[["tokenize sft: too long"], ["12"]]]


def test_outcome_is_three_sentences(parsed):
    assert parsed.texts["outcome"][0].count("On 400 held-out prompts, DPO beats SFT in mean gold utility (+0.42") == 1
    after = next(index for index, (_, found) in enumerate(parsed.elements) if found.get("class") == "outcome")
    assert [tag for tag, _ in parsed.elements[after + 1 : after + 5]] == ["p", "p", "p", "h2"]


def test_every_stage_has_its_curves_with_the_held_out_line(parsed):
    labels = [attributes["aria-label"] for tag, attributes in parsed.elements if tag == "svg"]
    for stage in ("train_sft", "train_rm", "train_dpo", "train_ppo"):
        assert (
            f"{stage} loss: training from 0.9 at step 1 to 0.5 at step 2; held-out from 0.6 at step 2 to 0.6 at step 2"
            in (labels)
        )
        assert f"{stage} grad_norm: training from 2 at step 1 to 1 at step 2" in labels
    assert len(labels) == 8


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
    assert "reward 1.50, gold −0.75, 21 tokens" in responses[0]
    assert "reward 1.50, gold −0.75, KL 3.25, 21 tokens" in responses[1]
    assert len(parsed.texts["prompt"]) == SHOWN_SAMPLES


def test_real_data_without_gold_and_with_one_policy(tmp_path):
    parsed = Page(page_in(write_run(tmp_path, policies=("dpo",), gold=False)))
    head, row = parsed.tables[0]
    assert [cell[0] for cell in head[1:4]] == ["reward", "win rate by reward", "KL from SFT, nats"]
    assert row[0] == ["DPO"]
    assert parsed.tables[1][1][2] == ["–", "not known"]
    assert parsed.tables[3][1:] == [[["prepare_data: empty reply"], ["4"]], [["tokenize sft: too long"], ["12"]]]
    assert "no gold utility to check it against" in parsed.texts["outcome"][0]
    assert any("Not evaluated, so not here: SFT, PPO." in note for note in parsed.texts["note"])
    assert any("Made from 2,312 raw rows." in note for note in parsed.texts["note"])
    # SFT's answer to the same prompt comes with the policy's own.
    assert "own answer of sft to 0" in parsed.texts["response"][0]
    assert "answer of dpo to 0" in parsed.texts["response"][1]
    assert "gold" not in "".join(parsed.texts["response"])


def test_sft_alone(tmp_path):
    parsed = Page(page_in(write_run(tmp_path, policies=("sft",))))
    assert "nothing to compare it with" in parsed.texts["outcome"][0]
    assert [row[0] for row in parsed.tables[0][1:]] == [["SFT"]]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "metrics/prepare_data.json",
            "metrics/tokenize/prompts.json",
            "metrics/train_rm.json",
            "metrics/train_dpo.json",
        ),
        *("metrics/curves/train_sft.csv", "metrics/curves/train_ppo.csv", "data/samples/ppo.jsonl"),
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
        ("metrics/train_rm.json", "{", "not valid JSON"),
        ("metrics/train_rm.json", "[1]", "expected a JSON object of numbers, found list"),
        ("metrics/train_rm.json", '{"eval_loss": NaN}', "'eval_loss' is nan, expected a finite number"),
        ("metrics/train_rm.json", '{"eval_loss": "low"}', "'eval_loss' is 'low', expected a finite number"),
        ("metrics/train_rm.json", '{"eval_loss": true}', "'eval_loss' is True, expected a finite number"),
        ("metrics/train_rm.json", '{"eval_loss": 0.5}', "'eval_accuracy' is missing"),
        ("metrics/evaluate/dpo.json", '{"reward_mean": 0.5}', "is missing; run the stage"),
        ("metrics/curves/train_rm.csv", "step,loss\n1,low\n", "column 'loss' holds 'low'"),
        ("data/samples/dpo.jsonl", "", "is empty"),
        ("data/samples/dpo.jsonl", '{"row": 0}\n', "line 1: unusable 'prompt', found nothing"),
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
    lines = [json.dumps(sample("ppo", row, gold=True)) for row in range(1, SHOWN_SAMPLES + 2)]
    write(tmp_path, "data/samples/ppo.jsonl", "\n".join(lines))
    with pytest.raises(StageError, match=r"ppo\.jsonl is of other prompts than .*sft\.jsonl"):
        page_in(tmp_path)


def test_no_evaluation_at_all_is_an_error_with_code_2_that_keeps_the_old_page(tmp_path):
    write_run(tmp_path, policies=())
    write(tmp_path, "metrics/report.html", "old")
    process = report(tmp_path)
    assert process.returncode == 2
    assert process.stderr.splitlines() == ["error: metrics/evaluate holds the evaluation of no policy: sft, dpo, ppo"]
    assert (tmp_path / "metrics/report.html").read_text(encoding="utf-8") == "old"


def test_help_waits_for_no_drawing_library():
    code = (
        "import sys, stages.write_report, stages.plot_curves; print([name for name in sys.modules if '.' not in name])"
    )
    modules = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    ).stdout
    for heavy in ("matplotlib", "pandas", "numpy", "jinja2", "torch"):
        assert f"'{heavy}'" not in modules
