"""Servers that rewards are asked of: where they are on this machine's network, which is for runtime.yaml to say."""

from pydantic import model_validator

from stages.lib.settings.bounds import Count, NotNegative, Positive, Text
from stages.lib.settings.declaration import Settings, key
from stages.lib.settings.server_address import require_address


class RewardServer(Settings):
    """One server and how it is asked; nothing here changes what it answers."""

    address: Text = key(
        "http://127.0.0.1:5000/get_reward",
        "where a remote reward is asked, or the base of an OpenAI-compatible interface, such as http://…:8000/v1",
    )
    token_variable: Text | None = key(
        None, "environment variable that holds the token to send as `Authorization: Bearer …`; null: none is sent"
    )
    timeout_seconds: Positive = key(180.0, "that one request may take", unit="seconds")
    attempts: Count = key(5, "at one request, before the stage stops")
    backoff_seconds: NotNegative = key(1.0, "before the second attempt, twice as long before each next", unit="seconds")
    rows_per_request: Count = key(64, "of a remote reward; a judge is asked for one at a time", unit="responses")
    parallel_requests: Count = key(8, "under way at a time")

    @model_validator(mode="after")
    def _check(self) -> "RewardServer":
        require_address(self.address, "http://127.0.0.1:5000/get_reward")
        return self
