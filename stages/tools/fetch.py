"""Download every item of the Hugging Face Hub that params.yaml names, and compare each file with what the Hub says.

Data sets of `sources.hub` and models of `prepare_base.hub` and `fetch_model` are then in the Hub's cache ($HF_HOME),
and a pipeline runs without a network: HF_HUB_OFFLINE=1 make repro. What is there already is not downloaded, but
compared, too.

    python -m stages.tools.fetch
"""

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from stages.lib.command.errors import StageError, one_line
from stages.lib.command.params import read_params, read_value
from stages.lib.command.run import USER_ERROR_EXIT_CODE, run
from stages.lib.data.hub_data import HubData, hub_files_of
from stages.lib.data.hub_files import Repository, bring, without_network, write_record
from stages.lib.models.given_model import hub_patterns
from stages.lib.settings.fetch_model import HubModel
from stages.lib.settings.prepare_base import PrepareBase
from stages.lib.settings.sources import Sources

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

MIB = 2**20


class HubItem(NamedTuple):
    """Something of the Hub that params.yaml names."""

    key: str  # in params.yaml
    repository: Repository
    data: HubData | None  # None of a model


def main() -> None:
    """Fetch what params.yaml names of the Hub."""
    if without_network():
        raise StageError("HF_HUB_OFFLINE is set, so nothing can be fetched; unset it")
    trust_remote_code = read_value("trust_remote_code", bool)
    items = [*named_items()]
    if not items:
        print("params.yaml names nothing of the Hub")
    failed = 0
    for number, item in enumerate(items, start=1):
        print(
            f"{number}/{len(items)} {item.key}: {item.repository.name} at {item.repository.revision[:12]}", flush=True
        )
        try:
            files = fetch(item, trust_remote_code=trust_remote_code)
        except StageError as error:
            failed += 1
            print(f"error: params.yaml: {item.key}: {one_line(str(error))}", file=sys.stderr, flush=True)
            continue
        size = sum(file.size for file in files)
        print(f"{number}/{len(items)} {item.key}: {len(files)} files, {size / MIB:,.1f} MiB, as the Hub has them")
    if failed:
        sys.exit(USER_ERROR_EXIT_CODE)


def named_items() -> Iterator[HubItem]:
    """All that params.yaml names of the Hub."""
    for name, source in read_params("sources", Sources).hub.items():
        yield HubItem(f"sources.hub.{name}", source.data.repository, source.data)
    for name, model in read_params("prepare_base", PrepareBase).hub.items():
        yield HubItem(f"prepare_base.hub.{name}", Repository("model", model.model, model.revision), None)
    for name, model in read_params("fetch_model", dict[str, HubModel]).items():
        yield HubItem(f"fetch_model.{name}", Repository("model", model.model, model.revision), None)


def fetch(item: HubItem, *, trust_remote_code: bool) -> Sequence["RepoFile"]:
    """Bring an item into the cache. Returns its files. Raises StageError if that cannot be done."""
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # a line is printed for each file
    repository, data = item.repository, item.data
    if data is not None and data.streaming:
        raise StageError("its rows are streamed at each run and never kept: set streaming: false to fetch it")
    try:
        if data is None:
            files = model_files(repository, trust_remote_code=trust_remote_code)
        else:
            files = hub_entries(repository, hub_files_of(data))
        for file in files:
            again = bring(repository, file)
            told = ", was damaged and is fetched again" if again else ""
            print(f"    {file.path}: {file.size / MIB:,.1f} MiB{told}", flush=True)
    except StageError:
        raise
    except Exception as error:  # of many unrelated types: from the network, the Hub's answers and the disk
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise StageError(f"cannot be fetched ({reason}); check the name, the revision and the network") from None
    if data is not None:
        write_record(repository, data.part, files)
    return files


def model_files(repository: Repository, *, trust_remote_code: bool) -> list["RepoFile"]:
    """The files of a model that its stage would download."""
    from huggingface_hub import HfApi, RepoFile
    from huggingface_hub.utils import filter_repo_objects

    tree: Any = HfApi().list_repo_tree(repository.name, recursive=True, revision=repository.revision)
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    kept = filter_repo_objects(files, allow_patterns=hub_patterns(trust_remote_code=trust_remote_code))
    found = [files[path] for path in kept]
    if not any(file.path.endswith(".safetensors") for file in found):
        raise StageError("there are no weights in safetensors files, and no others are read")
    return found


def hub_entries(repository: Repository, paths: Sequence[str]) -> list["RepoFile"]:
    """What the Hub says of these files."""
    from huggingface_hub import HfApi

    found: Any = HfApi().get_paths_info(
        repository.name, list(paths), repo_type=repository.kind, revision=repository.revision
    )
    missing = sorted(set(paths) - {file.path for file in found})
    if missing:
        raise StageError(f"the Hub has no file {missing[0]} at this revision")
    return list(found)


if __name__ == "__main__":
    run(main)
