"""What answers the prompts in training: our own sampler, or an engine that others made."""

from typing import Annotated, Literal

from pydantic import Field

from stages.lib.settings.bounds import Positive
from stages.lib.settings.declaration import Settings, key


class OwnSampling(Settings):
    """In the stage's own processes, with random numbers of each response's own."""

    type: Literal["own"] = key(
        "own", "in the stage's own processes; each response has random numbers of its own, so that runs repeat exactly"
    )


class TransformersSampling(Settings):
    """Transformers' continuous batching, with the model that is trained."""

    type: Literal["transformers"] = key(
        "transformers",
        "transformers' continuous batching, in one process; a response's random numbers depend on the batch it was in",
    )


class VllmSampling(Settings):
    """A vLLM server, which gets the weights after each phase."""

    type: Literal["vllm"] = key(
        "vllm",
        "a vLLM server (runtime.yaml: vllm), which gets the policy's weights before each phase; responses have no "
        "random numbers of their own, so that two runs never write the same bytes; they are kept until the run is "
        "done, so that a killed run goes on with the same ones",
    )
    pushes: Literal["weights", "adapter"] = key(
        "weights",
        "weights: the whole model, with LoRA merged into it | adapter: that of LoRA alone, which the server adds to "
        "its base",
    )
    tolerance: Positive = key(
        1e-3,
        "that a push is verified by: at most this may log-probs of the server differ from those of the policy; in "
        "bf16 such as 0.2",
        unit="nats per token",
    )
    batch_invariant: bool = key(
        False,
        "have vLLM compute each response as if it were alone in its batch, where its kernels can (GPUs; slower)",
    )


SamplerChoice = Annotated[OwnSampling | TransformersSampling | VllmSampling, Field(discriminator="type")]
