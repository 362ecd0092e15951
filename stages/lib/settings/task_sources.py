"""Sources of rows that tasks make: their sizes, and what else their rows depend on."""

from typing import Annotated, Literal

from annotated_types import Ge, Le
from pydantic import model_validator

from stages.lib.data.prepared_rows import Kind
from stages.lib.settings.bounds import Count, Positive, Share, Temperature
from stages.lib.settings.declaration import Settings, key

# Below the number of distinct prompts (test: about 125 000), so drawing new ones stays quick.
GeneratedRows = Annotated[int, Ge(0), Le(100_000)]
HeldOutRows = Annotated[int, Ge(1), Le(100_000)]
Steps = Annotated[int, Ge(1), Le(8)]


class FilmReviewSettings(Settings):
    """Sizes of the generated task, and how noisy its preference labels are."""

    task: Literal["film_reviews"] = key("film_reviews", "short reviews of made-up films, graded by a known utility")
    sft_rows: GeneratedRows = key(7500, "of the train split; 0: none of this kind in any split", unit="rows")
    preference_rows: GeneratedRows = key(8000, "of the train split; 0: none of this kind in any split", unit="pairs")
    prompt_rows: GeneratedRows = key(1500, "of the train split; 0: none of this kind in any split", unit="prompts")
    validation_rows: HeldOutRows = key(500, "of the validation split of each kind", unit="rows")
    test_rows: HeldOutRows = key(1500, "of the test split of each kind", unit="rows")
    label_temperature: Temperature = key(
        2.0, "of the Bradley-Terry labels; higher is noisier", unit="of the gold utility"
    )
    weight: Positive | None = key(None, "in the mixture of train rows, as for sources of files; null: all rows")
    rows: Count | None = key(None, "train rows of each kind to draw; null: all, or by weight", unit="rows")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        sizes: dict[Kind, int] = {
            "sft": self.sft_rows,
            "preference": self.preference_rows,
            "prompts": self.prompt_rows,
        }
        return tuple(kind for kind, size in sizes.items() if size)


class ArithmeticSettings(Settings):
    """Sizes of the problems of arithmetic, how hard they are, and how carefully their answers are worked."""

    task: Literal["arithmetic"] = key("arithmetic", "sums and comparisons, each with one right answer")
    sft_rows: GeneratedRows = key(4000, "of the train split, with worked answers; 0: none in any split", unit="rows")
    prompt_rows: GeneratedRows = key(8000, "of the train split; 0: none there", unit="prompts")
    validation_rows: GeneratedRows = key(200, "of the validation split of each kind", unit="rows")
    test_rows: GeneratedRows = key(500, "of the test split of each kind", unit="rows")
    digits: Annotated[int, Ge(1), Le(9)] = key(2, "of a number at most", unit="digits")
    fewest_steps: Steps = key(1, "of a problem: additions, the comparison counted as one", unit="steps")
    most_steps: Steps = key(2, "of a problem; each number of steps is as likely as another", unit="steps")
    shortcuts: Share = key(0.5, "of the answers in rows for SFT that give the result alone, without its steps")
    weight: Positive | None = key(None, "in the mixture of train rows, as for sources of files; null: all rows")
    rows: Count | None = key(None, "train rows of each kind to draw; null: all, or by weight", unit="rows")

    @model_validator(mode="after")
    def _check(self) -> "ArithmeticSettings":
        if self.fewest_steps > self.most_steps:
            raise ValueError(f"fewest_steps ({self.fewest_steps}) must be at most most_steps ({self.most_steps})")
        if not self.kinds:
            raise ValueError("sft_rows, prompt_rows, validation_rows and test_rows are all 0, so there are no rows")
        sums = (10**self.digits - 1) ** (self.most_steps + 1)  # of the longest ones, of which test has 5 %
        most = {"sft_rows": sums // 2, "prompt_rows": sums // 2, "validation_rows": sums // 50, "test_rows": sums // 50}
        for name, limit in most.items():
            if getattr(self, name) > limit:
                raise ValueError(
                    f"{name} must be at most {limit}, or too few problems differ, found {getattr(self, name)}; raise "
                    "digits or most_steps"
                )
        return self

    @property
    def kinds(self) -> tuple[Kind, ...]:
        has_prompts = self.prompt_rows or self.validation_rows or self.test_rows
        served: dict[Kind, int] = {"sft": self.sft_rows, "prompts": has_prompts}
        return tuple(kind for kind, size in served.items() if size)
