"""Section `sample_pairs` of params.yaml: rows made of a policy's own replies, as rewards rank them."""

from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import Field

from stages.lib.command.json_schema import LARGEST_NUMBER
from stages.lib.command.params import Seed
from stages.lib.data.prepared_rows import Kind
from stages.lib.settings.bounds import Count, NotNegative, Precision, Text
from stages.lib.settings.declaration import Settings, block, key
from stages.lib.settings.rewards import MixedRewards
from stages.lib.settings.sampling import DrawingSettings


class PairRule(Settings):
    """What holds for pairs, whichever replies of a prompt are paired."""

    least_gap: NotNegative = key(
        0.0, "leave out a pair whose scores are closer; equal scores never make one", unit="of the reward"
    )
    unfinished: Literal["drop", "rejected"] = key(
        "drop",
        "a reply without EOS: drop: leave it out | rejected: it may be the worse one of a pair, never the better",
    )


class BestAndWorst(PairRule):
    """One pair of each prompt."""

    type: Literal["best_and_worst"] = key(
        "best_and_worst",
        "pairs: of each prompt the reply with the highest score and the one with the lowest",
        source="arXiv 2401.10020",
    )


class AllPairs(PairRule):
    """As many pairs of a prompt as there are."""

    type: Literal["all_pairs"] = key(
        "all_pairs", "pairs: every two replies to a prompt", source="arXiv 2203.02155, section 3.5"
    )


class BestOfN(Settings):
    """Rows of kind sft."""

    type: Literal["best_of_n"] = key(
        "best_of_n",
        "rows for SFT: of each prompt the finished reply with the highest score",
        source="rejection sampling: arXiv 2307.09288, section 3.2.3",
    )
    least_score: Annotated[float, Ge(-LARGEST_NUMBER), Le(LARGEST_NUMBER)] | None = key(
        None,
        "leave out a prompt whose best reply scores less, such as 1.0 where a verifier says what is right; null: none",
        unit="of the reward",
    )


MadeRows = Annotated[BestAndWorst | AllPairs | BestOfN, Field(discriminator="type")]


class SamplePairs(DrawingSettings, MixedRewards):
    """One round: replies of a policy to prompts that it was not trained on in an earlier round."""

    model: Text = key("models/sft", "folder of the language model that is sampled from")
    reward_model: Text = key(
        "models/rm", "folder of the reward model that ranks its replies; that of model itself: none takes part"
    )
    round: Annotated[int, Ge(1), Le(1_000_000)] = key(
        1,
        "which of the prompts are asked: the different ones of the table, in an order drawn from the common seed, are "
        "cut into rounds",
    )
    prompts: Count = key(500, "in a round", unit="prompts")
    split: Literal["train", "validation"] = key("train", "of the prompts, and of the rows made of them")
    samples_per_prompt: Annotated[int, Ge(2), Le(2**16)] = key(4, "to each prompt", unit="replies")
    seed: Seed | None = key(None, "of sampling; null: the common seed")
    precision: Precision = key("fp32", "of weights and activations, of the policy and of the reward model")
    makes: MadeRows = key(block(BestAndWorst), "the rows that are made")

    @property
    def kind(self) -> Kind:
        """Of the rows that it makes."""
        return "sft" if isinstance(self.makes, BestOfN) else "preference"

    @property
    def asked(self) -> range:
        """The places of its prompts in the order that is cut into rounds."""
        return range((self.round - 1) * self.prompts, self.round * self.prompts)
