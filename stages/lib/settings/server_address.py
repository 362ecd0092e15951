"""Where a server is, as runtime.yaml says it."""

from urllib.parse import urlsplit


def require_address(address: str, example: str) -> None:
    """Raise ValueError for what is not an http or https address, or holds a password."""
    try:
        parts = urlsplit(address)
        is_known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        has_password = bool(parts.username or parts.password)
    except ValueError:
        is_known = has_password = False
    if has_password:
        raise ValueError("address must hold no password: name an environment variable in token_variable")
    if not is_known:
        raise ValueError(f"address must be such as {example}, found {address!r:.100}")
