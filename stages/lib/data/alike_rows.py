"""Rows that are alike in much and not in all: near duplicates among train rows, and train rows that hold test prompts.

A text is compared by its runs of n words, after `normal` and without punctuation; a character of Chinese, Japanese or
Korean is a word of its own. Both hold digests of runs or of rows in memory: MinHash some
2 KiB for each train row, decontamination some 100 bytes for each run of a test prompt.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from stages.lib.data.prepared_rows import Kind
from stages.lib.data.prompt_digests import normal

if TYPE_CHECKING:
    from stages.lib.settings.prepare_data import Decontamination, NearDuplicates

WITHOUT_SPACES = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"  # scripts
WORD = re.compile(rf"[{WITHOUT_SPACES}]|[^\W{WITHOUT_SPACES}]+")
MOST_OF_BANDS = 0.95  # the highest similarity for which datasketch gives two bands of the fewest permutations
TrainRow = tuple[int, Kind, dict[str, Any]]


def near_duplicates(rows: Iterable[TrainRow], settings: "NearDuplicates", seed: int) -> list[int]:
    """The numbers of rows that nearly are an earlier one of their kind which stays.

    The similarity of two rows, |A ∩ B| / |A ∪ B| of their runs of words, is estimated by MinHash for candidates that
    are found by locality-sensitive hashing in bands (Broder 1997; Indyk and Motwani 1998).
    """
    from datasketch import MinHash, MinHashLSH

    indices: dict[Kind, Any] = {}
    kept: dict[int, Any] = {}
    found = []
    for number, kind, values in rows:
        runs = set(runs_of(whole_text(values), settings.words))
        minhash = MinHash(num_perm=settings.permutations, seed=seed + 1)
        minhash.update_batch(sorted(runs))
        if kind not in indices:  # rather too many candidates than too few; above its most it has but one band
            threshold = min(settings.similarity, MOST_OF_BANDS)
            indices[kind] = MinHashLSH(threshold, settings.permutations, weights=(0.1, 0.9))
        candidates = indices[kind].query(minhash)
        if any(minhash.jaccard(kept[candidate]) >= settings.similarity for candidate in candidates):
            found.append(number)
        else:
            indices[kind].insert(number, minhash)
            kept[number] = minhash
    return found


def contaminated_rows(
    tests: Iterable[dict[str, Any]], rows: Iterable[TrainRow], settings: "Decontamination"
) -> list[int]:
    """The numbers of rows in which at least `overlap` of the runs of words of one test prompt stand."""
    prompts_with: defaultdict[bytes, list[int]] = defaultdict(list)
    sizes: list[int] = []
    short: set[bytes] = set()
    for values in tests:
        text = prompt_text(values)
        runs = set(runs_of(text, settings.words))
        if len(words_of(text)) < settings.words:
            short |= runs
            continue
        for run in runs:
            prompts_with[run].append(len(sizes))
        sizes.append(len(runs))
    found = []
    for number, _kind, values in rows:
        shared = Counter(
            prompt for run in set(runs_of(whole_text(values), settings.words)) for prompt in prompts_with.get(run, ())
        )
        is_short = short and digest_of(" ".join(words_of(prompt_text(values)))) in short
        if is_short or any(count >= settings.overlap * sizes[prompt] for prompt, count in shared.items()):
            found.append(number)
    return found


def runs_of(text: str, length: int) -> Iterator[bytes]:
    """A digest of each run of so many words; of the whole text where it has fewer."""
    words = words_of(text)
    for start in range(max(1, len(words) - length + 1)):
        yield digest_of(" ".join(words[start : start + length]))


def words_of(text: str) -> list[str]:
    return WORD.findall(text)


def digest_of(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def whole_text(values: dict[str, Any]) -> str:
    """All that a row says, in normal form."""
    lists = [values.get(name, ()) for name in ("messages", "prompt", "chosen", "rejected", "completion")]
    contents = [turn["content"] or "" for messages in lists for turn in messages]
    return normal(" ".join([values.get("text", ""), *contents]))


def prompt_text(values: dict[str, Any]) -> str:
    """What is asked in a row, in normal form: what users say, or the text of a row that is one."""
    turns = values.get("messages") or values.get("prompt") or ()
    asked = [turn["content"] or "" for turn in turns if turn["role"] == "user"]
    return normal(" ".join([values.get("text", ""), *asked]))
