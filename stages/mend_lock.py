"""Cut a `dvc.lock` back to its whole records if DVC was killed while it wrote them (the make targets run this first).

    python -m stages.mend_lock

DVC writes the file in place, from its beginning, each time a stage has run. What is lost by that it then takes from its
run cache, where every result is that a stage has had: nothing is computed again.
"""

from pathlib import Path
from typing import Annotated

import typer

from stages.lib.errors import run


def main(lock: Annotated[Path, typer.Option(help="The file that DVC writes.")] = Path("dvc.lock")) -> None:
    """Remove the record at the end of dvc.lock that is not whole. A file with any other fault is left to DVC."""
    from stages.lib.dvc_lock import cut_back
    from stages.lib.outputs import written_whole

    if not lock.is_file():
        return
    content = lock.read_bytes()
    whole = cut_back(content)
    if whole == content and content:
        return
    if whole:
        with written_whole(lock) as (partial,):
            partial.write_bytes(whole)
    else:
        lock.unlink()
    kept, lines = len(whole.splitlines()), len(content.splitlines())
    typer.echo(
        f"{lock}: DVC was stopped while it wrote it; {kept} of its {lines} lines are whole records and stay; "
        "what other stages made DVC takes from its run cache"
    )


if __name__ == "__main__":
    run(main)
