"""The vLLM server that a sampler of type vllm asks: where it is, or how a stage starts one."""

from pydantic import model_validator

from stages.lib.settings.bounds import Count, Positive, Several, Text
from stages.lib.settings.declaration import Settings, key
from stages.lib.settings.server_address import require_address

# What the pipeline sets, or params.yaml decides.
OUR_OPTIONS = (
    "--model",
    "--served-model-name",
    "--host",
    "--port",
    "--dtype",
    "--logprobs-mode",
    "--generation-config",
    "--hf-overrides",
    "--enable-lora",
    "--quantization",
    "--kv-cache-dtype",
    "--speculative-config",
    "--seed",
    "--api-key",
)


class VllmServer(Settings):
    """A server that is there, or one that a stage starts for itself and ends."""

    address: Text | None = key(
        None, "of a server that is there, such as http://127.0.0.1:8000; null: the stage starts one on this machine"
    )
    token_variable: Text | None = key(
        None, "environment variable that holds the token to send as `Authorization: Bearer …`; null: none is sent"
    )
    program: Text = key("vllm", "that starts a server: the vllm of an environment of its own")
    options: Several[Text] = key(
        [], "more of its command line, each word by itself, such as [--gpu-memory-utilization, '0.4']"
    )
    start_seconds: Positive = key(600.0, "that it may take to answer", unit="seconds")
    timeout_seconds: Positive = key(600.0, "that one request may take", unit="seconds")
    prompts_per_request: Count = key(8, "that are asked together", unit="prompts")
    parallel_requests: Count = key(64, "under way at a time")
    weights_folder: Text | None = key(
        None,
        "where weights are written for the server to read, which must have the folder under the same path; null: in "
        "the scratch folder",
    )

    @model_validator(mode="after")
    def _check(self) -> "VllmServer":
        taken = [word for word in self.options if word.partition("=")[0].replace("_", "-") in OUR_OPTIONS]
        if taken:
            raise ValueError(
                f"options: {taken[0]} is set by the pipeline, or would change results, and is not for here"
            )
        if self.address is None:
            if self.token_variable is not None:
                raise ValueError("token_variable is for a server at address, and address is null")
            return self
        require_address(self.address, "http://127.0.0.1:8000")
        if self.options or self.program != "vllm":
            raise ValueError("program and options start a server, and address names one that is there: set one of both")
        return self
