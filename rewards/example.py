"""Rewards of your own: a function for one response, which is called in a process of its own.

    rewards:
      brief:
        type: function
        path: rewards/example.py:score
        …

It names as arguments what it wants to know of a response:

    prompt          messages, [{"role": …, "content": …}, …], or the text of a prompt without any
    completion      text, without EOS
    prompt_ids, completion_ids
    ended           with EOS, rather than at the limit of new tokens
    sample          which of the prompt's samples it is, from 0
    row, source     of the prompts' table
    facts           what the row says besides, such as an answer

and returns a number, the higher the better, or None where it has no say. An `async` function is called for several
responses at once. It may import packages, and other files of this folder (`from rewards.other import …`).
"""

COMFORTABLE = range(12, 29)  # words


def score(completion: str) -> float:
    """1 for a text of a comfortable length, and less with each word that is missing or too many."""
    words = len(completion.split())
    outside = max(COMFORTABLE.start - words, words - COMFORTABLE.stop + 1, 0)
    return 1.0 - outside / 10
