"""Questions to a vLLM server: token ids in, token ids out, and the endpoints by which it gets other weights."""

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from stages.lib.command.errors import StageError, one_line
from stages.lib.rl.samplers.sampler import SamplerError
from stages.lib.settings.vllm_server import VllmServer

SHOWN = 200  # characters of an answer in a message
ADAPTER = "policy"  # the name of the adapter on a server


class Completion(NamedTuple):
    """A response, and the log-probs of its tokens as the server drew them."""

    ids: list[int]
    logps: list[float]
    ended: bool


class VllmConnection:
    """One server.

    Args:
        fate: says what has become of the server's process, if it is ours.
    Raises:
        StageError: its token is to come from an environment variable that is not set.
    """

    def __init__(self, address: str, server: VllmServer, fate: Callable[[], str] = lambda: "") -> None:
        self.address = address.rstrip("/")
        self.server = server
        self.fate = fate
        limits = httpx.Limits(max_connections=server.parallel_requests)
        self.client = httpx.Client(
            base_url=self.address, headers=bearer(server), timeout=server.timeout_seconds, limits=limits
        )
        self.model = ""

    def is_there(self) -> bool:
        """Whether the server answers; it then also says what it calls its model."""
        try:
            found = self.client.get("/v1/models", timeout=10.0)
        except httpx.HTTPError:
            return False
        if found.status_code in (401, 403):
            raise SamplerError(f"vLLM server {self.address} refuses: status {found.status_code}: {found.text[:SHOWN]}")
        if not found.is_success:
            return False
        self.model = self._read(lambda: str(found.json()["data"][0]["id"]), found.text)
        return True

    def complete(self, requests: Sequence[dict[str, Any]], each: Callable[[int, list[Completion]], None]) -> None:
        """Ask `/v1/completions` for every request, many at a time, and tell `each` of an answer as it comes.

        Raises:
            SamplerError: one is not answered; the others that are under way are given up.
        """
        with ThreadPoolExecutor(max_workers=min(self.server.parallel_requests, len(requests)) or 1) as pool:
            asked = {pool.submit(self.completions, request): place for place, request in enumerate(requests)}
            try:
                for future in as_completed(asked):
                    each(asked[future], future.result())
            except BaseException:
                for future in asked:
                    future.cancel()
                raise

    def completions(self, request: dict[str, Any]) -> list[Completion]:
        """The samples of the first prompt of a request, then those of the second one, and so on."""
        options = {"model": self.model, "logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True}
        answer = self.post("/v1/completions", options | request)
        return self._read(lambda: completions_of(answer), answer)

    def prompt_logps(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Of each sequence log π(y_t | y_<t) from its second token on, at temperature 1, in nats."""
        found: dict[int, list[list[float]]] = {}
        parts = [sequences[start : start + 8] for start in range(0, len(sequences), 8)]
        options = {"model": self.model, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}

        def ask(place: int) -> None:
            answer = self.post("/v1/completions", options | {"prompt": parts[place]})
            found[place] = self._read(lambda: prompt_logps_of(answer, parts[place]), answer)

        with ThreadPoolExecutor(max_workers=min(self.server.parallel_requests, len(parts)) or 1) as pool:
            list(pool.map(ask, range(len(parts))))
        return [logps for place in range(len(parts)) for logps in found[place]]

    def reload(self, folder: Path) -> None:
        """Have the server read the weights of a model folder in the place of its own."""
        self.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        self.forget_prefixes()

    def load_adapter(self, folder: Path) -> None:
        """Have the server read an adapter, in the place of the one before, and use it from here on."""
        body = {"lora_name": ADAPTER, "lora_path": str(folder), "load_inplace": True}
        self.post("/v1/load_lora_adapter", body, is_json=False)
        self.model = ADAPTER
        self.forget_prefixes()

    def forget_prefixes(self) -> None:
        """Have the server compute prompts by its weights of now."""
        answer = self.post("/reset_prefix_cache", {})
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise SamplerError(f"vLLM server {self.address} keeps what it has computed of prompts: {answer!r:.200}")

    def checksums(self) -> dict[str, str]:
        """Digests of its weights, by the names that it has for them, with those of its processes before them."""
        answer = self.post("/weight_checker", {"action": "checksum"})
        return self._read(lambda: {str(name): str(digest) for name, digest in answer["checksums"].items()}, answer)

    def post(self, path: str, body: Any, *, is_json: bool = True) -> Any:
        """What the server answers. Raises SamplerError, in one line, if that is nothing or a refusal."""
        try:
            response = self.client.post(path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise self._failed(f"does not answer {path}: {reason}") from None
        if not response.is_success:
            hint = ""
            if response.status_code == 404 and path != "/v1/completions":
                hint = "; it must run with VLLM_SERVER_DEV_MODE=1, and for adapters VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            raise self._failed(f"refuses {path}: status {response.status_code}: {response.text[:SHOWN]}{hint}")
        return self._read(response.json, response.text) if is_json else response.text

    def _failed(self, what: str) -> SamplerError:
        return SamplerError(one_line(f"vLLM server {self.address} {what}{self.fate()}"))

    def _read(self, reading: Callable[[], Any], answer: Any) -> Any:
        try:
            return reading()
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            raise self._failed(f"answers what cannot be read: {answer!r:.{SHOWN}}") from None


def completions_of(answer: dict[str, Any]) -> list[Completion]:
    """The choices of an answer in their order. Raises what a dict or list raises if it is not as it should be."""
    found = []
    for choice in sorted(answer["choices"], key=lambda choice: choice["index"]):
        ids, logps = [int(token) for token in choice["token_ids"]], choice["logprobs"]["token_logprobs"]
        if not ids or len(ids) != len(logps):
            raise ValueError("a log-prob for each token, and a token at least")
        found.append(Completion(ids, [float(logp) for logp in logps], choice["finish_reason"] == "stop"))
    return found


def prompt_logps_of(answer: dict[str, Any], prompts: Iterable[Sequence[int]]) -> list[list[float]]:
    """The log-probs of the tokens of prompts but for the first of each."""
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return [
        [float(entry[str(token)]["logprob"]) for entry, token in zip(entries, ids, strict=True) if entry is not None]
        for ids, entries in zip(prompts, (choice["prompt_logprobs"] for choice in choices), strict=True)
    ]


def bearer(server: VllmServer) -> dict[str, str]:
    """The header with the token of the environment. Raises StageError if it is to be there and is not."""
    if server.token_variable is None:
        return {}
    token = os.environ.get(server.token_variable, "")
    if not token or not token.isascii() or not token.isprintable():
        raise StageError(
            f"runtime.yaml: vllm.token_variable: expected a token of ASCII characters in the environment variable "
            f"{server.token_variable}, which {'holds others' if token else 'is not set'}"
        )
    return {"Authorization": f"Bearer {token}"}
