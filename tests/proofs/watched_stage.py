"""One run of a stage's real `main`, watched: gradients, weights and rollouts of 20 steps.

`make_project` makes what all these runs start from. They share the process group of one launch.
"""

import contextlib
import importlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.moe import ExpertsInterface
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm, MixtralTopKRouter

from stages.lib.compute.engine import base as engine_module
from stages.lib.compute.processes import Processes
from stages.lib.models import pretrained
from stages.lib.rl.episodes import Episode
from stages.lib.rl.samplers.own import OwnSampler
from stages.lib.settings.advantages import Gdpo, LeaveOneOut, ReinforceBaseline
from stages.lib.settings.critic import SharedTrunk
from stages.lib.settings.declaration import block
from stages.lib.settings.dynamic_sampling import DynamicSampling
from stages.lib.settings.entropy_bonus import FixedEntropyBonus
from stages.lib.settings.kl_penalty import KlInLoss, KlInReward
from stages.lib.settings.policy_loss import CispoLoss, ClipLoss, DrGrpoLoss, GspoLoss
from stages.lib.settings.preference_loss import (
    AotLoss,
    AotUnpairedLoss,
    BcoPairLoss,
    MixtureLoss,
    SftLoss,
    SigmoidLoss,
    WeightedLoss,
)
from stages.lib.settings.ptx import PtxSettings
from stages.lib.settings.rewards import OverlongReward, RepetitionReward
from tests.pipeline.graph import stage_names
from tests.stages.tiny_pipeline import (
    call,
    change_entries,
    inside,
    lay_over,
    new_project,
    read_yaml,
    script,
    stage_options,
    write_yaml,
)
from tests.tiny_experts import save_mixtral

STEPS = 20
ROLLOUTS = "rollouts.json"
# What is evaluated, between the steps too, and published is then an average, sharded like AdamW's moments.
AVERAGED = {"ema_decay": 0.9}
EVALUATED = {"eval_every": 6, "keep": "last", "optimizer": AVERAGED}
TWENTY_STEPS = {
    "train_sft": {"epochs": 2.5, "batch_size": 8, **EVALUATED},
    "train_rm": {"epochs": 3.34, "batch_size": 8, **EVALUATED},
    "train_dpo": {"epochs": 3.34, "batch_size": 8, **EVALUATED},
    "train_ppo": {"iterations": 5, "rollout_batch_size": 8, "minibatch_size": 4, "epochs": 2, "max_new_tokens": 12}
    | {"policy_optimizer": AVERAGED},
    "train_grpo": {"iterations": 5, "rollout_batch_size": 4, "samples_per_prompt": 2, "minibatch_size": 4, "epochs": 2}
    | {"max_new_tokens": 12, "optimizer": AVERAGED},
}
TRAINING = tuple(TWENTY_STEPS)
LORA = {
    "rank": 4,
    "alpha": 8,
    "targets": "all-linear",
    "experts": False,
    "routers": False,
    "rslora": False,
    "base_quantization": None,
}
LORA["save_adapter"] = False
WITH_LORA = {f"{stage}, LoRA": {"lora": LORA} for stage in TRAINING}
EXPERTS = "models/experts"
MIXTURE = {"model": EXPERTS, "router_loss": {"coefficient": 0.1, "over": "batch"}}
WITH_EXPERTS = {
    "train_sft, experts": MIXTURE,
    "train_rm, experts": MIXTURE | {"router_loss": {"coefficient": 0.1, "over": "sequence"}},
    "train_dpo, experts": MIXTURE,
    "train_sft, experts, LoRA": MIXTURE | {"lora": LORA | {"experts": True, "routers": True}},
}
# Those that tie the pairs of a step together, and one that weighs them by whole distributions.
LOSSES = {
    "weighted": block(WeightedLoss, loss=block(SigmoidLoss, wpo=True)),
    "sorted": block(WeightedLoss, loss=block(AotLoss)),
    "sorted_apart": block(WeightedLoss, loss=block(AotUnpairedLoss)),
    "shifted": block(WeightedLoss, loss=block(BcoPairLoss)),
    "likely": block(WeightedLoss, loss=block(SftLoss)),
}
WITH_LOSSES = {"train_dpo, losses": {"loss": block(MixtureLoss, parts=LOSSES)}}
# Between them, what of PPO and GRPO is summed over the tokens, responses or rewards of a whole step or phase.
WITH_TERMS = {
    "train_ppo, one trunk": {"critic": block(SharedTrunk), "samples_per_prompt": 2, "whiten_rewards": True},
    "train_ppo, more terms": {
        "kl": block(KlInLoss, estimator="k2", bias_correction=True),
        "loss": block(ClipLoss, dual_clip=3.0),
        "entropy_bonus": block(FixedEntropyBonus),
        "normalise_scores": "running",
        "ptx": block(PtxSettings, batch_size=8),
        "ptx_tokens": "data/tokens/train/sft.arrow",
    },
    "train_grpo, whole responses": {
        "advantages": block(ReinforceBaseline),
        "loss": block(GspoLoss),
        "kl": block(KlInReward),
        "mask_truncated": True,
        "stop_strings": ["e"],  # or all would be truncated
    },
    "train_grpo, some tokens": {
        "advantages": block(LeaveOneOut),
        "loss": block(CispoLoss),
        "reuse_sampler_logps": True,
        "top_entropy_share": 0.5,
        "off_policy_limit": 0.01,
    },
    "train_grpo, several rewards": {
        "rollout_batch_size": 2,
        "samples_per_prompt": 4,
        "advantages": block(Gdpo),
        "loss": block(DrGrpoLoss),
        "rewards": {"repetition": block(RepetitionReward, n=2), "overlong": block(OverlongReward, buffer=8)},
        "dynamic_sampling": block(DynamicSampling),
    },
}
VARIANTS = WITH_LORA | WITH_EXPERTS | WITH_LOSSES | WITH_TERMS


class Probe:
    """Notes the first gradient, and the weights before, after the first step and at the end, of each engine.

    It also counts the responses that are others than those of the reference run. Where `keep_to_reference` says so,
    the stage goes on with the latter, so that what it computes of them can be compared.
    """

    def __init__(self, is_main: bool, reference: Path | None = None, *, keep_to_reference: bool = False) -> None:
        self.is_main = is_main
        self.found: dict[str, torch.Tensor] = {}
        self.engines: list[int] = []
        self.rollouts: list[list[list[int]]] = []
        self.expected = json.loads((reference / ROLLOUTS).read_text()) if reference else None
        self.keep_to_reference = keep_to_reference

    def sampled(self, sampler: OwnSampler, episodes: list[Episode]) -> list[Episode]:
        self.rollouts.append([episode.ids for episode in episodes])
        if self.expected is None or not self.keep_to_reference:
            return episodes
        wanted = zip(episodes, self.expected[len(self.rollouts) - 1], strict=True)
        return [sampler.episode(episode.prompt, ids, episode.sample) for episode, ids in wanted]

    @property
    def differing_rollouts(self) -> float:
        assert self.rollouts, "the stage samples by other means than OwnSampler"
        pairs = zip(self.rollouts, self.expected, strict=True)
        return float(sum(one != other for phase in pairs for one, other in zip(*phase, strict=True)))

    def note(self, name: str, tensors: Iterator[torch.Tensor]) -> None:
        parts = [tensor.detach().flatten().double().cpu() for tensor in tensors]
        if self.is_main:
            self.found[name] = torch.cat(parts)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While a stage runs."""
        probe, step, sample = self, engine_module.Engine.step, OwnSampler.sample

        def watched(engine: Any) -> float:
            if id(engine) not in probe.engines:
                probe.engines.append(id(engine))
            name = f"{probe.engines.index(id(engine))}"
            if engine.steps_taken == 0:
                probe.note(f"{name}/weights 0", (engine.full_state(weight) for weight in engine.trained))
            norm = step(engine)
            if engine.steps_taken == 1:
                probe.note(f"{name}/gradient", first_gradient(engine, norm))
            if engine.steps_taken in (1, STEPS):
                weights = (engine.full_state(weight) for weight in engine.trained)
                probe.note(f"{name}/weights {engine.steps_taken}", weights)
            return norm

        engine_module.Engine.step = watched
        OwnSampler.sample = lambda sampler, *given: probe.sampled(sampler, sample(sampler, *given))
        try:
            yield
        finally:
            engine_module.Engine.step, OwnSampler.sample = step, sample


def first_gradient(engine: Any, norm: float) -> Iterator[torch.Tensor]:
    """The first step's gradient of each trained weight, whole, as AdamW saw it but before clipping.

    AdamW's first moment is then 1 - beta1 of it. ZeRO has the summed gradient nowhere else but within its step.
    """
    settings = engine.settings
    clipped = min(1.0, settings.max_grad_norm / (norm + 1e-6))
    for weight in engine.trained:
        yield engine.full_state(weight, "exp_avg") / ((1 - settings.beta1) * clipped)


def make_project(folder: Path) -> None:
    """The tiny pipeline up to the models that the compared stages start from."""
    folder.mkdir(parents=True)
    new_project(folder)
    stages = stage_names()
    for stage in stages[1 : stages.index("train_ppo@ppo")]:
        call(folder, stage)
    save_mixtral(folder / "models/base", folder / EXPERTS)
    change_entries(folder, TWENTY_STEPS)


def make_bf16_project(project: Path, alone: Processes) -> None:
    """The same project with all stages in bf16, and the reference log-probs that train_dpo then wants."""
    folder = project.with_name("project-bf16")
    if folder.exists():
        return
    shutil.copytree(project, folder, symlinks=True)
    change_entries(folder, {stage: {"precision": "bf16"} for stage in (*TRAINING, "ref_logprobs", "evaluate")})
    made = run_stage(folder, "ref_logprobs", {"engine": "torch"}, Probe(is_main=True), alone)
    shutil.copytree(made / "data/ref_logprobs", folder / "data/ref_logprobs", dirs_exist_ok=True)
    shutil.rmtree(made)


def stage_of(kind: str) -> str:
    """The stage that a variant is of."""
    return kind.partition(",")[0]


def run_stage(project: Path, kind: str, knobs: dict[str, Any], probe: Probe, processes: Processes) -> Path:
    """One run of a stage's real `main`, which `probe` watches. Returns the folder with its outs."""
    stage = stage_of(kind)
    folder = Path(processes.broadcast(tempfile.mkdtemp(prefix="equivalence-") if processes.is_main else None))
    if processes.is_main:
        shutil.copytree(project, folder, symlinks=True, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".scratch"))
        runtime = read_yaml(project / "runtime.yaml")
        lay_over(runtime["default"], {key: value for key, value in knobs.items() if key != "deepspeed"})
        runtime["default"]["deepspeed"] = knobs.get("deepspeed", {})
        write_yaml(folder / "runtime.yaml", runtime)
        if kind in VARIANTS:
            change_entries(folder, {stage: VARIANTS[kind]})
    processes.broadcast(None)
    module = importlib.import_module(f"stages.{script(stage)}")
    options = stage_options(stage)
    arguments = {
        name[2:].replace("-", "_"): value if name == "--name" else Path(value)
        for name, value in zip(options[::2], options[1::2], strict=True)
    }
    quiet = contextlib.redirect_stdout(io.StringIO())
    with inside(folder), one_launch(module, processes), probe.watching(), quiet:
        module.main(**arguments)
    return folder


@contextlib.contextmanager
def one_launch(module: Any, processes: Processes) -> Iterator[None]:
    """Many runs of stages in the process group of one launch."""
    join, leave = module.join_processes, Processes.leave
    module.join_processes = lambda _runtime: processes
    Processes.leave = lambda _self: None
    try:
        yield
    finally:
        module.join_processes, Processes.leave = join, leave


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Models load in float64 where the settings say fp32, and compute in it.

    transformers' norms and routers would round to float32, where two numbers that are 1e-16 apart now and then part,
    and its kernels for experts compute in nothing wider.
    """
    wider: list[tuple[Any, str, Any]] = [
        (LlamaRMSNorm, "forward", norm_in_float64),
        (MixtralRMSNorm, "forward", norm_in_float64),
        (MixtralTopKRouter, "forward", route_in_float64),
        (ExpertsInterface, "get_interface", lambda _self, _name, eager: eager),
    ]
    before = [getattr(owner, name) for owner, name, _ in wider]
    pretrained.DTYPES["fp32"] = torch.float64
    torch.set_default_dtype(torch.float64)
    for owner, name, function in wider:
        setattr(owner, name, function)
    try:
        yield
    finally:
        pretrained.DTYPES["fp32"] = torch.float32
        torch.set_default_dtype(torch.float32)
        for (owner, name, _), function in zip(wider, before, strict=True):
            setattr(owner, name, function)


def norm_in_float64(norm: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
    return norm.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def route_in_float64(router: torch.nn.Module, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = torch.nn.functional.linear(states.reshape(-1, router.hidden_dim), router.weight)
    top, chosen = logits.softmax(dim=-1).topk(router.top_k, dim=-1)
    return logits, top / top.sum(dim=-1, keepdim=True), chosen
