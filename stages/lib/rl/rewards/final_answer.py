"""Whether a text gives one final answer, and the right one. It imports nothing, since a task grades by it, too."""


def score_final_answer(response: str, answer: str, mark: str) -> float:
    """1.0 if all that follows the first `mark` is the right answer, letter by letter, else 0.0.

    White space around the answer does not count. A response that gives two answers, goes on after its answer or gives
    none is wrong, whatever it says besides.
    """
    _, found, after = response.partition(mark)
    return float(bool(found) and after.strip() == answer)
