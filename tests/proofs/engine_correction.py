"""How far the gradient is from the policy's own where another distribution sampled, by correction.

All responses of a small vocabulary are enumerated, so that the mean over a sampler's draws has no noise: the losses of
train_grpo and train_ppo (which agree here) are given each response with its chance under the sampler, and the gradient
that they find is compared with that of the expected reward, as it is defined.

    python -m tests.proofs.engine_correction --table tests/proofs/engine_correction.md
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from stages.lib.rl.engine_correction import engine_corrected
from stages.lib.settings.declaration import block
from stages.lib.settings.engine_correction import (
    NoEngineCorrection,
    SequenceMasked,
    SequenceTruncated,
    TokenMasked,
    TokenTruncated,
)
from tests.lib.rl import enumerated_responses as every
from tests.lib.rl.test_engine_correction import ENGINES, POLICY, entries, gradient_of

FAR = POLICY + every.table(1, 0.6)
ALL = {
    **ENGINES,
    "weights twice as far away": FAR,
    "both: logits times 1.1 of the first": 1.1 * next(iter(ENGINES.values())),
}
CORRECTIONS = {
    "none": block(NoEngineCorrection),
    "token_truncated, upper 2": block(TokenTruncated),
    "token_truncated, no bound": block(TokenTruncated, upper=1e6),
    "token_masked, 0.5 to 5": block(TokenMasked),
    "sequence_truncated, upper 3": block(SequenceTruncated),
    "sequence_truncated, upper 2": block(SequenceTruncated, upper=2.0),
    "sequence_truncated, no bound": block(SequenceTruncated, upper=1e6),
    "sequence_masked, upper 3": block(SequenceMasked),
    "sequence_masked, upper 10": block(SequenceMasked, upper=10.0),
}
HEAD = f"""# What a sampler that is not the policy does to the gradient

`python -m tests.proofs.engine_correction --table …` makes this table again. Responses have at most {every.LENGTH}
tokens of {every.TOKENS}, and all {len(every.responses().mask)} of them are enumerated. Each cell: the distance of the
expected gradient from that of the policy's expected reward, relative to its norm; in brackets the share of the weights
that a bound changes, as the sampler draws them. With longer responses bounds on a product act more often.

"""


def bounded_share(engine: torch.Tensor, settings: Any) -> float:
    """Of the draws of an engine."""
    rollouts = every.rollouts_of(POLICY, engine)
    if settings.type == "none":
        return 0.0
    weights = engine_corrected(rollouts, settings)[0].engine_weights
    free = engine_corrected(rollouts, settings.model_copy(update={"upper": 1e9, "lower": 0.0}))[0].engine_weights
    assert weights is not None
    assert free is not None
    chances = every.chances(engine) * rollouts.response_mask
    return float(((weights != free) * chances).sum() / chances.sum())


def cell(engine: torch.Tensor, chosen: dict[str, Any]) -> str:
    wanted = every.true_gradient(POLICY)
    of_ppo, of_grpo = entries(chosen)
    errors = [every.relative_error(gradient_of(settings, engine, POLICY), wanted) for settings in (of_ppo, of_grpo)]
    assert abs(errors[0] - errors[1]) < 1e-9
    return f"{100 * errors[0]:.1f} % ({100 * bounded_share(engine, of_grpo.engine_correction):.1f} %)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True)
    table = parser.parse_args().table
    lines = [f"| correction | {' | '.join(ALL)} |", f"|---|{'---|' * len(ALL)}"]
    for name, chosen in CORRECTIONS.items():
        lines.append(f"| {name} | {' | '.join(cell(engine, chosen) for engine in ALL.values())} |")
    table.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
