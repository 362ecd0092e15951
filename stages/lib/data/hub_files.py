"""Files of the Hugging Face Hub in its library's cache: brought there, compared with what the Hub says, found again.

Of a data set the cache does not know which files belong to it, so `make fetch` leaves a record of them, by which a run
without a network (HF_HUB_OFFLINE=1) reads those files and no others.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from stages.lib.command.errors import StageError
from stages.lib.command.hashing import file_hash, value_hash
from stages.lib.command.jsonl import read_json

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

RepoKind = Literal["model", "dataset"]


class Repository(NamedTuple):
    """A repository of the Hub at one commit."""

    kind: RepoKind
    name: str  # owner/name
    revision: str


def bring(repository: Repository, file: "RepoFile") -> bool:
    """Have a file in the cache as the Hub has it; one that is there and differs is fetched again, once.

    Returns:
        Whether it was fetched again.
    Raises:
        StageError: what was fetched differs, too.
        Exception: of many unrelated types, from the network, the Hub's answers and the disk.
    """
    from huggingface_hub import hf_hub_download

    for again in (False, True):
        path = hf_hub_download(
            repository.name,
            file.path,
            repo_type=repository.kind,
            revision=repository.revision,
            force_download=again,
        )
        if is_as_the_hub_says(Path(path), file):
            return again
    raise StageError(f"{file.path} differs from what the Hub says of it, also after it was fetched again")


def is_as_the_hub_says(path: Path, file: "RepoFile") -> bool:
    """Whether a file has the size and the digest of the Hub: SHA-256 of a large one, else Git's id of its content."""
    if path.stat().st_size != file.size:
        return False
    return file_hash(path) == file.lfs.sha256 if file.lfs else git_blob_id(path) == file.blob_id


def git_blob_id(path: Path) -> str:
    """The SHA-1 by which Git names a file's content."""
    content = path.read_bytes()  # of a file too small to be kept apart from the repository
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def snapshot(repository: Repository) -> Path:
    """The folder of the cache that holds what was fetched of a repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repository.name, repo_type=repository.kind)
    return Path(constants.HF_HUB_CACHE) / folder / "snapshots" / repository.revision


def without_network() -> bool:
    """Whether HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def write_record(repository: Repository, part: Sequence[str | None], files: Sequence["RepoFile"]) -> None:
    """Note that these files, which are in the cache, are all that there is of a data set.

    Args:
        part: what of the repository the data set is: configuration, folder.
    """
    record = _record(repository, part)
    record.parent.mkdir(parents=True, exist_ok=True)
    partial = record.with_suffix(".partial")
    partial.write_text(json.dumps({file.path: file.size for file in files}, sort_keys=True), encoding="utf-8")
    partial.replace(record)


def fetched(repository: Repository, part: Sequence[str | None]) -> tuple[Path, set[str]] | None:
    """The folder of a data set that was fetched, and its files in it; None if one is missing or of another size."""
    record, folder = _record(repository, part), snapshot(repository)
    sizes = read_json(record) if record.is_file() else None
    if not isinstance(sizes, dict):
        return None
    there = [(folder / path).is_file() and (folder / path).stat().st_size == size for path, size in sizes.items()]
    return (folder, set(sizes)) if all(there) else None


def _record(repository: Repository, part: Sequence[str | None]) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "stagewise" / f"{value_hash([*repository, *part])}.json"
