"""Section `fetch_model` of params.yaml: models of the Hugging Face Hub that are used as they are."""

import re

from pydantic import model_validator

from stages.lib.settings.bounds import Text
from stages.lib.settings.declaration import Settings, key
from stages.lib.settings.prepare_base import HUB_NAME


class HubModel(Settings):
    """A model at one commit, such as a reward model; a model to train is one of prepare_base.hub."""

    model: Text = key("owner/name", "owner/name")
    revision: Text = key("0" * 40, "full commit hash, 40 hexadecimal digits: a branch or tag can move")

    @model_validator(mode="after")
    def _check(self) -> "HubModel":
        if not HUB_NAME.fullmatch(self.model):
            raise ValueError(f"model must be owner/name, found {self.model}")
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(
                f"revision must be a full commit hash of 40 hexadecimal digits, found {self.revision}: "
                "a branch or tag can move, and the model with it"
            )
        return self
