"""Self-contained HTML pages: one file, no script, nothing fetched, every value escaped."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.command.outputs import written_whole

TEMPLATES = Path(__file__).parents[2] / "templates"
FRAME = "page.html.jinja"


def render_page(template: str, values: dict[str, Any]) -> str:
    """Fill a template of `stages/templates` that extends the variable `frame`; no name may be lacking."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(frame=FRAME, **values)


def write_page(out: Path, page: str) -> None:
    """Write a page as UTF-8, whole or not at all.

    Half a surrogate pair, which model text can hold, has no UTF-8: it becomes a reference.

    Raises:
        StageError: `out` is a folder.
    """
    if out.is_dir() and not out.is_symlink():  # a link gives way, and what it leads to stays
        raise StageError(f"{out} is a folder, expected an HTML file to write; move the folder away")
    with written_whole(out) as (partial,):
        partial.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")


def joined_names(names: Iterable[str]) -> str:
    """'a, b and c'."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
