"""Whether a response has a form; runs in a worker process, since an expression may search without end."""

import re


def score_form(completion: str, pattern: str) -> float:
    """1.0 if the expression matches the whole response, else 0.0."""
    return float(re.fullmatch(pattern, completion, re.DOTALL) is not None)
