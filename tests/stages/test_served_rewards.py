"""Rewards of a server in the real stages: a killed run ends as any other, and a served reward model says the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.lib.command.jsonl import read_jsonl
from stages.lib.data.token_tables import PREFERENCE_SCHEMA, read_table
from stages.lib.rl.learner import Learner
from stages.lib.rl.rewards.reward_service import AskedReply
from stages.lib.settings.declaration import block
from stages.lib.settings.served_rewards import RemoteReward
from tests.lib.rl.rewards.reward_stand_in import StandIn, Told, server_at
from tests.stages.test_resume import cut_short, outs
from tests.stages.test_training import curve
from tests.stages.tiny_pipeline import call, inside, read_yaml, refusal, write_yaml

Copy = Callable[..., Path]
STAGE = "train_grpo@grpo"


def moody(number: int, body: Any) -> Told:
    """Another reward each time that it is asked, and none for one of the second phase's responses."""
    rewards: list[Any] = [(7 * number + len(query)) % 5 for query in body["query"]]
    return Told({"rewards": rewards if number != 1 else [None, *rewards[1:]]})


def project(copy_of_tiny: Copy, name: str, address: str, **changed: Any) -> Path:
    folder = copy_of_tiny(name)
    servers = {"ours": server_at(address, attempts=1).model_dump()}
    served = block(RemoteReward, server="ours", weight=0.5, **changed)
    runtime, params = (read_yaml(folder / name) for name in ("runtime.yaml", "params.yaml"))
    runtime["default"] |= {"checkpoint_seconds": 0.0, "reward_servers": servers}
    params["train_grpo"]["grpo"]["rewards"] = {"served": served}
    write_yaml(folder / "runtime.yaml", runtime)
    write_yaml(folder / "params.yaml", params)
    return folder


def test_a_phase_that_was_scored_is_not_scored_again(copy_of_tiny: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    with StandIn(moody) as server:
        whole = project(copy_of_tiny, "whole", server.address, missing="skip")
        call(whole, STAGE)
        asked = len(server.seen)
    assert asked == 3 + 1  # the phases, and responses to validation prompts at the end
    with StandIn(moody) as server:
        killed = project(copy_of_tiny, "killed", server.address, missing="skip")
        cut_short(killed, STAGE, monkeypatch, after=5, kind=Learner, method="update")  # in the second phase
        assert len(server.seen) == 2
        call(killed, STAGE)
        assert len(server.seen) == asked
    assert outs(killed, STAGE) == outs(whole, STAGE)
    rows = curve(whole, "grpo").to_dict("records")
    assert [row["reward_errors/served"] for row in rows] == [0, 1, 0]
    for number, (row, (_, _, body)) in enumerate(zip(rows, server.seen[:3], strict=True)):
        given = [reward for reward in moody(number, body).body["rewards"] if reward is not None]
        assert len(given) == 8 - (number == 1)
        assert row["rewards/served"] == pytest.approx(sum(given) / len(given))
        total = row["rewards/reward_model"] + 0.5 * sum(given) / 8
        assert row["objective/scores"] == pytest.approx(total, abs=1e-6)


def test_a_server_that_is_gone_stops_the_run(copy_of_tiny: Copy, capsys: pytest.CaptureFixture) -> None:
    with StandIn(lambda *_: Told({})) as server:
        folder = project(copy_of_tiny, "project", server.address)
    said = refusal(folder, STAGE, capsys)
    assert "of the prompts, response '" in said
    assert "the reward served fails: reward server ours (http://127.0.0.1:" in said
    assert said.endswith("gives no answer after 1 attempt: ConnectError: All connection attempts failed")


def test_it_judges_replies_to_test_prompts(copy_of_tiny: Copy) -> None:
    """And is asked once for those that two policies' evaluations share, the reference's."""
    with StandIn(lambda _, body: Told({"rewards": [len(query) % 7 for query in body["query"]]})) as server:
        folder = project(copy_of_tiny, "project", server.address)
        params = read_yaml(folder / "params.yaml")
        params["evaluate"]["rewards"] = {"served": block(RemoteReward, server="ours")}
        write_yaml(folder / "params.yaml", params)
        for policy in ("grpo", "dpo"):
            call(folder, f"evaluate@{policy}")
        queries = [query for _, _, body in server.seen for query in body["query"]]
    assert len(queries) == len({*queries})
    samples = [*read_jsonl(folder / "data/samples/grpo.jsonl")]
    metrics = json.loads((folder / "metrics/evaluate/grpo.json").read_text())
    mean = sum(sample["rewards"]["served"] for sample in samples) / len(samples)
    assert metrics["reward_of_served_mean"] == pytest.approx(mean)


def test_a_served_model_of_the_pipeline_reads_what_its_stages_read(tiny: Path) -> None:
    """The ids of pairs as tokenize_data made them."""
    from stages.tools.serve_reward import OptionsOfReading, load_served

    with inside(tiny):
        rm, base = Path("models/rm"), Path("models/base")
        served = load_served(rm, base, OptionsOfReading(None, None), "fp32", standardise=False)
        pairs = read_table(Path("data/tokens/test/preference.arrow"), PREFERENCE_SCHEMA)[:]
        prepared = [*read_jsonl(Path("data/prepared/test/preference.jsonl"))]
        rows = [prepared[row] for row in pairs["row"]]
        asked = [AskedReply(prompt=row["prompt"], reply=row["chosen"][0]["content"]) for row in rows]
        assert served(asked) == pytest.approx(served.model.score_id_pairs(pairs).chosen, abs=1e-5)
        cut = [row.model_copy(update={"ended": False}) for row in asked]
        ids = [chosen[:-1] for chosen in pairs["chosen_ids"]]
        assert served(cut) == pytest.approx(served.model.score_ids(pairs["prompt_ids"], ids), abs=1e-5)
        assert served(cut) != pytest.approx(served(asked), abs=1e-5)
