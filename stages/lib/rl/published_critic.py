"""The critic of PPO as a folder beside its policy: a reward model's, to look at or to start another critic from."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stages.lib.command.errors import StageError
from stages.lib.compute.engine.base import Engine
from stages.lib.models.lora import Lora
from stages.lib.models.policy_with_values import PolicyWithValues
from stages.lib.models.pretrained import facts_of, save_model
from stages.lib.models.scalar_scores import HeadOnBody, ScalarHead
from stages.lib.rl.trained_critic import TrainedCritic
from stages.lib.rl.trained_policy import TrainedPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDER = "critic"


class PublishedCritic:
    """A critic that is written as a sequence classifier with one label, as train_rm writes one.

    Args:
        engine: that trains it.
        lora: around a classifier, a `HeadOnBody`, or a language model whose body has the value head `head`.
        source: the folder that it started from, for messages.
    Raises:
        StageError: there is no classifier of its architecture, or its head has a bias, for which one has no place.
    """

    def __init__(self, engine: Engine, lora: Lora, source: Path, head: ScalarHead | None = None) -> None:
        self.engine = engine
        self.lora = lora
        self.head = head
        own = head or lora.model.get_submodule("score")
        if own.bias is not None:
            raise StageError(f"critic.publish: the head of {source} has a bias, for which the folder has no place")
        is_classifier = head is None and not isinstance(lora.model, HeadOnBody)
        self.classifier = lora.model if is_classifier else classifier_without_weights(lora.model, source)

    def writer(self, tokenizer_from: Path, save_dtype: str) -> Callable[[Path], None]:
        """Gather the weights as they are, in all processes. What is returned writes them in the main process alone.

        It is called before the engine's weights change, and within its `averaged`.
        """
        weights = self.engine.master_weights(self.lora.model)
        heads = self.engine.master_weights(self.head) if self.head is not None else {}

        def write(folder: Path) -> None:
            merged = self.lora.merged(weights)
            if self.classifier is not self.lora.model:
                merged = self._as_of_classifier(merged)
            if heads:
                merged["score.weight"] = heads["weight"]
            target = folder / FOLDER
            save_model(self.classifier, merged, target, save_dtype=save_dtype, tokenizer_from=tokenizer_from)
            self.lora.save_adapter(self.lora.trained(weights), target, save_dtype)

        return write

    def _as_of_classifier(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights of the body and of a head `score`, under the names that the classifier has for them."""
        before = "base_model" if self.head is None else self.lora.model.base_model_prefix
        names = {name: name.removeprefix(f"{before}.") for name in weights if name.startswith(f"{before}.")}
        prefix = self.classifier.base_model_prefix
        found = {f"{prefix}.{name}": weights[own] for own, name in names.items()}
        return found | {name: weight for name, weight in weights.items() if name == "score.weight"}


def classifier_without_weights(model: "PreTrainedModel", source: Path) -> "PreTrainedModel":
    """The sequence classifier of a model's architecture, which takes no memory. Raises StageError if there is none."""
    from transformers import AutoModelForSequenceClassification

    if not facts_of(model).has_classifier:
        raise StageError(
            f"critic.publish: transformers has no sequence classifier for models of type {model.config.model_type}, as "
            f"{source} is; set publish: false"
        )
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


def published_critic(policy: TrainedPolicy, critic: TrainedCritic, source: Path) -> PublishedCritic:
    """What is to be published of a critic, which may be the policy's value head; errors as of `PublishedCritic`."""
    if critic.engine is not None and critic.lora is not None:
        return PublishedCritic(critic.engine, critic.lora, source)
    assert isinstance(policy.engine.module, PolicyWithValues)
    return PublishedCritic(policy.engine, policy.lora, source, policy.engine.module.value_head)
