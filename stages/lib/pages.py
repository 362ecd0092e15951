"""Self-contained HTML pages: one file, no script, nothing fetched, every value escaped."""

from pathlib import Path
from typing import Any

TEMPLATES = Path(__file__).parent.parent / "templates"
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


def write_page(path: Path, page: str) -> None:
    """Write a page as UTF-8. Half a surrogate pair, which model text can hold, has no UTF-8: it becomes a reference."""
    path.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
