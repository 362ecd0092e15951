"""A language model as judge: what it is asked, how its answer is read, and that nothing is asked twice."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stages.lib.command.errors import StageError
from stages.lib.data.prompts import Prompt
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rewards.judge import JudgeScores
from stages.lib.rl.rewards.kept_answers import KeptAnswers
from stages.lib.rl.rewards.scoring import Failure
from stages.lib.rl.rewards.server_calls import ServerCalls
from stages.lib.settings.declaration import block
from stages.lib.settings.served_rewards import JudgeReward
from tests.lib.rl.rewards.reward_stand_in import StandIn, Told, server_at
from tests.tiny_models import batching

TURNS = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1 + 1? {response}"}]
EPISODES = [
    Episode(Prompt(10, [1], TURNS, {"answer": 2}), [2], "It is {answer}. Score: 10", True, 0, None, [True]),
    Episode(Prompt(11, [1], [], {"answer": "y"}, {"text": "x = "}), [2], "y", True, 0, None, [True]),
]
RUBRIC = 'P={prompt}|R={response}|A={answer}|{"score": 1}'


def completion(content: Any) -> Told:
    return Told({"choices": [{"message": {"role": "assistant", "content": content}}]})


def judge(address: str, folder: Path, **settings: Any) -> JudgeScores:
    calls = ServerCalls("judge", server_at(address.removesuffix("get_reward"), attempts=1))
    values = block(JudgeReward, **{"rubric": RUBRIC, **settings})
    return JudgeScores(JudgeReward(**values), calls, batching(1).processes, KeptAnswers(folder / "answers.sqlite"))


def test_what_a_judge_is_asked_and_what_its_answer_gives(tmp_path: Path) -> None:
    with StandIn(
        lambda _, body: completion("Score: 4" if "P=x" in str(body) else "Score: 9? No.\nScore: 10")
    ) as server:
        address = server.address
        assert judge(address, tmp_path)([*EPISODES, EPISODES[0]]) == [1.0, pytest.approx(1 / 3), 1.0]
        assert {path for path, _, _ in server.seen} == {"/chat/completions"}
        bodies = sorted((body for _, _, body in server.seen), key=lambda body: len(str(body)))
    assert [body["messages"][0]["content"] for body in bodies] == [
        'P=x = |R=y|A=y|{"score": 1}',
        'P=system: Be kind.\n\nuser: 1 + 1? {response}|R=It is {answer}. Score: 10|A=2|{"score": 1}',
    ]
    assert {key: bodies[0][key] for key in ("model", "temperature", "max_tokens")} == {
        "model": "judge",
        "temperature": 0.0,
        "max_tokens": 512,
    }
    assert judge(address, tmp_path, lowest=0.0)(EPISODES) == [1.0, 0.4]  # of the kept answers: the server has gone
    for other in ({"model": "another"}, {"server": "another"}):
        again = judge(address, tmp_path, **other)(EPISODES)
        assert [isinstance(score, Failure) for score in again] == [True, True]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Score: 7", 2 / 3),
        ("**Score:** 7/10", 2 / 3),
        ("**Score**: **5.5**", 0.5),
        ("score=1", 0.0),
        ("SCORE:\n10", 1.0),
        ("Score: 11", "the judge's answer has the score 11: 'Score: 11'"),
        ("Score: -3", "the judge's answer has the score -3: 'Score: -3'"),
        ("I like it. 7", "the judge's answer has no line `Score: n`: 'I like it. 7'"),
        ("underscore: 7", "the judge's answer has no line `Score: n`: 'underscore: 7'"),
    ],
)
def test_how_an_answer_is_read(answer: str, score: float | str, tmp_path: Path) -> None:
    found = judge("http://127.0.0.1:9", tmp_path).score(answer)
    if isinstance(found, Failure):
        assert found == Failure("error", str(score))
    else:
        assert found == pytest.approx(score)


def test_an_answer_without_a_score_is_not_kept(tmp_path: Path) -> None:
    with StandIn(lambda number, _: completion(("I cannot say.", "Score: 10")[number])) as server:
        (first,) = judge(server.address, tmp_path)(EPISODES[:1])
        assert isinstance(first, Failure)
        assert judge(server.address, tmp_path)(EPISODES[:1]) == [1.0]


def test_an_answer_without_a_message_is_a_failure(tmp_path: Path) -> None:
    with StandIn(lambda number, _: (Told({"choices": []}), completion(None))[number]) as server:
        asked = judge(server.address, tmp_path, missing="skip")
        asked.calls.server = asked.calls.server.model_copy(update={"parallel_requests": 1})
        first, second = asked(EPISODES)
    assert isinstance(first, Failure)
    assert isinstance(second, Failure)
    assert first.reason.endswith("gives no message in choices[0]: {'choices': []}")
    assert second.reason.endswith("{'choices': [{'message': {'role': 'assistant', 'content': None}}]}")


def test_a_rubric_names_facts_of_the_row(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"row 10 of the prompts, response .*: the row has no fact 'label', which the"):
        judge("http://127.0.0.1:9", tmp_path, rubric="{response} {label}")(EPISODES)
    for wrong, message in (
        ({"rubric": "{prompt}"}, "rubric must say where the response stands"),
        ({"lowest": 10.0}, r"lowest \(10.0\) must be below highest \(10.0\)"),
    ):
        with pytest.raises(ValidationError, match=message):
            JudgeReward(**block(JudgeReward, **wrong))
