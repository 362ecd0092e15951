"""How a policy's loss makes up for a sampler whose distribution is not quite the policy's; see rl/engine_correction.py.

A sampler computes in kernels, a precision and sometimes weights of its own, and so draws from q rather than from the
policy π_old as the trainer computes it. Weighting by w = π_old / q, of each token or of the whole response (the product
over its tokens), makes up for that. The weights of responses are right and vary the more, the longer a response is;
those of tokens vary less and leave a bias. Bounds hold either in check.
"""

from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt
from pydantic import Field

from stages.lib.command.json_schema import LARGEST_NUMBER
from stages.lib.settings.declaration import Settings, key

TIS = "truncated importance sampling: Ionides 2008; arXiv 1802.01561, section 4.1"
ICEPOP = "IcePop, arXiv 2510.18855, section 4.2"
Upper = Annotated[float, Ge(1), Le(LARGEST_NUMBER)]
Lower = Annotated[float, Ge(0), Lt(1)]


def upper(default: float, says: str, source: str | None = None) -> Upper:
    """Declare the largest weight that counts."""
    return key(default, says, source=source)


def lower(default: float, says: str, source: str | None = None) -> Lower:
    """Declare the smallest weight that counts."""
    return key(default, says, source=source)


RAISED = "a smaller weight is raised to it; 0: none is"
LEFT_OUT = "what has a smaller weight does not count; 0: no bound"


class NoEngineCorrection(Settings):
    """What was sampled is taken for a sample of the policy."""

    type: Literal["none"] = key("none", "the sampler draws as the policy would")


class TokenTruncated(Settings):
    """Each token by its own ratio, held within bounds."""

    type: Literal["token_truncated"] = key(
        "token_truncated", "each token's loss times π_old / q of the token, within bounds", source=TIS
    )
    upper: Upper = upper(2.0, "a larger weight is lowered to it")
    lower: Lower = lower(0.0, RAISED)


class TokenMasked(Settings):
    """Each token by its own ratio; beyond the bounds it does not count."""

    type: Literal["token_masked"] = key(
        "token_masked", "each token's loss times π_old / q of the token; beyond the bounds 0", source=ICEPOP
    )
    upper: Upper = upper(5.0, "a token with a larger weight does not count", ICEPOP)
    lower: Lower = lower(0.5, LEFT_OUT, ICEPOP)


class SequenceTruncated(Settings):
    """Each response by the product of its tokens' ratios, held within bounds."""

    type: Literal["sequence_truncated"] = key(
        "sequence_truncated",
        "each response's loss times the product of its tokens' π_old / q, within bounds",
        source=TIS,
    )
    upper: Upper = upper(3.0, "a larger weight is lowered to it")
    lower: Lower = lower(0.0, RAISED)


class SequenceMasked(Settings):
    """Each response by the product of its tokens' ratios; beyond the bounds it does not count."""

    type: Literal["sequence_masked"] = key(
        "sequence_masked", "each response's loss times the product of its tokens' π_old / q; beyond the bounds 0"
    )
    upper: Upper = upper(3.0, "a response with a larger weight does not count; of long ones these may be many")
    lower: Lower = lower(0.0, LEFT_OUT)


Bounded = TokenTruncated | TokenMasked | SequenceTruncated | SequenceMasked
EngineCorrection = Annotated[NoEngineCorrection | Bounded, Field(discriminator="type")]
