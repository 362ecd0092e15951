"""Types that several settings share: numbers with their bounds, texts, lists.

Every number has a bound on both sides. Torch and Arrow count in 32 bits in places, and no rate or weight of a billion
means anything.
"""

from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BeforeValidator, Discriminator, Strict, StringConstraints, Tag
from pydantic_core import PydanticKnownError
from typing_extensions import TypeAliasType

from stages.lib.command.json_schema import LARGEST_NUMBER, LARGEST_WHOLE
from stages.lib.command.quoted import LONGEST_TEXT
from stages.lib.command.wrong_values import NAME


def without_nul(text: str) -> str:
    """Refuse what can be no name, path or token; pydantic itself refuses half a surrogate pair."""
    if "\0" in text:
        raise PydanticKnownError("string_unicode")
    return text


def whole(value: Any) -> Any:
    """Refuse true and 1.0, which Python, and so a Literal of whole numbers, takes for 1; and what no machine counts."""
    if type(value) is not int or abs(value) >= 2**63:
        raise PydanticKnownError("literal_error", {"expected": ""})
    return value


Count = Annotated[int, Ge(1), Le(LARGEST_WHOLE)]
NewTokens = Annotated[int, Ge(1), Le(2**20)]  # as many random numbers are drawn at once for each response
WholeNumber = Annotated[int, Ge(0), Le(LARGEST_WHOLE)]
# Sizes of a new model, far above any that has been trained: beyond them one weight alone is more than a machine holds.
Width = Annotated[int, Ge(1), Le(1_000_000)]
Layers = Annotated[int, Ge(1), Le(10_000)]
Positive = Annotated[float, Gt(0), Le(LARGEST_NUMBER)]
NotNegative = Annotated[float, Ge(0), Le(LARGEST_NUMBER)]
Share = Annotated[float, Ge(0), Le(1)]
Decay = Annotated[float, Ge(0), Lt(1)]
BetweenZeroAndOne = Annotated[float, Gt(0), Lt(1)]
Temperature = Annotated[float, Ge(1e-3), Le(LARGEST_NUMBER)]  # logits or utilities are divided by it

Text = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_TEXT), AfterValidator(without_nul)]
Name = Annotated[str, StringConstraints(pattern=NAME, max_length=64)]  # of a folder, and of a stage of the graph
Precision = Literal["fp32", "bf16"]
SaveDtype = Literal["float32", "bfloat16"]
ErrorOrDrop = Literal["error", "drop"]

Element = TypeVar("Element")
Several = Annotated[tuple[Element, ...], Strict(False)]  # YAML has lists, not tuples
Whole = BeforeValidator(whole)

# A value of a section whose keys belong to another program: what JSON can hold, to any depth.
AnyValue = TypeAliasType(
    "AnyValue",
    Annotated[
        Annotated[None, Tag("NoneType")]
        | Annotated[bool, Tag("bool")]
        | Annotated[int, Ge(-(2**63)), Lt(2**63), Tag("int")]
        | Annotated[float, Ge(-1e300), Le(1e300), Tag("float")]
        | Annotated[Text, Tag("str")]
        | Annotated[list["AnyValue"], Tag("list")]
        | Annotated[dict[Text, "AnyValue"], Tag("dict")],
        Discriminator(lambda value: type(value).__name__),
    ],
)
