"""How raw rows are read beyond their format: comparisons of responses, scores as labels, a template for prompts."""

import re
from string import Formatter
from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt
from pydantic import Discriminator, Field, Tag, model_validator

from stages.lib.command.json_schema import LARGEST_NUMBER
from stages.lib.settings.bounds import NotNegative, Several, Text
from stages.lib.settings.declaration import Settings, key

RESPONSES_SAYS = "columns of the responses, or the one column that holds a list of them"
TEXT_KEY_SAYS = "key of a response's text or messages, where responses are objects; null: they are texts or messages"
# What a cell may say of who won. YAML's 0, "0" and true are told apart here, and meant alike in a table without types.
WinnerValue = Annotated[
    Annotated[bool, Tag("bool")] | Annotated[int, Ge(-(2**63)), Lt(2**63), Tag("int")] | Annotated[Text, Tag("str")],
    Discriminator(lambda value: type(value).__name__),
]
NAME_OF_RANKS = re.compile(r"(?:^|[^A-Za-z])rank|Rank|(?:^|[^A-Z])RANK")
Score = Annotated[float, Ge(-LARGEST_NUMBER), Le(LARGEST_NUMBER)]


class PairSettings(Settings):
    """Which pairs are made of responses that can be compared, and what their margins say."""

    pairs: Literal["all", "best_against_worst"] = key(
        "all", "all: of every two responses | best_against_worst: one pair a prompt, the first of those alike"
    )
    least_gap: NotNegative = key(
        0.0, "leave out pairs that are nearer, counted", unit="of scores, ranks, or votes for one and the other"
    )
    ties: Literal["drop", "keep"] = key(
        "drop",
        "drop: no pair of two responses that are alike, counted | keep: two pairs, one in each order, which pull them "
        "together, counted",
    )
    margin: Literal["none", "gap"] = key("none", "gap: the pair's margin is the gap | none: it has none")


# What a comparison says where its responses get labels, and nothing obeys it.
WITHOUT_PAIRS_OF_THEM = {"pairs": "all", "least_gap": 0.0, "ties": "drop", "margin": "none"}


class WinnerComparison(PairSettings):
    """Two responses, and one or several columns that say which is better."""

    type: Literal["winner"] = key("winner", "two responses, and columns that say which is better")
    responses: Several[Text] = key(["response_0", "response_1"], RESPONSES_SAYS)
    text_key: Text | None = key(None, TEXT_KEY_SAYS)
    winner: Several[Text] = key(["better_response_id"], "columns of a vote each; one may hold a list of votes")
    first: Several[WinnerValue] = key([0], "what a vote for the first response says; [] with names")
    second: Several[WinnerValue] = key([1], "what a vote for the second response says; [] with names")
    tie: Several[WinnerValue] = key([], "what a vote for neither says")
    names: Several[Text] = key(
        [], "two columns of the responses' names, where votes are names of a row's own (model_a, model_b); [] otherwise"
    )

    @model_validator(mode="after")
    def _check(self) -> "WinnerComparison":
        if len(self.responses) not in (1, 2):
            raise ValueError("responses must name two columns, or the one that holds a list of two")
        if not self.winner or len(set(self.winner)) < len(self.winner):
            raise ValueError("winner must name each column that says which response is better, once")
        if self.names and (len(self.names) != 2 or self.first or self.second):
            raise ValueError("names must be two columns, and first and second [] beside them")
        if not self.names and not (self.first and self.second):
            raise ValueError(
                "first and second must say which values of winner stand for which response (such as [0] and [1], or "
                "[A] and [B]): an index may count from 0 or from 1"
            )
        said = [in_a_cell(value) for value in (*self.first, *self.second, *self.tie)]
        if len(set(said)) < len(said):
            raise ValueError("first, second and tie must hold different values: each vote is for one of them")
        return self


class ScoredComparison(PairSettings):
    """Several responses, each with a score, a rating, a number of votes or a rank."""

    type: Literal["scores"] = key("scores", "several responses, each with a score, rating, rank or number of votes")
    responses: Several[Text] = key(["responses"], RESPONSES_SAYS)
    text_key: Text | None = key(None, TEXT_KEY_SAYS)
    scores: Several[Text] = key(
        ["scores"], "columns of the scores, in the order of responses, or the one that holds a list of them"
    )
    score_key: Text | None = key(None, "key of the score, where responses are objects that hold it; scores [] then")
    best: Literal["highest", "lowest"] | None = key(
        None, "which score is the best; lowest: ranks, where 1 is the best; null: highest, of scores not named rank"
    )

    @model_validator(mode="after")
    def _check(self) -> "ScoredComparison":
        ranks = [name for name in (*self.scores, self.score_key or "") if NAME_OF_RANKS.search(name)]
        if self.best is None and ranks:
            raise ValueError(
                f"best must say which '{ranks[0]}' is the best: lowest where 1 is the first place, or highest"
            )
        if not self.responses:
            raise ValueError("responses must name at least one column")
        if (self.score_key is None) == (not self.scores):
            raise ValueError("scores stand in columns (scores) or in the responses themselves (score_key): name one")
        if self.score_key is not None and self.text_key is None:
            raise ValueError("text_key must name the text of a response that holds its score")
        if self.scores and len(self.scores) != len(self.responses):
            raise ValueError("scores must name as many columns as responses")
        return self


class OrderedComparison(PairSettings):
    """Several responses in the order of a ranking."""

    type: Literal["order"] = key("order", "several responses in ranked order")
    responses: Several[Text] = key(["responses"], RESPONSES_SAYS)
    text_key: Text | None = key(None, TEXT_KEY_SAYS)
    best: Literal["first", "last"] = key("first", "where the best response stands")

    @model_validator(mode="after")
    def _check(self) -> "OrderedComparison":
        if not self.responses:
            raise ValueError("responses must name at least one column")
        return self


class TreeComparison(PairSettings):
    """A tree of messages in which the replies to one message are ranked (OpenAssistant, arXiv 2304.07327)."""

    type: Literal["tree"] = key("tree", "a tree of messages, the replies to each ranked")
    root: Text | None = key("prompt", "column of the first message; null: the row is that message itself")
    text_key: Text = key("text", "key of a message's text")
    role_key: Text = key("role", "key of its role")
    replies_key: Text = key("replies", "key of the list of replies to it")
    rank_key: Text = key("rank", "key of its rank among its siblings")
    best: Literal["highest", "lowest"] = key("lowest", "which rank is the best")
    id_key: Text | None = key(
        None, "where each row is one message of a flat file: column of its id; null: a row is a tree"
    )
    parent_key: Text | None = key(None, "column of the id of the message it replies to; null as id_key")

    @model_validator(mode="after")
    def _check(self) -> "TreeComparison":
        if (self.id_key is None) != (self.parent_key is None):
            raise ValueError("id_key and parent_key go together: both null, or both columns of a flat file")
        if self.id_key is not None and self.root is not None:
            raise ValueError("root must be null with id_key: each row of a flat file is a message")
        return self


Comparison = Annotated[
    WinnerComparison | ScoredComparison | OrderedComparison | TreeComparison, Field(discriminator="type")
]


class Threshold(Settings):
    """Scores become the labels of unpaired data."""

    score: Text | None = key(
        "score", "column of a reply's score; null with a comparison of type scores, whose scores are taken"
    )
    good_from: Score = key(4.0, "at least this score: label true", unit="of the scores")
    bad_below: Score = key(4.0, "below this score: label false; what lies between is left out", unit="of the scores")

    @model_validator(mode="after")
    def _check(self) -> "Threshold":
        if self.bad_below > self.good_from:
            raise ValueError("bad_below must be at most good_from: a score would be good and bad")
        return self


class ReadingOptions(Settings):
    """How the rows of a source are read beyond their format."""

    input_template: Text | None = key(
        None,
        "put prompts that are texts into this text, at its one {} ({{ and }} are braces); null: as they are",
    )
    comparison: Comparison | None = key(None, "where a row compares responses: how; null: it does not")
    threshold: Threshold | None = key(None, "make unpaired data of scores; null: no")

    @model_validator(mode="after")
    def _check(self) -> "ReadingOptions":
        if self.input_template is not None:
            refuse_unusable_template(self.input_template)
        if self.threshold is not None:
            scored = isinstance(self.comparison, ScoredComparison)
            if self.comparison is not None and not scored:
                raise ValueError("threshold is for scores: null with a comparison of another type")
            if scored != (self.threshold.score is None):
                raise ValueError("threshold.score must be a column, and null with a comparison of type scores")
            asked_for = self.comparison.model_dump() if self.comparison is not None else {}
            if scored and (asked_for != asked_for | WITHOUT_PAIRS_OF_THEM or asked_for["best"] == "lowest"):
                raise ValueError(
                    "threshold makes no pairs: in comparison leave pairs all, least_gap 0, ties drop, margin none and "
                    "best null or highest"
                )
        return self


def refuse_unusable_template(template: str) -> None:
    """Raise a ValueError unless a template holds exactly one `{}`."""
    if "\\n" in template:
        raise ValueError("input_template holds a backslash and an n: write it between double quotes for a line break")
    try:
        fields = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(template)]
    except ValueError as error:
        raise ValueError(f"input_template: {error}; {{{{ and }}}} stand for braces") from None
    places = [field for field in fields if field[0] is not None]
    if places != [("", "", None)]:
        raise ValueError(f"input_template must hold exactly one {{}}, where the prompt goes: found {template!r}")


def in_a_cell(value: object) -> str:
    """A vote as it is compared: true, 1, 1.0 and "1" are written in one way each, whatever a table made of them."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = str(value).strip()
    whole, dot, rest = text.partition(".")
    if dot and rest.strip("0") == "" and whole.lstrip("-").isdigit():
        return whole
    return text.lower() if text in ("True", "False") else text
