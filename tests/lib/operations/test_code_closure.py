"""Manifests of code: what can change a result changes a hash, and nothing else does."""

import io
import tokenize
from pathlib import Path

import pytest

from stages.lib.operations import code_closure
from stages.lib.operations.code_closure import closure, manifest_of, read_source
from tests.real_files import PROJECT

MODULE = '''"""What it is."""

import json  # for rows


class Loss:
    """The loss."""

    def __call__(self, x):
        """Returns it."""
        text = "# not a comment"
        table = """
one

two"""
        # why
        return json.dumps([x, text, table])
'''


@pytest.fixture
def hash_of(tmp_path: Path):
    def of(text: str) -> str:
        (tmp_path / "module.py").write_text(text, encoding="utf-8")
        return read_source(tmp_path / "module.py").hash

    return of


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # for rows", ""),
        ("# why", "# why not: ''' and \""),
        ("        # why\n", ""),
        ("What it is.", "What it is, in full: # and 'quotes'.\n\nMore."),
        ('    """The loss."""\n\n', ""),
        ('        """Returns it."""\n', ""),
        ("import json", "\n\nimport json"),
        ("\n\nclass", "\n\n\n\n   \nclass"),
    ],
)
def test_remarks_and_blank_lines_do_not_count(hash_of, old: str, new: str) -> None:
    assert old in MODULE
    assert hash_of(MODULE.replace(old, new)) == hash_of(MODULE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# not a comment", "# a comment"),
        ("one\n\ntwo", "one\ntwo"),
        ("one\n\ntwo", "one\n  \ntwo"),
        ("[x, text", "[text, x"),
        ("        return json", "        if x:\n            return json"),
        ("import json", "import json as other"),
        ('        text = "# not', '        "a statement"\n        text = "# not'),
    ],
)
def test_code_and_strings_count(hash_of, old: str, new: str) -> None:
    assert old in MODULE
    assert hash_of(MODULE.replace(old, new)) != hash_of(MODULE)


def test_comments_and_strings_are_found_as_the_tokenizer_finds_them() -> None:
    files = sorted((PROJECT / "stages").rglob("*.py"))
    assert len(files) > 60
    for file in files:
        text = file.read_text(encoding="utf-8")
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        expected = [
            token.string.lstrip("rbfRBF") for token in tokens if token.type in (tokenize.COMMENT, tokenize.STRING)
        ]
        assert code_closure._COMMENT_OR_STRING.findall(text) == expected, file


def project(folder: Path, **modules: str) -> Path:
    (folder / "stages/lib/operations").mkdir(parents=True)
    (folder / "stages/templates").mkdir()
    for name, text in modules.items():
        (folder / f"stages/{name.replace('__', '/')}.py").write_text(text)
    return folder


def test_the_closure_holds_what_is_imported_late_and_the_templates_that_are_named(tmp_path: Path) -> None:
    root = project(
        tmp_path,
        train="from stages.lib import one\ndef main():\n    if one:\n        import stages.lib.two\n",
        lib__one="import os\nfrom stages.lib.three import x\n",
        lib__two="PAGE = 'page.jinja'\n",
        lib__three="x = 1\n",
        lib__four="from stages.lib import one\n",
    )
    for name in ("page", "other"):
        (root / f"stages/templates/{name}.jinja").write_text(name)
    lib = ("stages/lib/one.py", "stages/lib/three.py", "stages/lib/two.py")
    assert closure(["stages/train.py"], root) == [*lib, "stages/templates/page.jinja", "stages/train.py"]


def test_a_manifest_passes_through_what_is_left_out_without_naming_it(tmp_path: Path) -> None:
    root = project(
        tmp_path,
        train="import stages.lib.operations.progress\n",
        lib__operations__progress="import stages.lib.one\n",
        lib__one="x = 1\n",
    )
    assert [line.split()[1] for line in manifest_of("stages/train.py", root).splitlines()] == [
        "stages/lib/one.py",
        "stages/train.py",
    ]
