from itertools import pairwise

from stages.lib.data.alike_rows import contaminated_rows, near_duplicates, runs_of, words_of
from stages.lib.settings.prepare_data import Decontamination, NearDuplicates


def asked(text):
    return {"prompt": [{"role": "user", "content": text}]}


def test_words_are_without_punctuation_and_one_each_in_scripts_without_spaces():
    assert words_of("don't stop, it's 7.5%!") == ["don", "t", "stop", "it", "s", "7", "5"]
    assert words_of("猫が好きabc です") == ["猫", "が", "好", "き", "abc", "で", "す"]


def test_runs_of_words_by_hand():
    assert len(set(runs_of("a b c d", 3))) == 2
    assert list(runs_of("a b", 3)) == list(runs_of("a, b", 2))
    assert list(runs_of("a b c", 2))[1] == next(iter(runs_of("b c", 2)))


def test_only_equal_rows_are_near_duplicates_at_the_highest_similarity():
    """With any number of permutations: datasketch alone has no bands for it."""
    texts = ["one two three", "one two four", "One, two three!"]
    rows = [(number, "sft", {"text": text}) for number, text in enumerate(texts)]
    for permutations in (16, 128):
        settings = NearDuplicates(similarity=1.0, words=2, permutations=permutations)
        assert near_duplicates(rows, settings, seed=1) == [2]


def test_near_duplicates_agree_with_the_similarity_itself():
    """Against the Jaccard similarity worked out from the sets, away from the threshold by 2 standard errors."""
    words = [f"w{n}" for n in range(100)]
    rows = [(0, "sft", asked(" ".join(words)))]
    similarity = {}
    for changed in range(1, 40):
        other = [*words[:-changed], *(f"x{changed}.{n}" for n in range(changed))]
        one, two = (set(pairwise(text)) for text in (words, other))
        similarity[changed] = len(one & two) / len(one | two)
        rows.append((changed, "preference" if changed == 1 else "sft", asked(" ".join(other))))
    settings = NearDuplicates(similarity=0.7, words=2, permutations=128)
    found = near_duplicates(rows, settings, 1)
    assert 1 not in found  # of another kind
    assert {n for n, value in similarity.items() if value > 0.78 and n > 1} <= set(found)
    assert found == near_duplicates(rows, settings, 1)
    for n in (n for n, value in similarity.items() if value < 0.62):
        assert near_duplicates([rows[0], rows[n]], settings, 1) == []


def test_contamination_counts_the_runs_of_each_test_prompt_for_itself():
    tests = [asked("a b c d e"), asked("p q r s t"), asked("short one")]
    rows = [
        (4, "sft", asked("x a b c y")),  # 1 of the first's 3 runs
        (5, "sft", asked("x a b c d y")),  # 2 of them
        (6, "sft", asked("a b c and p q r")),  # 1 of each
        (7, "sft", asked("Short one!")),
        (8, "sft", asked("short one more")),
    ]
    settings = Decontamination(sources=("test",), words=3, overlap=0.5)
    assert contaminated_rows(tests, rows, settings) == [5, 7]
    assert contaminated_rows(tests, rows, settings.model_copy(update={"overlap": 0.3})) == [4, 5, 6, 7]
