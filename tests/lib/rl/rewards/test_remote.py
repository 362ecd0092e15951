"""The remote reward: the real server with the real client, and what a server may do wrong."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from stages.lib.command.errors import StageError
from stages.lib.data.prompts import Prompt
from stages.lib.rl.episodes import Episode
from stages.lib.rl.rewards.kept_answers import KeptAnswers
from stages.lib.rl.rewards.remote import RemoteScores
from stages.lib.rl.rewards.scoring import Failure
from stages.lib.rl.rewards.server_calls import ServerCalls
from stages.lib.settings.declaration import block
from stages.lib.settings.served_rewards import RemoteReward
from tests.given_reward_models import logits_of, save_classifier, save_tokenizer
from tests.lib.rl.rewards.reward_stand_in import StandIn, Told, server_at
from tests.real_files import PROJECT
from tests.tiny_models import batching

TOKEN = "a secret of 1 server"
TURNS = [
    [{"role": "user", "content": "what do you think of it?"}],
    [{"role": "system", "content": "You like films."}, {"role": "user", "content": "a film"}],
    [{"role": "user", "content": "good?"}],
]
REPLIES = ["a good film, and it is long", "bad", "I think that a film of it is what you do, or not."]
EPISODES = [
    Episode(Prompt(10 + row, [row, 7], turns, {"answer": row}), [row, 8, 9], reply, row != 1, 0, None, [True] * 3)
    for row, (turns, reply) in enumerate(zip(TURNS, REPLIES, strict=True))
]


class Served(NamedTuple):
    """A server that runs."""

    process: subprocess.Popen
    address: str
    revision: str
    model: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`python -m stages.tools.serve_reward`, with a token, of at most 4 rows and 4000 bytes in a request."""
    folder = tmp_path_factory.mktemp("served")
    save_classifier(folder, "llama")
    save_tokenizer(folder)
    options = ["--model", folder, "--tokenizer", folder.parent / "none", "--port", 0]
    options += ["--max-rows", 4, "--max-bytes", 4000]
    process = subprocess.Popen(
        [sys.executable, "-m", "stages.tools.serve_reward", *map(str, options)],
        cwd=PROJECT,
        env={**os.environ, "STAGEWISE_REWARD_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    told = next((found for line in process.stdout if (found := re.search(r"at (http\S+), revision (\S+)", line))), None)
    assert told, process.communicate()
    yield Served(process, told[1], told[2], folder)
    process.kill()


@pytest.fixture
def kept(tmp_path: Path) -> KeptAnswers:
    return KeptAnswers(tmp_path / "answers.sqlite")


def as_text(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def remote(address: str, kept: KeptAnswers, settings: dict[str, Any] | None = None, **server: Any) -> RemoteScores:
    values = block(RemoteReward, **(settings or {}))
    calls = ServerCalls("ours", server_at(address, **server))
    return RemoteScores(RemoteReward(**values), calls, as_text, batching(1).processes, kept)


def alone(model: Path, rows: list[list[int]]) -> list[float]:
    return [float(logits_of(model)([ids])) for ids in rows]


def test_a_reward_model_says_the_same_from_afar(
    served: Served, kept: KeptAnswers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers' own forward pass over the messages, rendered by its template."""
    from transformers import AutoTokenizer

    monkeypatch.setenv("OUR_TOKEN", TOKEN)
    asked = {"token_variable": "OUR_TOKEN", "rows_per_request": 2}
    scores = remote(served.address, kept, {"revision": served.revision}, **asked)(EPISODES)
    tokenizer = AutoTokenizer.from_pretrained(served.model)
    both = [[*turns, {"role": "assistant", "content": reply}] for turns, reply in zip(TURNS, REPLIES, strict=True)]
    rows = [tokenizer.apply_chat_template(one, return_dict=False) for one in both]
    assert scores == pytest.approx(alone(served.model, rows), abs=1e-5)
    assert len({*map(str, scores)}) == 3
    with pytest.raises(StageError, match=f"has the revision '{served.revision}', and params.yaml names 'other'"):
        remote(served.address, kept, {"revision": "other"}, **asked)(EPISODES)


def test_the_requests_of_openrlhf(served: Served) -> None:
    """Texts that were rendered already, scored with one EOS at their end, the padding behind them left out."""
    from transformers import AutoTokenizer

    texts = ["<s>user\na film</s><s>assistant\nbad", "<s>user\na film</s><s>assistant\nbad</s><pad><pad>", "good?</s>"]
    body = {"query": texts, "prompts": ["", "", ""], "labels": ["", "", ""]}
    reply = httpx.post(served.address, json=body, headers={"Authorization": f"Bearer {TOKEN}"}).json()
    tokenizer = AutoTokenizer.from_pretrained(served.model)
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in (texts[0] + "</s>", texts[2])]
    first, last = alone(served.model, rows)
    assert reply["rewards"] == reply["scores"] == pytest.approx([first, first, last], abs=1e-5)
    assert reply["extra_logs"] == {}


@pytest.mark.parametrize(
    ("token", "body", "status", "message"),
    [
        ("wrong", {"query": ["a"]}, 401, "Authorization: Bearer <token> is missing or wrong"),
        (TOKEN, {"query": ["a"] * 5}, 413, "5 rows, and at most 4 are scored at a time"),
        (TOKEN, {"query": ["a" * 4000]}, 413, "the request has more than 4000 bytes; send fewer rows at a time"),
        (TOKEN, {"query": "a"}, 422, "query: Input should be a valid array"),
        (TOKEN, {"query": [], "conversations": [{"prompt": "", "reply": ""}]}, 422, "0 queries, and 1 conversations"),
        (TOKEN, {"query": ["good? " * 100]}, 400, "reads at most 128 tokens of its own, and a prompt with its reply"),
        (TOKEN, {"query": []}, 200, ""),
    ],
)
def test_what_the_server_refuses(served: Served, token: str, body: Any, status: int, message: str) -> None:
    reply = httpx.post(served.address, json=body, headers={"Authorization": f"Bearer {token}"})
    assert reply.status_code == status
    assert message in reply.text


def test_a_body_without_a_length_is_read_no_further_than_the_limit(served: Served) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    reply = httpx.post(served.address, content=(b"a" * 1000 for _ in range(5)), headers=headers)
    assert reply.status_code == 413


def test_no_other_machine_is_served_without_a_token() -> None:
    from stages.tools.serve_reward import listening, required_token

    with pytest.raises(StageError, match=r"--host 0\.0\.0\.0 is not loopback, .* STAGEWISE_REWARD_TOKEN to a secret"):
        required_token("0.0.0.0")
    assert required_token("127.0.0.1") is required_token("::1") is required_token("localhost") is None
    with listening("127.0.0.1", 0) as place:
        with pytest.raises(StageError, match="Address already in use; give another --host or --port"):
            listening("127.0.0.1", place.getsockname()[1])


def test_what_was_answered_is_not_asked_again(kept: KeptAnswers) -> None:
    """Not after a kill, either, and not at another address; of another server or revision it is."""
    with StandIn(lambda number, _: Told({"rewards": [10.0 * number + place for place in range(2)]})) as server:
        twice = [EPISODES[0], EPISODES[1], EPISODES[0]]
        assert remote(server.address, kept)(twice) == [0.0, 1.0, 0.0]
        assert [body["query"] for _, _, body in server.seen] == [["0 7 0 8 9", "1 7 1 8 9"]]
        address = server.address
    assert remote(address, kept, {"weight": 2.0})(EPISODES[:2]) == [0.0, 1.0]
    (failure, _) = remote(address, kept, {"server": "theirs"}, attempts=1)(EPISODES[:2])
    assert isinstance(failure, Failure)  # what one server has said is not what another one says
    (failure, _) = remote(address, kept, {"revision": "2"}, attempts=2)(EPISODES[:2])
    assert isinstance(failure, Failure)
    assert re.fullmatch(
        rf"reward server ours \({address}\) gives no answer after 2 attempts: ConnectError.*", failure[1]
    )


def test_a_request_as_openrlhf_has_it(kept: KeptAnswers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_TOKEN", TOKEN)
    with StandIn(lambda _number, body: Told({"rewards": [1] * len(body["query"])})) as server:
        asked = remote(server.address, kept, {"label": "answer"}, token_variable="OUR_TOKEN")
        assert asked(EPISODES[:2]) == [1.0, 1.0]
        ((path, headers, body),) = server.seen
    assert (path, headers["Authorization"]) == ("/get_reward", f"Bearer {TOKEN}")
    assert body["query"] == ["0 7 0 8 9", "1 7 1 8 9"]
    assert body["prompts"] == ["0 7", "1 7"]
    assert body["labels"] == ["0", "1"]
    assert body["conversations"][1] == {"prompt": TURNS[1], "reply": "bad", "ended": False}
    with pytest.raises(StageError, match="row 10 of the prompts has no fact 'answers', which label names"):
        remote("http://127.0.0.1:9", kept, {"label": "answers"})(EPISODES)
    monkeypatch.delenv("OUR_TOKEN")
    with pytest.raises(StageError, match="in the environment variable OUR_TOKEN, which is not set"):
        remote("http://127.0.0.1:9", kept, token_variable="OUR_TOKEN")
    monkeypatch.setenv("ALL_PROXY", "socks9://127.0.0.1:9")
    with pytest.raises(StageError, match=r"what the environment says of proxies .* cannot be used: "):
        remote("http://127.0.0.1:9", kept)(EPISODES)


@pytest.mark.parametrize(
    ("told", "kind", "reason"),
    [
        (Told({"rewards": [1.0]}), "error", "answers with 1 rewards to 3 responses"),
        (Told([1.0, 2.0]), "error", "answers with no list of rewards to 3 responses"),
        (Told(b'{"rewards": [1.0, NaN, 2.0]}'), "error", "gives nan; expected a number within ±1e+09"),
        (Told({"rewards": [1.0, None, 2.0]}), "error", "gives None; expected a number within ±1e+09"),
        (Told({"rewards": [1.0, 10**400, 2.0]}), "error", "gives 1000"),
        (Told(b"[" * 100_000), "error", "answers with no JSON: '[[[["),
        (Told(b"<html>"), "error", "answers with no JSON: '<html>'"),
        (Told("no", status=400), "error", 'refuses: status 400: "no"'),
        (Told({}, status=307), "error", "refuses: status 307: {}"),
        (Told({}, late=0.5), "timeout", "gives no answer after 2 attempts: nothing came within 0.05 s"),
    ],
)
def test_what_a_server_may_do_wrong(kept: KeptAnswers, told: Told, kind: str, reason: str) -> None:
    with StandIn(lambda *_: told) as server:
        asked = remote(server.address, kept, attempts=2, timeout_seconds=0.05 if told.late else 5.0)
        scores = asked(EPISODES)
    assert isinstance(scores[1], Failure)
    assert scores[1].kind == kind
    assert reason in scores[1].reason
    assert "\n" not in scores[1].reason


def test_a_busy_server_is_asked_again(kept: KeptAnswers) -> None:
    with StandIn(lambda number, _: Told({"rewards": [3.0, 4.0, 5.0]}, status=(429, 503, 200)[number])) as server:
        assert remote(server.address, kept, attempts=3)(EPISODES) == [3.0, 4.0, 5.0]
        assert len(server.seen) == 3


def test_where_failures_are_skipped_the_others_are_asked(kept: KeptAnswers) -> None:
    """Where they stop the run, no more is asked after the first; what was answered is kept either way."""

    def answer(_number: int, body: Any) -> Told:
        return Told({"rewards": [7.0]}, status=400 if body["labels"] == ["1"] else 200)

    asked = {"rows_per_request": 1, "parallel_requests": 1}
    with StandIn(answer) as server:
        skipping = remote(server.address, kept, {"missing": "skip", "label": "answer"}, **asked)
        scores = skipping([EPISODES[0], EPISODES[1], EPISODES[2]])
        assert (scores[0], scores[2]) == (7.0, 7.0)
        assert isinstance(scores[1], Failure)
        again = KeptAnswers(kept.path.with_name("others.sqlite"))
        stopping = remote(server.address, again, {"label": "answer"}, **asked)
        scores = stopping(EPISODES)
        assert scores[0] == 7.0
        assert scores[1] == scores[2]
        assert len(server.seen) == 3 + 2


def test_the_first_of_two_answers_counts(kept: KeptAnswers) -> None:
    """Of two stages that ask the same at once."""
    assert kept.find(["a"]) == {}
    assert kept.add({"a": 1.5, "b": "text"}) == {"a": 1.5, "b": "text"}
    assert kept.add({"a": 2.5, "c": 0.1}) == {"a": 1.5, "c": 0.1}
    assert kept.find(["a", "d", *map(str, range(2000)), "c"]) == {"a": 1.5, "c": 0.1}
    kept.path.write_bytes(b"not a database" * 100)
    with pytest.raises(StageError, match=r"answers\.sqlite, which keeps the answers of reward servers, cannot be used"):
        kept.find(["a"])


def test_a_signal_ends_the_server(served: Served) -> None:
    served.process.send_signal(signal.SIGTERM)
    _, errors = served.process.communicate(timeout=20)
    assert served.process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1:] == ["stopped by SIGTERM"]
