"""Sources of rows that tasks make: their sizes, and what else their rows depend on."""

from typing import Annotated, Literal

from annotated_types import Ge, Le

from stages.lib.data.prepared_rows import Kind
from stages.lib.settings.bounds import Count, Positive, Temperature
from stages.lib.settings.declaration import Settings, key

# Below the number of distinct prompts (test: about 125 000), so drawing new ones stays quick.
GeneratedRows = Annotated[int, Ge(0), Le(100_000)]
HeldOutRows = Annotated[int, Ge(1), Le(100_000)]


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
