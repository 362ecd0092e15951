"""How sections draw responses."""

from typing import Annotated

from annotated_types import Ge, Gt, Le
from pydantic import model_validator

from stages.lib.settings.bounds import Count, NewTokens, Several, Temperature, Text
from stages.lib.settings.declaration import Settings, block, key
from stages.lib.settings.engine_correction import EngineCorrection, NoEngineCorrection
from stages.lib.settings.sampler import OwnSampling, SamplerChoice


class DrawingSettings(Settings):
    """How responses are drawn, and when they end."""

    max_new_tokens: NewTokens = key(64, "of a response", unit="tokens")
    min_new_tokens: Annotated[int, Ge(0), Le(2**20)] = key(0, "before which a response does not end", unit="tokens")
    temperature: Temperature = key(1.0, "of sampling, and of every log-prob")
    top_k: Count | None = key(None, "draw among this many likeliest tokens; null: among all", unit="tokens")
    top_p: Annotated[float, Gt(0), Le(1)] = key(
        1.0,
        "draw among the fewest likeliest tokens that have this share of the probability; 1: among all",
        source="arXiv 1904.09751",
    )
    stop_strings: Several[Text] = key(
        [], 'texts, such as "\\nUser:", each of which ends a response like EOS, and stays in it'
    )

    @model_validator(mode="after")
    def _check_lengths(self) -> "DrawingSettings":
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens ({self.min_new_tokens}) must be at most max_new_tokens ({self.max_new_tokens})"
            )
        return self


class SamplingSettings(DrawingSettings):
    """Of a policy that is trained. Whatever is left out in drawing, log-probs are of all tokens, at the temperature."""

    sampler: SamplerChoice = key(block(OwnSampling), "what draws responses")
    reuse_sampler_logps: bool = key(
        False,
        "take log-probs and entropies of responses from sampling, instead of a pass over them; in bf16 they differ "
        "from those of a pass, and so the first ratios from 1: the curve has them as policy/first_ratio",
    )
    engine_correction: EngineCorrection = key(
        block(NoEngineCorrection),
        "weights by which the loss makes up for a sampler that draws from another distribution than the trainer's "
        "policy; the curve has both sides' difference as engine/…",
    )

    asynchronous: bool = key(
        False,
        "draw a phase's responses while the phase before is learnt from, beside the updates: by weights that are a "
        "phase old (engine/staleness), for which engine_correction or reuse_sampler_logps makes up; our own sampler "
        "does so in a process of its own (runtime.yaml: sampling_process)",
    )

    @property
    def keeps_engine_logps(self) -> bool:
        """Whether responses come with the sampler's log-probs, to be compared with the policy's own."""
        return self.engine_correction.type != "none" or (self.sampler.type != "own" and self.draws_from_all)

    @property
    def draws_from_all(self) -> bool:
        """Whether every token may be drawn at any place: an engine's log-probs are of those that may be drawn."""
        return self.top_k is None and self.top_p == 1 and self.min_new_tokens <= 1

    @model_validator(mode="after")
    def _check_engine_correction(self) -> "SamplingSettings":
        if self.engine_correction.type == "none":
            return self
        where = f"engine_correction of type {self.engine_correction.type}"
        if self.reuse_sampler_logps:
            raise ValueError(
                f"{where} compares log-probs of sampling with those of a pass, which reuse_sampler_logps: true leaves "
                "out; set one of them back"
            )
        whole = {"top_k: null": self.top_k is None, "top_p: 1.0": self.top_p == 1}
        for value, is_set in (whole | {"min_new_tokens: 0": self.min_new_tokens <= 1}).items():
            if not is_set:
                raise ValueError(f"{where} needs what was drawn from to be the whole distribution: set {value}")
        return self

    @model_validator(mode="after")
    def _check_asynchronous(self) -> "SamplingSettings":
        if not self.asynchronous:
            return self
        if self.engine_correction.type == "none" and not self.reuse_sampler_logps:
            raise ValueError(
                "asynchronous: responses are of weights a phase old: set an engine_correction, such as of type "
                "token_truncated, or reuse_sampler_logps: true, which takes ratios to the policy that sampled"
            )
        if self.sampler.type == "transformers":
            raise ValueError(
                "asynchronous: a sampler of type transformers draws with the model that is trained; set own or vllm"
            )
        if getattr(self, "dynamic_sampling", None) is not None:
            raise ValueError(
                "asynchronous: which prompts a phase asks must be known before the phase before is over, and "
                "dynamic_sampling asks further ones; set it to null"
            )
        return self

    @model_validator(mode="after")
    def _check_sampling(self) -> "SamplingSettings":
        if self.reuse_sampler_logps and self.sampler.type != "own":
            raise ValueError(
                f"reuse_sampler_logps: a sampler of type {self.sampler.type} gives no entropies; set it to false"
            )
        if self.sampler.type == "transformers" and (self.stop_strings or self.min_new_tokens):
            raise ValueError("sampler: transformers knows no stop_strings and no min_new_tokens: set [] and 0")
        if self.sampler.type == "vllm" and self.sampler.pushes == "adapter" and getattr(self, "lora", None) is None:
            raise ValueError("sampler.pushes: adapter needs one, and lora is null; set weights")
        return self
