"""The card of a model folder says what made it, and nothing that changes without cause."""

from pathlib import Path

from stages.lib.runs.model_card import write_model_card


def test_the_card_holds_settings_inputs_and_metrics(tmp_path: Path) -> None:
    arguments = {
        "stage": "train_rm",
        "settings": {"train_rm": {"epochs": 1.0}, "seed": 3},
        "inputs": {"models/sft": "ab12", "data/tokens/preference": "cd34"},
        "metrics": {"eval_accuracy": 0.81234567},
    }
    write_model_card(tmp_path, **arguments)
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n")
    for line in ('    "epochs": 1.0', '  "seed": 3,', "| `models/sft` | `ab12` |", "| eval_accuracy | 0.812346 |"):
        assert line in text.splitlines()
    assert text.index("cd34") < text.index("ab12")  # by path, so the order given is no difference
    write_model_card(tmp_path, **arguments)
    assert (tmp_path / "README.md").read_text() == text
