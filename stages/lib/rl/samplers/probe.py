"""Whether an engine has the weights that it was given: the log-probs of a few texts, as it and as the policy say them.

    agreement   max |engine's after − policy's|  ≤ tolerance
    power       max |engine's before − policy's| ≥ 10 tolerance: the probe tells the old weights from the new ones

A probe without power takes more texts; where that does not help, because the policy has hardly moved, the engine's own
checksums must say that every weight has changed that should have.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from stages.lib.compute.batching import MicroBatching

POWER = 10.0  # tolerances
SIZES = (4, 32, PROBED := 256)  # texts of a probe, until it tells old from new
OF_NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # SHA-256 of no bytes

Logps = list[list[float]]


@torch.no_grad()
def policy_logps(
    policy: Callable,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    temperature: float,
    batching: MicroBatching,
) -> Logps:
    """log π of the tokens of each completion, in nats, in all processes.

    Args:
        policy: a `TokenLogProbs` module, or an engine around one.
    """

    def passes() -> dict[int, list[float]]:
        found = {}
        for batch in batching.sequences(prompts, completions):
            logps = batch.on_completions(policy(*batch.inputs, batch.completion_mask, temperature).logps)
            rows = zip(batch.rows, logps.tolist(), batch.completion_lengths, strict=True)
            found |= {row: values[:length] for row, values, length in rows}
        return found

    return batching.processes.gather_rows(batching.budget.attempt(passes))


def furthest(one: Logps, other: Logps) -> float:
    """The largest difference of two log-probs of one token; NaN and infinities count as infinitely far."""
    pairs = [pair for ours, theirs in zip(one, other, strict=True) for pair in zip(ours, theirs, strict=True)]
    if not pairs:
        return 0.0
    ours, theirs = torch.tensor(pairs, dtype=torch.float64).unbind(dim=1)
    return float((ours - theirs).abs().nan_to_num(nan=torch.inf).max())


def unchanged_weights(
    changed: Mapping[str, bool], before: Mapping[str, str], after: Mapping[str, str]
) -> dict[str, str]:
    """The weights of an engine that cannot be shown to be new, by their names, and why.

    An engine may hold several of our weights as one (`qkv_proj`), under the name of the same module. One must have
    changed where all of ours of that module have.

    Args:
        changed: whether each of our weights differs from the one that was pushed before it.
        before, after: digests of the engine's weights, by name, with a process's name and a colon before it.
    """
    of_modules: dict[str, list[bool]] = {}
    for name, value in changed.items():
        of_modules.setdefault(module_of(name), []).append(value)
    found = {}
    for place, digest in after.items():
        name = place.rpartition(":")[2].replace("base_layer.", "")
        expected = of_modules.get(module_of(name), [])
        if digest == OF_NOTHING:
            found[name] = "its checksum is one of no bytes"
        elif not expected:
            found[name] = "no weight of ours is of its module"
        elif all(expected) and before.get(place) == digest:
            found[name] = "its checksum has not changed"
    return found


def module_of(weight: str) -> str:
    """The module around the layer of a weight: model.layers.0.mlp of model.layers.0.mlp.up_proj.weight."""
    return weight.rpartition(".")[0].rpartition(".")[0]
