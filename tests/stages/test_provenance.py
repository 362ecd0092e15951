"""What the stages say of themselves: the card in each model folder, and the log of runs."""

import json
import platform
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from stages.lib.command.hashing import dvc_hash
from stages.lib.settings.runtime import STAGES as STAGES_WITH_RUNTIME
from tests.pipeline.graph import CHAT_TEMPLATE, FIRST, all_instances, in_params, is_code, load_graph, outs_of, paths
from tests.stages.tiny_pipeline import call, read_yaml, script, use_base

INSTANCES = all_instances(load_graph())
MODELS = {out: name for name, stage in INSTANCES.items() for out in outs_of(stage) if out.startswith("models/")}
TASKS = {"models/rm": "text-classification"}


def filled_in(path: str, params: dict) -> str:
    """A path of dvc.yaml with the values of params.yaml in it."""
    return re.sub(r"\$\{(\w+)\.(\w+)\}", lambda match: params[match[1]][match[2]], path)


def logged_name(stage: str) -> str:
    """A run is logged under its script: several groups of stages may run one."""
    _, at, entry = stage.partition("@")
    return f"{script(stage)}{at}{entry}"


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_a_card_that_says_what_made_it(tiny: Path, model: str) -> None:
    name, params = MODELS[model], read_yaml(tiny / "params.yaml")
    card = ModelCard.load(tiny / model / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": TASKS.get(model, "text-generation"),
        "tags": ["stagewise", name.partition("@")[0]],
    }
    settings = json.loads(card.text.split("```json\n")[1].split("```")[0])
    assert settings == {key: in_params(key, params) for key in INSTANCES[name]["params"]}
    inputs = [filled_in(path, params) for path in paths(INSTANCES[name]["deps"]) if not is_code(path)]
    inputs += [CHAT_TEMPLATE] if script(name) == "prepare_base" else []
    hashes = {path: dvc_hash(tiny / path) for path in inputs}
    assert dict(re.findall(r"^\| `(.+)` \| `(.+)` \|$", card.text, flags=re.MULTILINE)) == hashes
    results = tiny / f"metrics/training/{Path(model).name}.json"
    shown = dict(re.findall(r"^\| (\w+) \| ([^`\n]+) \|$", card.text.split("## Metrics")[1], flags=re.MULTILINE))
    for metric, value in json.loads(results.read_text()).items() if results.is_file() else ():
        assert float(shown[metric]) == pytest.approx(value, rel=1e-5)
    assert shown
    for word in (str(tiny), platform.node(), "20[2-9][0-9]-", r"stages/(?!chat_templates)"):
        assert not re.search(word, card.content), word


@pytest.mark.slow
def test_a_base_model_of_ones_own_is_named_without_its_place_on_the_disk(copy_of_tiny, tmp_path: Path) -> None:
    project = copy_of_tiny("own")
    place = (project / "models/base").rename(tmp_path / "pretrained")
    use_base(project, "files", path=str(place))
    call(project, "prepare_base_files@base")
    text = (project / "models/base/README.md").read_text()
    assert str(tmp_path) not in text
    assert f"| `pretrained` | `{dvc_hash(place)}` |" in text
    assert '"path": "pretrained"' in text


@pytest.mark.slow
def test_every_stage_logs_its_run_with_the_hashes_of_its_outs(tiny: Path) -> None:
    records = [json.loads(line) for line in (tiny / ".scratch/runs.jsonl").read_text().splitlines()]
    assert [record["stage"] for record in records] == [logged_name(name) for name in INSTANCES if name != FIRST]
    for name, record in zip([name for name in INSTANCES if name != FIRST], records, strict=True):
        assert record["outs"] == {out: dvc_hash(tiny / out) for out in outs_of(INSTANCES[name])}, name
        assert (record["runtime"] is not None) == (record["stage"].partition("@")[0] in STAGES_WITH_RUNTIME)
        assert record["launcher"] == "python -m"
        assert 0 <= record["seconds"] < 600
    assert max(record["seconds"] for record in records) > 0  # the tiny report alone takes less than a tenth
