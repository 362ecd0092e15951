"""Does PPO by the logit of a classifier's label make a language model write positive film reviews?

The profile `gpt2-imdb`, from a Hub on loopback to its evaluation, with real reviews and models that are made of them
here in minutes: a small language model, trained by train_sft on passages of all reviews as it is in the profile, and a
classifier trained on sentences of one half of them. A second classifier, trained on the other half, judges: what
pleases the first one alone is no positive review. All test prompts are answered before and after PPO with the same
random numbers; differences have 95 % intervals by bootstrap over prompts.

    python -m tests.proofs.positive_reviews FOLDER --table tests/proofs/positive_reviews.md
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from stages.lib.command.jsonl import read_jsonl
from stages.lib.evaluation.intervals import paired_bootstrap_interval
from stages.lib.settings.declaration import block
from stages.lib.settings.sections import default_params
from stages.lib.settings.sources import FileSource
from stages.tools.use_profile import settings_of
from tests.film_sentiment import LONGEST, reviews, save_sentiment
from tests.hub_server import HubRepository, HubServer, repository_of_folder
from tests.pipeline.graph import all_instances, load_graph
from tests.proofs.measured_commit import measured_commit
from tests.proofs.online_rounds import Difference
from tests.proofs.stages_once import run_once
from tests.stages.tiny_pipeline import PROJECT, lay_over, new_project, write_yaml

PROFILE = "gpt2-imdb"
HALF = 1000  # reviews that the reward's classifier learns from; the judge learns from the others
WORDS, PASSAGES = 24, 10  # of a passage, at least; of a review, its first ones
SENTENCES = 40_000  # at most, that a classifier learns from
# A hundredth of the profile's model, which takes a larger learning rate; fewer phases; and a small classifier, whose
# logits are a fraction of the profile's, and so is the KL's coefficient.
SMALLER = {
    "prepare_data": {"test_fraction": 0.2},
    "train_ppo": {
        "ppo": {
            "iterations": 60,
            "kl": {"controller": {"coef": 0.05, "type": "adaptive", "target": 6.0, "horizon": 10000.0}},
            "policy_optimizer": {"learning_rate": 2e-4},
        }
    },
    "evaluate": {"max_prompts": None},
}
DATASET = "plain_text/train.jsonl"
SHOWN = 4  # prompts whose responses the table shows
HEAD = """# Positive film reviews by PPO

The profile `{profile}` at commit {commit}, made smaller: {iterations} phases, learning rate {learning_rate}, the KL's
first coefficient {coef}, and a language model of {parameters:,} parameters that was trained on reviews here; `make
prove` makes this table again. The reward is the logit POSITIVE of a classifier that is right about {accuracy:.1%} of
unseen sentences. The judge's logit is POSITIVE less NEGATIVE of a classifier of other reviews, right about
{judge_accuracy:.1%}. What PPO adds is the mean difference between its responses and those of the model before it to
the same {prompts} test prompts, with the 95 % interval; "better" is how often the reward is higher. KL is in nats per
response.

| seed | reward before | PPO adds | better | judge before | PPO adds | judged positive before, after | KL |
|---|---|---|---|---|---|---|---|
"""


def passages(text: str) -> Iterator[str]:
    """The first passages of a review: whole sentences of at least `WORDS` words together."""
    words: list[str] = []
    made = 0
    for line in text.splitlines():
        words += line.split()
        if len(words) >= WORDS and made < PASSAGES:
            yield " ".join(words)
            words, made = [], made + 1


def language_model(folder: Path) -> Path:
    """A model that has read reviews, trained by this project's own stages. Returns its folder."""
    if not folder.exists():
        (folder / "data/raw").mkdir(parents=True)
        new_project(folder)
        rows = [json.dumps({"text": passage}) for text, _ in reviews() for passage in passages(text)]
        (folder / "data/raw/rows.jsonl").write_text("\n".join(rows) + "\n")
        settings: dict[str, Any] = default_params()
        source = block(FileSource, path="data/raw/rows.jsonl", format="text", kinds=["sft"])
        settings["sources"] = {"files": {"reviews": source}, "hub": {}, "tasks": {}, "arithmetic": {}}
        settings["prepare_data"]["kinds"] = ["sft"]
        lay_over(settings["prepare_base"]["scratch"], {"base": {"vocab_size": 2048, "max_positions": 128}})
        settings["tokenize_data"] |= {"max_length": 96, "max_prompt_length": 64, "truncation": "drop"}
        lay_over(settings["train_sft"]["sft"], {"batch_size": 8, "optimizer": {"learning_rate": 2e-3}})
        settings |= {name: {} for name in ("train_rm", "ref_logprobs", "train_dpo", "train_ppo", "train_grpo")}
        write_yaml(folder / "params.yaml", settings)
    run_once(folder, ("read_source@reviews", "prepare_data", "prepare_base@base", "tokenize_data@sft", "train_sft@sft"))
    return folder / "models/sft"


def classifiers(folder: Path) -> dict[str, float]:
    """Those of the reward and of the judge, in `folder`; by their names, how often each is right."""
    kept = folder / "accuracies.json"
    if not kept.exists():
        halves = {"reward": reviews()[:HALF], "judge": reviews()[HALF:]}
        found = {name: save_sentiment(folder / name, half, SENTENCES) for name, half in halves.items()}
        kept.write_text(json.dumps(found))
    return json.loads(kept.read_text())


def hub_of(base: Path, classifier: Path) -> HubServer:
    """A Hub that has what the profile names."""
    settings = settings_of(PROJECT / f"profiles/{PROFILE}.yaml")
    models = {"base": settings["prepare_base"]["hub"]["base"], "positive": settings["fetch_model"]["positive"]}
    source = settings["sources"]["hub"]["imdb"]
    rows = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in reviews())
    return HubServer(
        [
            HubRepository("datasets", source["dataset"], source["revision"], {DATASET: rows.encode()}),
            *(
                repository_of_folder("models", models[name]["model"], models[name]["revision"], path)
                for name, path in (("base", base), ("positive", classifier))
            ),
        ]
    )


def run(folder: Path, seed: int, environment: dict[str, str]) -> Path:
    """All stages of the profile with a seed up to the scores of what was sampled."""
    project = folder / f"seed-{seed}"
    settings = settings_of(PROJECT / f"profiles/{PROFILE}.yaml") | {"seed": seed}
    lay_over(settings, SMALLER)
    if not project.exists():
        project.mkdir(parents=True)
        for name in ("stages", "rewards", "dvc.yaml", "runtime.yaml"):
            (project / name).symlink_to(PROJECT / name)
        shutil.copytree(PROJECT / "code_manifests", project / "code_manifests")
    write_yaml(project / "params.yaml", settings)
    stages = [stage for stage in all_instances(load_graph(), settings) if stage not in ("code_manifest", "report")]
    run_once(project, stages, environment)
    return project


def judged(folder: Path, texts: list[str]) -> list[float]:
    """The logit POSITIVE less NEGATIVE that a classifier gives to each text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    given = tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
    with torch.no_grad():
        logits = model(**given).logits.double()
    return (logits[:, 1] - logits[:, 0]).tolist()


def judgement(project: Path, judge: Path) -> tuple[list[float], list[float]]:
    """Of the responses before PPO and after it, to each test prompt."""
    rows = [*read_jsonl(project / "data/samples/ppo.jsonl")]
    return tuple(
        judged(judge, [row["prompt"] + row[name] for row in rows]) for name in ("reference_response", "response")
    )


def added(before: list[float], after: list[float]) -> Difference:
    differences = [new - old for old, new in zip(before, after, strict=True)]
    return Difference(sum(differences) / len(differences), *paired_bootstrap_interval(differences, seed=0))


def rewards(project: Path) -> tuple[list[float], list[float]]:
    """Of the responses before PPO and after it, to each test prompt."""
    rows = [*read_jsonl(project / "data/sample_scores/ppo.jsonl")]
    return [row["reference_score"] for row in rows], [row["score"] for row in rows]


def row_of(project: Path, seed: int, judge: Path) -> tuple[str, bool]:
    """A row of the table, and whether both reward and judge are higher after PPO, by their intervals."""
    evaluated = json.loads((project / "metrics/evaluate/ppo.json").read_text())
    before, after = rewards(project)
    judged_before, judged_after = judgement(project, judge)
    reward, opinion = added(before, after), added(judged_before, judged_after)
    better = sum(new > old for old, new in zip(before, after, strict=True)) / len(before)
    positive = [sum(logit > 0 for logit in side) / len(side) for side in (judged_before, judged_after)]
    kl = Difference(*(evaluated[f"kl_to_reference_{end}"] for end in ("mean", "ci_low", "ci_high")))
    cells = [
        *(str(seed), f"{sum(before) / len(before):.2f}", str(reward), f"{better:.0%}"),
        *(f"{sum(judged_before) / len(judged_before):+.2f}", str(opinion)),
        *(", ".join(f"{share:.0%}" for share in positive), str(kl).lstrip("+")),
    ]
    return f"| {' | '.join(cells)} |\n", reward.low > 0 and opinion.low > 0


def examples(project: Path) -> str:
    lines = ["", "The first test prompts of the first seed, in italics, and what follows before PPO and after:", ""]
    for row in [*read_jsonl(project / "data/samples/ppo.jsonl")][:SHOWN]:
        both = (" ".join(row[name].split()) for name in ("reference_response", "response"))
        lines += [f"- *{row['prompt'].strip()}*", *(f"  - {text}" for text in both)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--table", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    folder = options.folder.resolve()
    try:
        reviews()
    except pytest.skip.Exception as absent:
        print(f"left out: {absent}")
        return
    base, right = language_model(folder / "language-model"), classifiers(folder)
    with hub_of(base, folder / "reward") as hub:
        environment = hub.environment(folder / "cache")
        projects = {seed: run(folder, seed, environment) for seed in options.seeds}
    first = next(iter(projects.values()))
    ppo: dict[str, Any] = SMALLER["train_ppo"]["ppo"]
    text = HEAD.format(
        profile=PROFILE,
        commit=measured_commit(),
        iterations=ppo["iterations"],
        learning_rate=ppo["policy_optimizer"]["learning_rate"],
        coef=ppo["kl"]["controller"]["coef"],
        parameters=sum(weight.numel() for weight in load_file(base / "model.safetensors").values()),
        accuracy=right["reward"],
        judge_accuracy=right["judge"],
        prompts=len(rewards(first)[0]),
    )
    found = [row_of(project, seed, folder / "judge") for seed, project in projects.items()]
    text += "".join(row for row, _ in found) + examples(first)
    print(text)
    if options.table:
        options.table.write_text(text)
    sys.exit(0 if all(rose for _, rose in found) else 1)


if __name__ == "__main__":
    main()
