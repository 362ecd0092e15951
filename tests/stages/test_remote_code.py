"""A model with code of its own through stages that train: only if params.yaml allows it, and with its code after it."""

import json
from pathlib import Path

import pytest

from tests.stages.test_prepare_base import OWN_MODEL, with_own_code
from tests.stages.tiny_pipeline import call, change, new_project, start, use_base


@pytest.mark.slow
def test_a_trusted_model_is_trained_and_an_untrusted_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = new_project(tmp_path)
    for stage in ("read_source_task@film_reviews", "prepare_data", "prepare_base@base"):
        call(folder, stage)
    mark = tmp_path / "mark"
    with_own_code((folder / "models/base").rename(folder / "models/own"), mark)
    use_base(folder, "files", path="models/own")
    change(folder / "params.yaml", {"trust_remote_code": True})
    for stage in ("prepare_base_files@base", "tokenize_data@sft", "train_sft@sft"):
        process = start(folder, stage)
        assert process.wait() == 0, process.stderr.read()
    assert mark.exists()
    config = json.loads((folder / "models/sft/config.json").read_text())
    assert (config["model_type"], config["auto_map"]) == ("own_llama", OWN_MODEL)
    assert (folder / "models/sft/modeling_own.py").read_text() == (folder / "models/own/modeling_own.py").read_text()
    assert '"trust_remote_code": true' in (folder / "models/sft/README.md").read_text()
    # And the same stage, told no.
    mark.unlink()
    change(folder / "params.yaml", {"trust_remote_code": False})
    process = start(folder, "train_sft@sft")
    assert process.wait() == 2
    (line,) = [line for line in process.stderr.read().splitlines() if line.startswith("error")]
    assert "models/base cannot be loaded as AutoModelForCausalLM: it brings Python code of its own" in line
    assert not mark.exists()
