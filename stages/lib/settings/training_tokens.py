"""Which token tables a stage reads that passes over train and validation rows."""

from pathlib import Path

from stages.lib.settings.bounds import Text
from stages.lib.settings.declaration import Settings, key


class TrainingTokens(Settings):
    """Two folders of token tables, laid out as data/tokens is."""

    tokens: Text = key(
        "data/tokens",
        "folder of the token tables whose train split is read: data/tokens, or data/sampled/<name> for what a policy "
        "has sampled",
    )
    validation_tokens: Text = key("data/tokens", "folder of the token tables whose validation split is read")

    def tables(self, kind: str) -> tuple[Path, Path]:
        """Where the train and the validation rows of a kind stand."""
        train, validation = Path(self.tokens) / "train", Path(self.validation_tokens) / "validation"
        return train / f"{kind}.arrow", validation / f"{kind}.arrow"
