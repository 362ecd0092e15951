"""The models and tables that params.yaml names by their paths: each is made by a stage, or is there already.

Each check raises a StageError that names the key, before the first stage has run.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_origin

from stages.lib.command.errors import StageError
from stages.lib.command.quoted import nearest
from stages.lib.operations.own_folders import real
from stages.lib.settings.lora import quantization_of_base
from stages.lib.settings.sections import KINDS
from stages.lib.settings.training_tokens import TrainingTokens

TRAINED = tuple(section for section in KINDS if section.startswith("train_"))
# Sections that map names to settings of what is trained or measured.
NAMED = tuple(name for name, kind in KINDS.items() if get_origin(kind) is dict and name != "fetch_model")
MODELS, TOKENS, SAMPLED = Path("models"), Path("data/tokens"), Path("data/sampled")
PASS_RATES, ENSEMBLES = Path("data/pass_rates"), Path("data/ensembles")
NEEDED_KIND = {
    "train_sft": "sft",
    "train_rm": "preference",
    "sample_pairs": "prompts",
    "pass_rates": "prompts",
    "ref_logprobs": "preference",
    "train_dpo": "preference",
    "ref_logprobs_unpaired": "unpaired",
    "train_unpaired": "unpaired",
    "train_ppo": "prompts",
    "train_grpo": "prompts",
    "evaluate_rm": "preference",
}

LANGUAGE_MODEL, REWARD_MODEL, TABLES = "a language model", "a reward model", "token tables"
ENSEMBLE = "an ensemble of reward models"
LOG_PROBS, UNPAIRED_LOG_PROBS = "log-probs of a reference", "log-probs of a reference on unpaired rows"
Wanted = Literal[
    "a language model",
    "a reward model",
    "an ensemble of reward models",
    "token tables",
    "log-probs of a reference",
    "log-probs of a reference on unpaired rows",
]


class ReferenceTables(NamedTuple):
    """What a section of log-probs makes: the folder above its entries, what it holds, and the section that reads it."""

    folder: Path
    held: Wanted
    reader: str


REFERENCES = {
    "ref_logprobs": ReferenceTables(Path("data/ref_logprobs"), LOG_PROBS, "train_dpo"),
    "ref_logprobs_unpaired": ReferenceTables(Path("data/ref_logprobs_unpaired"), UNPAIRED_LOG_PROBS, "train_unpaired"),
}
# What may stand in a key of one section, where that is something else than in others.
OF_SECTIONS: dict[tuple[str, str], tuple[Wanted, ...]] = {
    ("train_dpo", "reference"): (LOG_PROBS,),
    ("train_unpaired", "reference"): (UNPAIRED_LOG_PROBS,),
    ("train_rm", "model"): (LANGUAGE_MODEL, REWARD_MODEL),
    ("train_ppo", "reward_model"): (REWARD_MODEL, ENSEMBLE),
    ("train_grpo", "reward_model"): (REWARD_MODEL, ENSEMBLE),
    ("pass_rates", "reward_model"): (REWARD_MODEL, ENSEMBLE),
    ("sample_pairs", "reward_model"): (REWARD_MODEL, ENSEMBLE),
}


class NamedPath(NamedTuple):
    """A path of params.yaml, and what may stand there."""

    key: str
    path: str
    wanted: tuple[Wanted, ...]


def settings_by_key(stage: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a stage: of a section that maps names to settings one for each, by its key in params.yaml."""
    if stage in NAMED:
        return {f"{stage}.{name}": settings for name, settings in params[stage].items()}
    return {stage: params[stage]}


def named_paths(params: Mapping[str, Any]) -> Iterator[NamedPath]:
    """Every path of a model, of a reference's log-probs or of token tables that a section after the data names."""
    of_key: dict[str, tuple[Wanted, ...]] = {
        "model": (LANGUAGE_MODEL,),
        "reference": (LANGUAGE_MODEL,),
        "reward_model": (REWARD_MODEL,),
        "tokens": (TABLES,),
        "validation_tokens": (TABLES,),
    }
    for stage in NAMED:
        for where, settings in settings_by_key(stage, params).items():
            for key, wanted in of_key.items():
                is_read = key != "reference" or getattr(settings, "reads_reference", True)
                if key == "reward_model" and not getattr(settings, "has_reward_model", True):
                    continue  # the entry's own model stands there
                if hasattr(settings, key) and is_read:
                    own = OF_SECTIONS.get((stage, key), wanted)
                    yield NamedPath(f"{where}.{key}", getattr(settings, key), own)
            if stage == "train_ppo":
                yield NamedPath(f"{where}.critic.path", settings.critic.path, (REWARD_MODEL, LANGUAGE_MODEL))
            if getattr(settings, "ptx", None) is not None:
                yield NamedPath(f"{where}.ptx_tokens", str(Path(settings.ptx_tokens).parents[1]), (TABLES,))
    evaluate, score_samples = params["evaluate"], params["score_samples"]
    for name, path in evaluate.policies.items():
        yield NamedPath(f"evaluate.policies.{name}", path, (LANGUAGE_MODEL,))
    if evaluate.policies:
        yield NamedPath("evaluate.reference", evaluate.reference, (LANGUAGE_MODEL,))
    if score_samples.policies:
        yield NamedPath("score_samples.reward_model", score_samples.reward_model, (REWARD_MODEL,))
        yield NamedPath("score_samples.judge", score_samples.judge, (REWARD_MODEL,))


def made_by_stages(params: Mapping[str, Any]) -> dict[Path, tuple[str, Wanted | None]]:
    """Each folder that a stage makes: the section's key, and what it is; None: not known before it is there."""
    made: dict[Path, tuple[str, Wanted | None]] = {TOKENS: ("tokenize_data", TABLES)}
    for name in params["fetch_model"]:
        made[MODELS / name] = (f"fetch_model.{name}", None)
    for name in params["prepare_base"].models:
        made[MODELS / name] = ("prepare_base", LANGUAGE_MODEL)
    for stage in TRAINED:
        for name in params[stage]:
            made[MODELS / name] = (f"{stage}.{name}", REWARD_MODEL if stage == "train_rm" else LANGUAGE_MODEL)
    for name, member in params["ensemble_member"].items():
        made[ENSEMBLES / member.ensemble] = (f"ensemble_member.{name}", ENSEMBLE)
    made |= {SAMPLED / name: (f"sample_pairs.{name}", TABLES) for name in params["sample_pairs"]}
    for name in params["pass_rates"]:
        for part in ("kept", "control"):
            made[PASS_RATES / name / part] = (f"pass_rates.{name}", TABLES)
    for section, tables in REFERENCES.items():
        for name in params[section]:
            made[tables.folder / name] = (f"{section}.{name}", tables.held)
    return made


def require_distinct_names(params: Mapping[str, Any]) -> None:
    """Raise StageError if two sections would write the same folder models/<name>."""
    makers = [(name, stage) for stage in ("prepare_base", "fetch_model", *TRAINED) for name in names_of(params, stage)]
    counts = Counter(name for name, _ in makers)
    for name, count in counts.items():
        if count > 1:
            sections = " and ".join(stage for maker, stage in makers if maker == name)
            raise StageError(f"params.yaml: {sections} both have '{name}', and would write {MODELS / name}; rename one")


def names_of(params: Mapping[str, Any], stage: str) -> list[str]:
    return [*(params[stage].models if stage == "prepare_base" else params[stage])]


def require_models(params: Mapping[str, Any]) -> None:
    """Raise StageError for a path that is neither there nor made by a stage, or made by one as something else."""
    require_distinct_names(params)
    made = made_by_stages(params)
    for key, path, wanted in named_paths(params):
        normal = Path(os.path.normpath(path))
        maker = next((made[folder] for folder in (normal, *normal.parents) if folder in made), None)
        if maker is None:
            if not is_there(path) and not any(is_there(f"{folder}.dvc") for folder in (path, *Path(path).parents)):
                guess = nearest(path, made)
                raise StageError(f"params.yaml: {key}: {path} is neither there nor made by a stage{guess}")
        elif key.rpartition(".")[0] == maker[0]:
            raise StageError(f"params.yaml: {key}: {path} is what {maker[0]} itself makes")
        elif maker[1] is not None and maker[1] not in wanted:
            raise StageError(
                f"params.yaml: {key}: expected {' or '.join(wanted)}, and {path}, which {maker[0]} makes, is {maker[1]}"
            )
        elif maker[1] == TABLES and normal not in made:
            raise StageError(f"params.yaml: {key}: {path} lies in what {maker[0]} makes; name that folder itself")
    unknown = [name for name in params["score_samples"].policies if name not in params["evaluate"].policies]
    if unknown:
        raise StageError(
            f"params.yaml: score_samples.policies: evaluate.policies has no '{unknown[0]}', so there are no samples "
            f"of it{nearest(unknown[0], params['evaluate'].policies)}"
        )


def is_there(path: str) -> bool:
    """False also for a name that no file can have."""
    return os.path.lexists(real(Path(path)))


def require_kinds(params: Mapping[str, Any]) -> None:
    """Raise StageError where a stage would read rows of a kind that prepare_data does not make."""
    kinds = params["prepare_data"].kinds
    needed = [
        (key, needed_kind(stage, settings))
        for stage in NEEDED_KIND
        for key, settings in settings_by_key(stage, params).items()
        if reads_prepared_rows(settings)
    ]
    needed += [(f"train_ppo.{name}.ptx", "sft") for name, ppo in params["train_ppo"].items() if ppo.ptx is not None]
    for key, kind in needed:
        if kind not in kinds:
            raise StageError(
                f"params.yaml: {key} needs rows of kind {kind}, which prepare_data.kinds lacks; add it there, or take "
                f"{key} out"
            )
    if params["score_samples"].policies and not {"prompts", "sft"} & set(kinds):
        raise StageError("params.yaml: score_samples.policies: no replies are sampled without kind prompts or sft")


def needed_kind(stage: str, settings: Any) -> str:
    """The kind of rows that a stage reads."""
    return settings.kind if stage == "train_rm" else NEEDED_KIND[stage]


def reads_prepared_rows(settings: Any) -> bool:
    """Whether a stage reads tables of data/tokens, rather than others alone."""
    if not isinstance(settings, TrainingTokens):
        return True
    return TOKENS in (Path(os.path.normpath(folder)) for folder in (settings.tokens, settings.validation_tokens))


def require_like_reference(params: Mapping[str, Any]) -> None:
    """Raise StageError if a policy has log-probs of other tokens, or is to be computed unlike the reference it is.

    And if its log-probs lack some that its loss needs.
    """
    for section, tables in REFERENCES.items():
        for name, settings in params[tables.reader].items():
            where = Path(os.path.normpath(settings.reference))
            reference = params[section].get(where.name) if where.parent == tables.folder else None
            if reference is not None:
                its_key, own_key = f"params.yaml: {section}.{where.name}", f"{tables.reader}.{name}"
                require_alike(reference, settings, its_key, own_key)
                if settings.loss.type == "kto" and not reference.mismatched:
                    raise StageError(f"{its_key}.mismatched is false, and the loss kto of {own_key} needs it: set true")


def require_alike(reference: Any, settings: Any, its_key: str, own_key: str) -> None:
    """The same of the settings of a reference and of a policy, and of their keys."""
    for key in ("tokens", "validation_tokens"):
        theirs, own = getattr(reference, key), getattr(settings, key)
        if os.path.normpath(theirs) != os.path.normpath(own):
            raise StageError(
                f"{its_key}.{key} is {theirs} and {own_key}.{key} {own}: the log-probs must be of the same tokens; "
                "give both the same"
            )
    if os.path.normpath(reference.model) != os.path.normpath(settings.model):
        return
    for key, theirs, own in (
        ("precision", "precision", settings.precision),
        ("base_quantization", "lora.base_quantization", quantization_of_base(settings.lora)),
    ):
        if getattr(reference, key) != own:
            raise StageError(
                f"{its_key}.{key} is {or_null(getattr(reference, key))} and {own_key}.{theirs} {or_null(own)}, of one "
                "model: the first step's margin would not be 0; give both the same"
            )


def or_null(value: str | None) -> str:
    return "null" if value is None else value
