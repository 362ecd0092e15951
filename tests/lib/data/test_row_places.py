"""Where rows go: each rule by hand on a few rows, and as a law on many."""

from collections import Counter

import pytest

from stages.lib.command.errors import StageError
from stages.lib.data.prompt_digests import digests_of_row
from stages.lib.data.row_places import DrawnShare, RowPlaces, sizes_of_shares
from tests.lib.data.test_prompt_digests import turns


class Row:
    """A row of kind prompts unless another is said: a prompt given as 'a b c' (user, assistant, user)."""

    def __init__(self, talk, split=None, source=0, kind="prompts", content=None):
        self.talk, self.split, self.source, self.kind = talk, split, source, kind
        self.content = (content or f"{kind} {talk}").encode()


def fates(rows, folder, *, seed=1, shares=None, names=("one", "two"), **fractions):
    """What becomes of each row; `fractions` are of test and validation."""
    path = folder / f"places-{len(list(folder.iterdir()))}"
    with RowPlaces(path) as places:
        for row in rows:
            digests = digests_of_row({"prompt": turns(row.talk)}, seed)
            places.add(row.source, row.kind, row.split, digests, row.content)
        places.divide(fractions)
        if shares is not None:
            places.draw(shares, names, seed)
        found = list(places.fates())
        assert sum(places.counts().values()) == len(rows) == len(found)
    return found


def places_of(talks, folder, **arguments):
    """Talk → its split."""
    return dict(zip(talks, fates([Row(talk) for talk in talks], folder, **arguments), strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_conversations_that_go_on_from_one_another_stand_on_one_side(tmp_path, seed):
    talks = [f"{n} x {n}{tail}" for n in range(10) for tail in ("", "a", "a y z", "b", "b y z")]
    talks += [str(n) for n in range(10)]
    found = places_of(talks, tmp_path, seed=seed, test=0.3, validation=0.2)
    sides = {n: {found[talk] for talk in talks if talk.split()[0] == str(n)} for n in range(10)}
    assert all(len(side) == 1 for side in sides.values())
    # Three and two tenths of 60 prompts, in whole groups of 6.
    assert Counter(found.values()) == {"train": 30, "test": 18, "validation": 12}


def test_conversations_that_only_begin_alike_are_apart(tmp_path):
    """What they share is no prompt of the data: nothing of one is the beginning of the other."""
    assert set(places_of(["hello hi tea", "hello hi milk"], tmp_path, test=0.5).values()) == {"train", "test"}


def test_a_group_keeps_its_place_when_others_come(tmp_path):
    few, more = ([f"{n} x {n}" for n in range(count)] for count in (100, 110))
    before, after = places_of(few, tmp_path, test=0.2), places_of(more, tmp_path, test=0.2)
    assert sum(before[talk] == after[talk] == "test" for talk in few) >= 17


def test_the_groups_held_out_are_those_of_small_digests(tmp_path):
    talks = [str(n) for n in range(100)]
    digest_of = {talk: digests_of_row({"prompt": turns(talk)}, 1)[-1] for talk in talks}
    found = places_of(talks, tmp_path, test=0.2, validation=0.1)
    in_order = [found[talk] for talk in sorted(talks, key=digest_of.get)]
    assert in_order == ["test"] * 20 + ["validation"] * 10 + ["train"] * 70


def test_a_group_larger_than_the_part_to_hold_out_stays_in_train(tmp_path):
    words = [str(n) for n in range(21)]
    parts = [" ".join(words[: 2 * n + 1]) for n in range(11)]
    for seed in range(5):
        found = places_of([*parts, "a", "b c d"], tmp_path, seed=seed, test=0.15)
        assert {talk for talk, place in found.items() if place == "test"} == {"a", "b c d"}
    found = places_of([*parts, "a", "a c d"], tmp_path, test=0.05)  # less than any group: the smallest one
    assert {talk for talk, place in found.items() if place == "test"} == {"a", "a c d"}


@pytest.mark.parametrize(("count", "fraction", "expected"), [(100, 0.1, 10), (7, 0.01, 1), (2, 0.9, 1), (10, 0.99, 9)])
def test_the_held_out_part_has_the_size_asked_for_and_leaves_one_on_each_side(tmp_path, count, fraction, expected):
    found = places_of([str(n) for n in range(count)], tmp_path, test=fraction)
    assert Counter(found.values())["test"] == expected


def test_each_of_three_sides_gets_a_prompt(tmp_path):
    for seed in range(5):
        found = places_of("abc", tmp_path, seed=seed, test=0.9, validation=0.05)
        assert sorted(found.values()) == ["test", "train", "validation"]
    message = "2 distinct prompts in 2 groups cannot be divided among train and test and validation"
    with pytest.raises(StageError, match=message):
        places_of("ab", tmp_path, test=0.1, validation=0.1)
    with pytest.raises(StageError, match="1 distinct prompt in 1 group cannot be divided among train and test"):
        places_of("a", tmp_path, test=0.5)
    assert set(places_of("a", tmp_path, test=0.0, validation=0.0).values()) == {"train"}


def test_the_draw_depends_on_the_seed_and_not_on_the_order(tmp_path):
    talks = [str(number) for number in range(200)]
    drawn = {
        seed: {talk for talk, place in places_of(talks, tmp_path, seed=seed, test=0.5).items() if place == "test"}
        for seed in (1, 2)
    }
    assert 30 < len(drawn[1] & drawn[2]) < 70  # half of 100 in common if independent, standard deviation 3.5
    assert places_of(talks[::-1], tmp_path, test=0.5) == places_of(talks, tmp_path, test=0.5)


def test_a_source_s_own_split_claims_its_prompts_test_first(tmp_path):
    rows = [
        Row("a", "train"),
        Row("b", "train"),
        Row("b", "validation", source=1),
        Row("a", "test", source=1),
        Row("b x c", "test", source=1),  # goes on from b
        Row("d", "train"),
        Row("d", source=1),
        Row("e x f", source=1),
        Row("g x h", "validation"),
        Row("g x h y i", source=1),  # goes on from a validation prompt, and no source says where it belongs
    ]
    assert fates(rows, tmp_path, test=0.0) == [
        "in_test",
        "in_test",
        "in_test",
        "test",
        "test",
        "train",
        "duplicate",
        "train",
        "validation",
        "in_validation",
    ]


def test_given_splits_take_no_part_in_the_draw(tmp_path):
    free, fixed = [str(n) for n in range(50)], [f"fixed{n}" for n in range(30)]
    alone = places_of(free, tmp_path, test=0.2, validation=0.1)
    rows = [Row(talk, "test", source=1) for talk in fixed] + [Row(talk) for talk in free]
    assert fates(rows, tmp_path, test=0.2, validation=0.1) == ["test"] * 30 + list(alone.values())


def test_of_equal_rows_of_a_kind_the_first_stays(tmp_path):
    rows = [
        Row("a", kind="sft", content="x"),
        Row("a", kind="sft", content="y"),
        Row("a", kind="sft", content="x", source=1),
        Row("a", kind="preference", content="x", source=1),
    ]
    assert fates(rows, tmp_path) == ["train", "train", "duplicate", "train"]


@pytest.mark.parametrize(
    ("there", "shares", "expected"),
    [
        (
            (100, 100),
            (DrawnShare(1.0), DrawnShare(3.0)),
            (33, 100),
        ),  # the second is used up at 100 / 3 a unit of weight
        ((100, 900), (DrawnShare(1.0), DrawnShare(3.0)), (100, 300)),
        ((7, 7), (DrawnShare(0.1), DrawnShare(0.3)), (2, 7)),
        ((100, 100), (DrawnShare(2.0), DrawnShare()), (100, 100)),
        ((100, 100), (DrawnShare(rows=30), DrawnShare(rows=300)), (30, 100)),
        ((100, 40), (DrawnShare(1.0), DrawnShare(1.0)), (40, 40)),
    ],
)
def test_sizes_of_a_mixture_by_hand(there, shares, expected):
    found = sizes_of_shares(dict(enumerate(there)), dict(enumerate(shares)))
    assert tuple(found.values()) == expected


def mixed(folder, count=200, **arguments):
    rows = [Row(f"{source}-{n}", source=source) for source in (0, 1) for n in range(count)]
    shares = {0: DrawnShare(1.0), 1: DrawnShare(4.0)}
    return rows, fates(rows, folder, shares=shares, **arguments)


def test_a_mixture_is_drawn_by_weight_from_train_alone_and_the_same_each_time(tmp_path):
    rows, found = mixed(tmp_path, test=0.1)
    counts = Counter((row.source, fate) for row, fate in zip(rows, found, strict=True))
    train = {source: counts[source, "train"] + counts[source, "not_drawn"] for source in (0, 1)}
    assert counts[1, "train"] == train[1]
    assert counts[0, "train"] == train[1] // 4
    assert counts[0, "test"] + counts[1, "test"] == 40
    assert mixed(tmp_path, test=0.1)[1] == found


def test_the_rows_drawn_are_another_sample_with_another_seed_and_hardly_move_when_rows_come(tmp_path):
    def drawn(**arguments):
        rows, found = mixed(tmp_path, **arguments)
        return {row.talk for row, fate in zip(rows, found, strict=True) if row.source == 0 and fate == "train"}

    first, other, more = drawn(), drawn(seed=2), drawn(count=220)
    assert len(first) == len(other) == 50
    assert len(first & other) < 25  # 12.5 if independent
    assert len(first & more) >= 40


def test_rows_left_out_by_number_are_counted_and_not_drawn(tmp_path):
    with RowPlaces(tmp_path / "places") as places:
        for n in range(4):
            places.add(0, "sft", None, [bytes([n])], bytes([n]))
        places.divide({})
        places.leave_out([1, 2], "near_duplicate")
        places.draw({0: DrawnShare(rows=1)}, ["one"], 1)
        found = list(places.fates())
    assert found[1:3] == ["near_duplicate"] * 2
    assert sorted((found[0], found[3])) == ["not_drawn", "train"]
