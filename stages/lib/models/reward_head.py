"""What gives the score in a reward model's folder, whoever made it; found without torch, by configuration and names.

score            what train_rm writes, as most others do: transformers' sequence classifier of a decoder
classifier …     a classifier of transformers with a head of its own, such as DistilBERT's, RoBERTa's
v_head.summary   TRL's language model with a value head
value_head …     OpenRLHF, whose config.json names the layer in `value_head_prefix`
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from stages.lib.command.errors import StageError
from stages.lib.command.quoted import nearest
from stages.lib.models.loading_errors import not_loaded
from stages.lib.models.model_facts import read_config
from stages.lib.models.weights_files import require_safetensors, weights_files

KNOWN_HEADS = ("v_head.summary", "v_head", "value_head", "reward_head", "score")
HEADS_OF_CLASSIFIERS = ("score", "classifier")  # where config.json names a sequence classifier, both are its own


class HeadReading(Protocol):
    """What is read here of a section of params.yaml that names a reward model."""

    @property
    def reward_head(self) -> str | None: ...

    @property
    def reward_label(self) -> str | int | None: ...


class RewardHead(NamedTuple):
    """What gives the score.

    Args:
        layer: a linear layer on the body's last hidden states; None: the head of transformers' sequence classifier.
        label: number of the output that is the score.
        label_name: its name in config.json, where there are several.
        shift, scale: the score is (output − shift) / scale, as OpenRLHF's `normalize_reward` has it.
    """

    layer: str | None
    label: int = 0
    label_name: str | None = None
    shift: float = 0.0
    scale: float = 1.0


class ScoreScale(NamedTuple):
    """Mean and standard deviation of a reward model's scores of held-out replies.

    They stand in its config.json under the names that OpenRLHF has for them, where from_pretrained passes them over.
    """

    mean: float
    std: float

    def standardised(self, scores: Iterable[float]) -> list[float]:
        """(score − mean) / std of each."""
        return [(score - self.mean) / self.std for score in scores]


def score_scale(path: Path, head: RewardHead) -> ScoreScale | None:
    """What train_rm has written; None where the head standardises scores by itself, as its model's folder says.

    Raises StageError if a model's folder has none, or if all scores were alike.
    """
    if (head.shift, head.scale) != (0.0, 1.0):
        return None
    config = read_config(path)
    found: list[Any] = [config.get(name) for name in ScoreScale._fields]
    if not all(type(value) in (int, float) and math.isfinite(value) for value in found) or not found[1] > 0:
        raise StageError(
            f"{path}/config.json has no 'mean' and 'std' of scores on held-out rows, as train_rm writes them (found "
            f"{found!r:.60}): set standardise_reward: false"
        )
    return ScoreScale(*map(float, found))


def find_reward_head(path: Path, reading: HeadReading) -> RewardHead:
    """The head of a reward model. Raises StageError if there is none, or several, or the label is not clear."""
    head = find_any_head(path, reading)
    if head is None:
        raise StageError(
            f"{path} is not a reward model: its config.json names no sequence classifier, and none of its weights is "
            f"called {' or '.join(f'{name}.weight' for name in KNOWN_HEADS)}; name its layer in reward_head"
        )
    return head


def find_any_head(path: Path, reading: HeadReading) -> RewardHead | None:
    """As `find_reward_head`; None for a language model, which has no such head."""
    config = read_config(path)
    layers = linear_layers(path)
    named, prefix = reading.reward_head, config.get("value_head_prefix")
    classifier = "SequenceClassification" in str(config.get("architectures"))
    if named is None and isinstance(prefix, str) and prefix in layers and (prefix != "score" or not classifier):
        named = prefix
    if classifier and named in (None, *HEADS_OF_CLASSIFIERS):
        return RewardHead(None, *output_of_label(config, path, reading.reward_label))
    if named is not None and named not in layers:
        raise StageError(
            f"{path} has no layer '{named}', which reward_head names{nearest(named, layers)}; with one output there "
            f"are: {', '.join(name for name, outputs in layers.items() if outputs == 1) or 'none'}"
        )
    found = [name for name in KNOWN_HEADS if layers.get(name) == 1] if named is None else [named]
    if len(found) > 1:
        raise StageError(f"{path} has several layers that could give a score; name one in reward_head: {found}")
    if not found:
        return None
    if layers[found[0]] != 1 or reading.reward_label not in (None, 0):
        raise StageError(f"{path}: {found[0]} is a layer with {layers[found[0]]} outputs, and has no labels by name")
    return RewardHead(found[0], 0, None, *normalisation(config, path))


def output_of_label(config: dict[str, Any], path: Path, wanted: str | int | None) -> tuple[int, str | None]:
    """Number and name of a classifier's output, the name None where it has but one."""
    names = labels(config, path)
    if wanted is None and len(names) > 1:
        raise StageError(
            f"{path} has {len(names)} labels; name the one whose logit is the reward in reward_label: "
            f"{', '.join(names[:20])}"
        )
    if wanted is None or (len(names) == 1 and wanted in (0, names[0])):
        return 0, None
    if isinstance(wanted, str):
        if names.count(wanted) != 1:
            found = "two labels" if wanted in names else "no label"
            raise StageError(
                f"{path} has {found} '{wanted}', which reward_label names (it has {', '.join(names[:20])})"
                f"{nearest(wanted, names)}"
            )
        wanted = names.index(wanted)
    if wanted >= len(names):
        raise StageError(f"{path}: reward_label is {wanted}, and its last label has the number {len(names) - 1}")
    return wanted, names[wanted]


def labels(config: dict[str, Any], path: Path) -> list[str]:
    """The names of a classifier's labels, in the order of its outputs; two where config.json says nothing of them."""
    found = config.get("id2label")
    if found is None:
        count = config.get("num_labels", 2)
        if type(count) is not int or not 1 <= count <= 10**6:
            raise StageError(f"{path}/config.json: expected a whole number as 'num_labels', found {count!r:.100}")
        return [f"LABEL_{number}" for number in range(count)]
    if not isinstance(found, dict) or {str(key) for key in found} != {str(number) for number in range(len(found))}:
        raise StageError(f"{path}/config.json: expected in 'id2label' a name for each number from 0 on")
    return [str(found[str(number)]) for number in range(len(found))]


def normalisation(config: dict[str, Any], path: Path) -> tuple[float, float]:
    """Mean and deviation of the rewards, which OpenRLHF keeps in config.json and takes out; (0, 1) if it does not."""
    if config.get("normalize_reward") is not True or "mean" not in config:
        return 0.0, 1.0
    found: list[Any] = [config["mean"], config.get("std")]
    if not all(type(value) in (int, float) for value in found) or not found[1] > 0:
        raise StageError(
            f"{path}/config.json: normalize_reward needs numbers as 'mean' and 'std', found {found!r:.100}"
        )
    return float(found[0]), float(found[1])


def linear_layers(path: Path) -> dict[str, int]:
    """Name of each layer that has a matrix as its weight → how many outputs it has."""
    from safetensors import safe_open

    require_safetensors(path, str(path))
    found = {}
    for file in weights_files(path, str(path)):
        with not_loaded(f"{file} cannot be read"), safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                shape = tensors.get_slice(name).get_shape()
                if name.endswith(".weight") and len(shape) == 2:
                    found[name.removesuffix(".weight")] = shape[0]
    return found
