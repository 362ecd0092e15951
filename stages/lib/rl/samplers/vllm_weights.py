"""The policy's weights on a vLLM server: written to a folder, read by the server, and verified by a probe."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import torch

from stages.lib.command.errors import StageError
from stages.lib.command.outputs import remove
from stages.lib.compute.batching import MicroBatching
from stages.lib.rl.samplers.probe import POWER, SIZES, Logps, furthest, policy_logps, unchanged_weights
from stages.lib.rl.samplers.sampler import SamplerError
from stages.lib.rl.samplers.served_weights import read_served_weights, write_served_model
from stages.lib.rl.samplers.vllm_connection import VllmConnection
from stages.lib.rl.samplers.vllm_process import VllmProcess
from stages.lib.rl.trained_policy import TrainedPolicy
from stages.lib.settings.sampler import VllmSampling
from stages.lib.settings.vllm_server import VllmServer

Answer = TypeVar("Answer")
UNTIED = "a server whose lm_head is its embedding may keep the old one: serve a copy with tie_word_embeddings false"


class VllmWeights:
    """A server with the weights of a policy. All processes call `push` together; the main one alone has a server.

    Args:
        folder: for weights and the server's log; None in other processes than the main one.
        model: the folder that the policy started from.
        precision: of the policy, fp32 or bf16, and so of the server.
    """

    def __init__(
        self,
        policy: TrainedPolicy,
        model: Path,
        sampling: VllmSampling,
        server: VllmServer,
        precision: str,
        batching: MicroBatching,
        folder: Path | None,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.policy = policy
        self.model = model
        self.sampling = sampling
        self.server = server
        self.precision = precision
        self.batching = batching
        self.folder = folder
        self.trust_remote_code = trust_remote_code
        self.process: VllmProcess | None = None
        self.pushes = 0

    @property
    def connection(self) -> VllmConnection:
        """To the server; main process only."""
        return self.process.connection if self.process else self._given

    @cached_property
    def _given(self) -> VllmConnection:
        assert self.server.address is not None, "a server that is started has a process"
        connection = VllmConnection(self.server.address, self.server)
        if not connection.is_there():
            raise SamplerError(f"runtime.yaml: vllm.address: no vLLM server answers at {self.server.address}")
        return connection

    def asked(self, question: Callable[[VllmConnection], Answer]) -> Answer:
        """What the main process learns from the server, in all processes."""
        return self.batching.processes.broadcast(cast(Answer, self.in_main(lambda: question(self.connection))))

    def in_main(self, action: Callable[[], Answer]) -> Answer | None:
        """As `Processes.in_main`; what it raises is a SamplerError in all processes."""
        try:
            return self.batching.processes.in_main(action)
        except StageError as error:
            raise SamplerError(str(error)) from None

    def push(self, texts: Sequence[Sequence[int]]) -> None:
        """Give the server the policy's weights.

        Args:
            texts: token ids, at least two each, of which a probe is made.
        Raises:
            SamplerError: the server has failed, or does not have them.
        """
        probe = self._probe(texts)
        # The first push to a server that has the very weights already needs no proof that they are new.
        by_checksums = self.pushes > 0 and not probe.tells_apart(self.sampling.tolerance)
        before = self.asked(VllmConnection.checksums) if by_checksums else {}
        self._write()
        self.in_main(self._give)
        after = self.asked(lambda connection: connection.prompt_logps(probe.texts))
        self.require_agreement(probe.ours, after, f"does not have the weights that it was given; {UNTIED}")
        if by_checksums:
            self.in_main(lambda: self._require_changed(before))
        self.pushes += 1

    def _probe(self, texts: Sequence[Sequence[int]]) -> "Probe":
        """As many of the texts as it takes to tell the weights that the server has from the policy's."""
        runs = self.batching.processes.broadcast(self.process is not None or self.server.address is not None)
        probe = Probe([], [], None)
        for size in SIZES:
            some = [list(text) for text in texts[:size]]
            heads, tails = [text[:1] for text in some], [text[1:] for text in some]
            ours = policy_logps(self.policy.engine, heads, tails, 1.0, self.batching)
            ask = partial(VllmConnection.prompt_logps, sequences=some)
            probe = Probe(some, ours, self.asked(ask) if runs else None)
            if not runs or probe.tells_apart(self.sampling.tolerance) or len(texts) <= size:
                break
        return probe

    def _write(self) -> None:
        """Write the weights, which only the main process has whole."""
        engine, lora = self.policy.engine, self.policy.lora
        weights = engine.master_weights(self.policy.language_model)

        def write() -> None:
            if self.sampling.pushes == "adapter":
                remove(self._written)
                lora.write_adapter(lora.trained(weights), self._written, self.precision)
            else:
                write_served_model(lora.merged(weights), self.model, self._written, self.precision)

        self.in_main(write)

    @property
    def _written(self) -> Path:
        """Where this push has its weights; those of the one before are still beside it."""
        assert self.folder is not None, "only the main process writes weights"
        return (self.folder / f"weights-{self.pushes % 2}").absolute()

    def _give(self) -> None:
        is_adapter = self.sampling.pushes == "adapter"
        if self.process is None and self.server.address is None:
            self._start(self.model.absolute() if is_adapter else self._written)
            if not is_adapter:
                return
        if is_adapter:
            self.connection.load_adapter(self._written)
        else:
            self.connection.reload(self._written)

    def _start(self, served: Path) -> None:
        assert self.folder is not None, "only the main process has a server"
        self.folder.mkdir(parents=True, exist_ok=True)
        dtype = {"fp32": "float32", "bf16": "bfloat16"}[self.precision]
        arguments = [str(served), "--served-model-name", "served", "--dtype", dtype]
        arguments += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
        environment = {"VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        if self.sampling.batch_invariant:
            environment["VLLM_BATCH_INVARIANT"] = "1"
        if self.sampling.pushes == "adapter":
            lora = self.policy.lora.settings
            assert lora is not None, "settings ask for an adapter only where there is one"
            arguments += ["--enable-lora", "--max-lora-rank", str(lora.rank)]
            environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if self.trust_remote_code:
            arguments.append("--trust-remote-code")
        self.process = VllmProcess(self.server, arguments, environment, self.folder / "server.log")

    def _require_changed(self, before: dict[str, str]) -> None:
        """Raise SamplerError unless the server's checksums say that its weights are new where ours are."""
        last = self._written.with_name(f"weights-{(self.pushes + 1) % 2}")
        old, new = read_served_weights(last), read_served_weights(self._written)
        changed = {name: not torch.equal(old[name], tensor) for name, tensor in new.items()}
        unproved = unchanged_weights(changed, before, self.connection.checksums()) if any(changed.values()) else {}
        for name, why in unproved.items():
            raise SamplerError(
                f"vLLM server cannot be shown to have the new weights: the policy has moved by less than {POWER:g} "
                f"times sampler.tolerance ({self.sampling.tolerance:g}), and of {name} {why}"
            )

    def require_agreement(self, ours: Logps, theirs: Logps, otherwise: str) -> None:
        """Raise SamplerError, saying `otherwise`, if log-probs of the policy and the server are too far apart."""
        apart = furthest(ours, theirs)
        if not apart <= self.sampling.tolerance:
            raise SamplerError(
                f"vLLM server {otherwise}. Of {sum(map(len, ours))} log-probs the furthest is {apart:.2g} off, and "
                f"sampler.tolerance is {self.sampling.tolerance:g}"
            )


class Probe(NamedTuple):
    """Texts, and the log-probs of their tokens by the policy, and by the server before a push, if it runs."""

    texts: list[list[int]]
    ours: Logps
    before: Logps | None

    def tells_apart(self, tolerance: float) -> bool:
        """Whether it tells the server's weights from the policy's."""
        return self.before is not None and furthest(self.before, self.ours) >= POWER * tolerance
