"""Hashes of content: a name, a byte or a place that changes changes them, and DVC's are DVC's."""

import json
import subprocess
import sys
from pathlib import Path

from stages.lib.command.hashing import IGNORED, combined_hash, dvc_hash, file_hash, value_hash
from tests.real_files import PROJECT


def folder(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_known_digests(tmp_path: Path) -> None:
    path = folder(tmp_path, {"abc": "abc"}) / "abc"
    assert file_hash(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_hash(path, "md5") == "900150983cd24fb0d6963f7d28e17f72"


def test_a_folder_is_its_names_and_contents(tmp_path: Path) -> None:
    files = {"a": "1", "b/c": "2"}
    first = dvc_hash(folder(tmp_path / "1", files))
    assert first == dvc_hash(folder(tmp_path / "2", dict(reversed(files.items()))))
    others = [{"a": "2", "b/c": "2"}, {"a": "1", "b/d": "2"}, {"a": "1", "c": "2"}, {"a": "1"}]
    hashes = [dvc_hash(folder(tmp_path / f"other{number}", other)) for number, other in enumerate(others)]
    assert len({first, *hashes}) == 5


def test_the_order_of_keys_is_no_difference() -> None:
    assert value_hash({"a": 1, "b": [2]}) == value_hash({"b": [2], "a": 1})
    assert value_hash({"a": 1}) != value_hash({"a": 1.5})
    assert combined_hash(["a", "b"]) != combined_hash(["b", "a"])


def test_outs_are_hashed_as_dvc_hashes_them(tmp_path: Path) -> None:
    folder(tmp_path, {"model/b.txt": "1", "model/a/z": "2", "model/a.txt": "é", "file": "3"})
    # A clone of a repository, with what editors and kills leave.
    folder(
        tmp_path, {f"model/{name}": "4" for name in (".git/HEAD", "a/__pycache__/x", ".x.partial", ".gitattributes")}
    )
    (tmp_path / ".dvcignore").write_text((PROJECT / ".dvcignore").read_text())
    dvc = str(Path(sys.executable).with_name("dvc"))
    subprocess.run([dvc, "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    subprocess.run([dvc, "add", "-q", "model", "file"], cwd=tmp_path, check=True)
    for name in ("model", "file"):
        text = (tmp_path / f"{name}.dvc").read_text()
        assert f"md5: {dvc_hash(tmp_path / name)}\n" in text, json.dumps(text)


def test_every_pattern_of_dvcignore_is_passed_over() -> None:
    lines = (PROJECT / ".dvcignore").read_text().splitlines()
    patterns = {line for line in lines if line and not line.startswith(("#", "/"))}
    assert patterns <= set(IGNORED)
