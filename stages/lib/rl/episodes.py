"""An episode: a prompt and what a policy wrote in answer to it."""

from typing import NamedTuple

from stages.lib.data.prompts import Prompt


class Episode(NamedTuple):
    """One response to one prompt."""

    prompt: Prompt
    ids: list[int]  # of the response, up to and including the first EOS, or the token that completes a stop string
    text: str  # of `ids` before EOS: what a reward or a grade reads; the log of rollouts shows EOS, too
    ended: bool  # with EOS or a stop string, rather than at the limit of new tokens
    sample: int  # which of a prompt's samples, 0-based
    engine_logps: list[float] | None  # of `ids` as the engine that sampled them computed them, in nats
    policy_mask: list[bool]  # which of `ids` the policy chose, rather than a tool or a user
    engine_entropies: list[float] | None = None  # of the distributions that `engine_logps` are of
