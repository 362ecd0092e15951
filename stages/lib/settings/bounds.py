"""Numbers of the settings with the bounds that several of them share; any number keeps to those of `params.py`, too."""

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

Count = Annotated[int, Ge(1)]
NewTokens = Annotated[int, Ge(1), Le(2**20)]  # as many random numbers are drawn at once for each response
WholeNumber = Annotated[int, Ge(0)]
# Sizes of a new model, far above any that has been trained: beyond them one weight alone is more than a machine holds.
Width = Annotated[int, Ge(1), Le(1_000_000)]
Layers = Annotated[int, Ge(1), Le(10_000)]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
Decay = Annotated[float, Ge(0), Lt(1)]
Temperature = Annotated[float, Ge(1e-3)]  # logits or utilities are divided by it
