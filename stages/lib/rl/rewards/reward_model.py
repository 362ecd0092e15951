"""The reward of a reward model, the pipeline's own or a given one: its score of a prompt and a response to it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from stages.lib.compute.batching import MicroBatching
from stages.lib.compute.frozen_model import frozen
from stages.lib.compute.memory_budget import MemoryBudget
from stages.lib.compute.processes import Processes
from stages.lib.compute.sequence_scores import PairScores, all_pair_scores, all_scores
from stages.lib.data.chat import Context, encode_completion, encode_prompt, load_tokenizer
from stages.lib.data.conversations import Message
from stages.lib.data.encoding import encode_text, special_tokens
from stages.lib.data.reward_texts import RewardTexts, as_message
from stages.lib.models.model_facts import read_config
from stages.lib.models.model_traits import longest_shared
from stages.lib.models.pretrained import Loading
from stages.lib.models.reward_head import HeadReading, RewardHead, ScoreScale, find_reward_head, score_scale
from stages.lib.models.reward_models import load_scores
from stages.lib.models.scalar_scores import ClassifierScores, SequenceScores
from stages.lib.models.tokenizer_files import has_same_tokenizer
from stages.lib.rl.episodes import Episode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptOrText = Sequence[Message] | str  # a prompt: messages, or text that the reply goes on from


class RewardModelFacts(NamedTuple):
    """Whose score it is."""

    path: str
    model_type: str
    layer: str | None  # that gives the score; None: the head of transformers' classifier
    label: str | None  # the output that is the score, where there are several
    own_tokenizer: bool  # it reads re-encoded text, not the policy's ids
    chat_template: bool  # the text is rendered by its own template
    own_rule: bool  # its own forward pass says at which token the score is read; else it is the last one

    def line(self) -> str | None:
        """What a user must know of a model that did not come out of this pipeline; None of one that did."""
        if not (self.own_tokenizer or self.own_rule or self.layer or self.label):
            return None
        head = f"its layer {self.layer}" if self.layer else "transformers' classifier"
        label = f", label {self.label}" if self.label else ""
        read = "by its own forward pass" if self.own_rule else "at the last token"
        how = "through its own chat template" if self.chat_template else "as plain text, since it has no chat template"
        reads = f"text is encoded with its own tokenizer, {how}" if self.own_tokenizer else "it reads the policy's ids"
        return f"reward model {self.path} ({self.model_type}): {head}{label}, {read}; {reads}"


@dataclass(frozen=True)
class RewardModel:
    """Scores responses to prompts; the same numbers in all processes, which share the work.

    Args:
        scores: a `SequenceScores` or `ClassifierScores` module, or what stands for one.
        texts: of a model that has another tokenizer than the policy; None: it reads the policy's ids.
        folder: of the tokenizer that it shares with the policy, for texts that come without ids.
        scale: by which scores are standardised; None: they are as the model gives them.
    """

    scores: Callable
    batching: MicroBatching
    texts: RewardTexts | None = None
    folder: Path | None = None
    facts: RewardModelFacts | None = None
    scale: ScoreScale | None = None

    def __call__(self, episodes: Sequence[Episode]) -> list[float | None]:
        """As `Reward` says."""
        if self.texts is None:
            prompts, responses = [episode.prompt.ids for episode in episodes], [episode.ids for episode in episodes]
            return [*self.score_ids(prompts, responses)]
        prompts = [episode.prompt.shown for episode in episodes]
        contexts = [context_of(episode.prompt.context) for episode in episodes]
        return [*self.score_texts(prompts, [episode.text for episode in episodes], contexts=contexts)]

    def score_ids(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[float]:
        """The score of each completion, in the order given, of a model that shares the policy's tokenizer."""
        assert self.texts is None, "ids of the policy say nothing to a model with another tokenizer"
        return self._scaled(all_scores(self.scores, prompts, completions, self.batching))

    def _scaled(self, scores: list[float]) -> list[float]:
        return scores if self.scale is None else self.scale.standardised(scores)

    def score_id_pairs(self, pairs: dict[str, list]) -> PairScores:
        """The scores of both completions of the pairs of a token table; as `score_ids`."""
        assert self.texts is None, "ids of the policy say nothing to a model with another tokenizer"
        return PairScores(*map(self._scaled, all_pair_scores(self.scores, pairs, self.batching)))

    def score_texts(
        self,
        prompts: Sequence[PromptOrText],
        replies: Sequence[Message | str],
        ended: Sequence[bool] | None = None,
        contexts: Sequence[Context] | None = None,
    ) -> list[float]:
        """The score of each reply to its prompt, in the order given.

        Args:
            replies: messages, or the content of one.
            ended: with EOS, rather than at a limit of tokens, as each reply did (None: all of them). One that shares
                the policy's tokenizer reads the EOS of those that did.
            contexts: what a chat template of its own gets beside the messages.
        Raises:
            StageError: a chat template refuses a conversation, or one is too long for the model; with the policy's
                tokenizer also as `chat.encode_completion`.
        """
        if self.texts is not None:
            ids = self.texts.encode(prompts, replies, contexts)
            return self._scaled(all_scores(self.scores, [[]] * len(ids), ids, self.batching))
        assert self.folder is not None, "texts are encoded with a tokenizer"
        tokenizer = load_tokenizer(self.folder)
        rows = zip(prompts, replies, [True] * len(replies) if ended is None else ended, strict=True)
        encoded = [encoded_as_the_policy_does(tokenizer, *row) for row in rows]
        return self.score_ids([prompt for prompt, _ in encoded], [reply for _, reply in encoded])


def encoded_as_the_policy_does(
    tokenizer: "PreTrainedTokenizerBase", prompt: PromptOrText, reply: Message | str, ended: bool
) -> tuple[list[int], list[int]]:
    """Ids of a prompt and of a reply, as the pipeline's own stages give them."""
    answer = as_message(reply)
    if isinstance(prompt, str):
        bos, ids = [*special_tokens(tokenizer).bos_ids], encode_text(tokenizer, prompt)
        return ids if bos and ids[:1] == bos else [*bos, *ids], encode_text(tokenizer, answer["content"])
    ids = encode_completion(tokenizer, prompt, answer)
    return encode_prompt(tokenizer, prompt), ids if ended else ids[:-1]


def context_of(context: Mapping[str, Any]) -> Context:
    """What a prompt's row has for the chat template."""
    return Context(context.get("tools"), context.get("template_arguments"))


def load_reward_model(
    path: Path,
    reading: HeadReading,
    loading: Loading,
    batching: MicroBatching,
    processes: Processes,
    policy: Path,
    *,
    standardise: bool = False,
) -> RewardModel:
    """A reward model that nothing trains.

    Args:
        reading: the section of params.yaml, or any `RewardReading`.
        batching: of passes over the policy's ids, with the pad id that its models share.
        policy: a model folder with the tokenizer of the ids to be scored.
        standardise: scores are standardised by the mean and deviation that stand in the folder's config.json.
    Raises:
        StageError: it is no reward model, its label or head is not clear, or it cannot be loaded; there is no mean and
            deviation to standardise by.
    """
    head, shares_tokens = find_reward_head(path, reading), has_same_tokenizer(path, policy)
    scale = score_scale(path, head) if standardise else None
    loading = replace(loading, frozen=True)
    module = load_scores(path, head, loading, shares_tokens=shares_tokens)
    texts = None if shares_tokens else RewardTexts(path, trust_remote_code=loading.trust_remote_code)
    facts = facts_of_reward(path, head, module, texts)
    if facts.own_tokenizer or facts.own_rule:
        batching = own_batching(module, batching, one_by_one=facts.own_rule)
    if loading.runtime.share_prompts and isinstance(module, SequenceScores):
        batching = replace(batching, longest_shared=longest_shared(module.classifier))
    return RewardModel(frozen(module, loading.runtime, processes), batching, texts, path, facts, scale)


def facts_of_reward(path: Path, head: RewardHead, module: nn.Module, texts: RewardTexts | None) -> RewardModelFacts:
    own_rule = isinstance(module, ClassifierScores)
    template = texts is not None and texts.has_template
    model_type = str(read_config(path).get("model_type"))
    return RewardModelFacts(str(path), model_type, head.layer, head.label_name, texts is not None, template, own_rule)


def own_batching(module: Any, batching: MicroBatching, *, one_by_one: bool) -> MicroBatching:
    """Passes over sequences padded with the id by which a given model knows padding.

    Args:
        one_by_one: if it knows none, since its own forward pass would take padding for text.
    """
    pad_id = module.classifier.config.get_text_config().pad_token_id
    alone = one_by_one and pad_id is None
    budget = MemoryBudget("micro_batch_tokens", 1) if alone else batching.budget
    return replace(batching, packing=False, pad_id=pad_id or 0, budget=budget)
