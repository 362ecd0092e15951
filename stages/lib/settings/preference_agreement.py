"""What the losses of train_dpo ask of the reference that is named beside them.

Each check raises a StageError that names the key, before the first stage has run.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.settings.named_models import REFERENCES
from stages.lib.settings.preference_loss import needs_tokens_of_reference


def require_what_losses_read(params: Mapping[str, Any]) -> None:
    """Raise StageError for a reference that no loss would read, or one without the log-probs that a loss reads."""
    for name, dpo in params["train_dpo"].items():
        where = Path(os.path.normpath(dpo.reference))
        if not dpo.reads_reference and where != Path(os.path.normpath(dpo.model)):
            raise StageError(
                f"params.yaml: train_dpo.{name}.reference: loss {dpo.loss.type} reads no reference, and DVC would wait "
                f"for {dpo.reference}; give it the value of model, {dpo.model}"
            )
        made = params["ref_logprobs"].get(where.name) if where.parent == REFERENCES["ref_logprobs"].folder else None
        if made is not None and needs_tokens_of_reference(dpo.loss) and not made.per_token:
            raise StageError(
                f"params.yaml: train_dpo.{name}.loss: ld_alpha below 1 needs the log-prob of each token under the "
                f"reference; set ref_logprobs.{where.name}.per_token: true"
            )
