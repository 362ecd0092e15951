"""A server on loopback with those endpoints of vLLM that are used, around a model of transformers; it can fail."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from stages.lib.settings.declaration import block
from stages.lib.settings.vllm_server import VllmServer
from tests.loopback_server import LoopbackServer, QuietHandler


class VllmStandIn(LoopbackServer):
    """Serves a model folder.

    Args:
        keeps_head: a reload leaves the head as it was.
        before_temperature: log-probs are taken before logits are divided by it.
        dies_at: the number (from 0) of the request for several samples that is the first to get no answer.
        asked: how many such requests another one has answered before.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keeps_head: bool = False,
        before_temperature: bool = False,
        dies_at: int | None = None,
        asked: int = 0,
    ) -> None:
        self.model: Any = self.load(folder)
        self.keeps_head, self.before_temperature, self.dies_at = keeps_head, before_temperature, dies_at
        self.seen: list[str] = []  # paths
        self.asked = asked  # requests for several samples, by whose number they draw

    def load(self, folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        self.seen.append(path)
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            head = self.model.lm_head.weight.detach().clone()
            self.model = self.load(Path(body["kwargs"]["weights_path"]))
            if self.keeps_head:
                self.model.lm_head.weight = torch.nn.Parameter(head)
        elif path == "/v1/load_lora_adapter":
            base = self.model.unload() if isinstance(self.model, PeftModel) else self.model
            self.model = PeftModel.from_pretrained(base, body["lora_path"]).eval()
        elif path == "/reset_prefix_cache":
            return {"success": True}
        elif path == "/weight_checker":
            return {"checksums": {f"rank0:{name}": digest(own) for name, own in self.model.named_parameters()}}
        elif path == "/v1/completions":
            return {"choices": [*(self.scores(body) if "prompt_logprobs" in body else self.samples(body))]}
        return {}

    @torch.no_grad()
    def log_probs(self, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
        return (self.model(torch.tensor([ids])).logits[0].float() / temperature).log_softmax(-1)

    def scores(self, body: dict[str, Any]) -> Any:
        for index, ids in enumerate(body["prompt"]):
            rows = self.log_probs(ids)
            entries = [{str(ids[t + 1]): {"logprob": rows[t, ids[t + 1]].item()}} for t in range(len(ids) - 1)]
            yield {"index": index, "prompt_logprobs": [None, *entries]}

    def samples(self, body: dict[str, Any]) -> Any:
        draws = torch.Generator().manual_seed(self.asked if body["n"] > 1 else 0)
        self.asked += body["n"] > 1
        for place, ids in enumerate(body["prompt"]):
            for sample in range(body["n"]):
                index = place * body["n"] + sample
                yield {"index": index, **self.response(ids, body, draws)}

    def response(self, prompt: list[int], body: dict[str, Any], draws: torch.Generator) -> dict[str, Any]:
        ids, logps = [], []
        while len(ids) < body["max_tokens"] and (not ids or ids[-1] not in body["stop_token_ids"]):
            row = self.log_probs([*prompt, *ids], body["temperature"])[-1]
            token = int(torch.multinomial(row.exp(), 1, generator=draws))
            shown = self.log_probs([*prompt, *ids])[-1] if self.before_temperature else row
            ids, logps = [*ids, token], [*logps, shown[token].item()]
        reason = "stop" if ids[-1] in body["stop_token_ids"] else "length"
        return {"token_ids": ids, "logprobs": {"token_logprobs": logps}, "finish_reason": reason}

    def handler(self) -> type[BaseHTTPRequestHandler]:
        stand_in, lock = self, threading.Lock()

        class Handler(QuietHandler, BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.say({"data": [{"id": "served"}]})

            def do_POST(self) -> None:
                body = self.body()
                with lock:
                    if stand_in.dies_at is not None and stand_in.asked >= stand_in.dies_at and body.get("n", 1) > 1:
                        self.close_connection = True
                        return
                    told = stand_in.answer(self.path, body)
                self.say(told)

        return Handler

    @property
    def address(self) -> str:
        return self.origin

    @property
    def pushes(self) -> int:
        """How often it was given weights."""
        return sum(path in ("/collective_rpc", "/v1/load_lora_adapter") for path in self.seen)


def digest(weight: torch.Tensor) -> str:
    return hashlib.sha256(weight.detach().numpy().tobytes()).hexdigest()


def settings_of(address: str, **changed: Any) -> dict[str, Any]:
    """What runtime.yaml says of a server at an address."""
    return VllmServer(**block(VllmServer, address=address, **changed)).model_dump(mode="json")
