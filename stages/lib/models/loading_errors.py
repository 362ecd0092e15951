"""What a library raises when it cannot load a stranger's model or tokenizer, as one message."""

from collections.abc import Iterator
from contextlib import contextmanager

from stages.lib.command.errors import StageError
from stages.lib.command.out_of_memory import is_out_of_memory

OWN_CODE = "trust_remote_code=True"  # what transformers' message asks for where a model brings code of its own


@contextmanager
def not_loaded(what: str) -> Iterator[None]:
    """Turn any error of the libraries that read model files into a StageError that begins with `what`.

    safetensors, tokenizers and torch raise bare Exceptions and types of their own for malformed files, the Rust parts
    of them a BaseException. Memory that has run out is not their fault, and goes on as it is.
    """
    try:
        yield
    except StageError:
        raise
    except BaseException as error:
        if is_out_of_memory(error):
            raise
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if OWN_CODE in str(error):
            raise StageError(
                f"{what}: it brings Python code of its own (auto_map), which is not run; if you trust that code, "
                "set trust_remote_code: true in params.yaml"
            ) from None
        reason = " ".join(str(error).split())
        if not reason or isinstance(error, KeyError | AttributeError | TypeError):  # which say little by themselves
            reason = f"{type(error).__name__}: {reason}".removesuffix(": ")
        raise StageError(f"{what}: {reason}") from None
