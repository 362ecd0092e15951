"""All of params.yaml: which model reads which section, and what the top-level values are."""

from pathlib import Path
from typing import Any

from pydantic import StrictBool

from stages.lib.command.errors import StageError
from stages.lib.command.kernels import Kernels
from stages.lib.command.params import PARAMS_FILE, Seed, build
from stages.lib.command.quoted import nearest
from stages.lib.command.strict_yaml import load_yaml, short
from stages.lib.settings.bounds import Name
from stages.lib.settings.declaration import Settings, block, key
from stages.lib.settings.ensemble_member import EnsembleMember
from stages.lib.settings.evaluate import Evaluate
from stages.lib.settings.evaluate_rm import EvaluateRm
from stages.lib.settings.fetch_model import HubModel
from stages.lib.settings.pass_rates import PassRates
from stages.lib.settings.prepare_base import PrepareBase
from stages.lib.settings.prepare_data import PrepareData
from stages.lib.settings.ref_logprobs import RefLogprobs, RefLogprobsUnpaired
from stages.lib.settings.sample_pairs import SamplePairs
from stages.lib.settings.score_samples import ScoreSamples
from stages.lib.settings.sources import Sources
from stages.lib.settings.tokenize_data import Tokenize
from stages.lib.settings.train_dpo import TrainDpo
from stages.lib.settings.train_grpo import TrainGrpo
from stages.lib.settings.train_ppo import TrainPpo
from stages.lib.settings.train_rm import TrainRm
from stages.lib.settings.train_sft import TrainSft
from stages.lib.settings.train_unpaired import TrainUnpaired


class Params(Settings):
    """What is computed: the settings of all stages."""

    seed: Seed = key(17, "of every draw: data, weights, order of rows, sampling")
    trust_remote_code: StrictBool = key(
        False,
        "run the Python code that a model or tokenizer brings (auto_map); only if you trust whoever wrote it",
    )
    kernels: Kernels = key(
        "portable",
        "of the CPU: portable: AVX2's alone, for the same bytes on other x86-64 processors | fastest: the widest that "
        "this one has",
    )
    sources: Sources = key(block(Sources), "where rows come from, and how they are read")
    prepare_data: PrepareData = key(block(PrepareData), "what is made of the rows, and what is held out")
    prepare_base: PrepareBase = key(block(PrepareBase), "models to start from, each under its own name")
    fetch_model: dict[Name, HubModel] = key({}, "models of the Hub that are used as they are, such as a reward model")
    tokenize_data: Tokenize = key(block(Tokenize), "budgets of tokens")
    # Each of these maps the name of what is made to its settings; an empty one makes nothing.
    train_sft: dict[Name, TrainSft] = key({"sft": block(TrainSft)}, "supervised fine-tuning, by the model's name")
    train_rm: dict[Name, TrainRm] = key({"rm": block(TrainRm)}, "reward models, by name")
    ensemble_member: dict[Name, EnsembleMember] = key(
        {}, "reward models that score together, as the reward model of train_ppo or train_grpo, by member's name"
    )
    sample_pairs: dict[Name, SamplePairs] = key(
        {}, "rounds of rows made of a policy's own replies, as a reward model ranks them, by the rows' name"
    )
    pass_rates: dict[Name, PassRates] = key(
        {}, "prompts that a policy finds neither too easy nor too hard, for train_grpo, by their name"
    )
    ref_logprobs: dict[Name, RefLogprobs] = key(
        {"sft": block(RefLogprobs)}, "log-probs of reference models, for DPO, by name"
    )
    train_dpo: dict[Name, TrainDpo] = key({"dpo": block(TrainDpo)}, "direct preference optimisation, by model's name")
    ref_logprobs_unpaired: dict[Name, RefLogprobsUnpaired] = key(
        {}, "log-probs of reference models, for train_unpaired, by name"
    )
    train_unpaired: dict[Name, TrainUnpaired] = key({}, "KTO, BCO or APO on single replies, by model's name")
    train_ppo: dict[Name, TrainPpo] = key({"ppo": block(TrainPpo)}, "proximal policy optimisation, by model's name")
    train_grpo: dict[Name, TrainGrpo] = key(
        {"grpo": block(TrainGrpo)}, "group-relative policy optimisation, by model's name"
    )
    evaluate: Evaluate = key(block(Evaluate), "policies on the test rows")
    score_samples: ScoreSamples = key(block(ScoreSamples), "a reward model's scores of the sampled replies")
    evaluate_rm: dict[Name, EvaluateRm] = key({"rm": block(EvaluateRm)}, "reward models on the test pairs, by name")


KINDS = {name: field.rebuild_annotation() for name, field in Params.model_fields.items()}
SECTIONS = {name: kind for name, kind in KINDS.items() if isinstance(kind, type) and issubclass(kind, Settings)}


def default_params() -> dict[str, Any]:
    """The settings of the default run, as params.yaml holds them."""
    return block(Params)


def read_all_params(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """Every section as its settings, and every top-level value. Raises StageError as `read_params` does."""
    return build_all(load_yaml(path), path)


def build_all(document: dict[str, Any], path: Path) -> dict[str, Any]:
    """The same of what a file holds; `path` is named in messages."""
    for name in document:
        if name not in KINDS:
            raise StageError(f"{path}: no stage reads '{short(name)}'{nearest(name, KINDS)}")
    for name in KINDS:
        if name not in document:
            raise StageError(f"{path}: {name} is missing{nearest(name, document)}")
    return {name: build(kind, document[name], f"{path}: {name}") for name, kind in KINDS.items()}
