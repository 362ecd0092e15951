"""Trees of messages in which the replies to one message are ranked, as OpenAssistant's (arXiv 2304.07327)."""

from collections.abc import Iterable, Iterator
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.data.conversations import Message, content_from, number_from, role_from
from stages.lib.data.raw_rows import RawRow
from stages.lib.data.readers.row_place import RowPlace
from stages.lib.data.row_errors import MalformedRowError
from stages.lib.settings.reading import TreeComparison

DELETED = "deleted"  # key of a message that was taken back
Group = tuple[list[list[Message] | str], list[float]]


def ranked_replies(row: RawRow, settings: TreeComparison, place: RowPlace) -> Iterator[Group]:
    """For each message with ranked replies of the assistant: the conversations that end with them, and their scores.

    A reply without a rank, and one that is marked as deleted, is left out and counted. The higher score is the better.

    Raises:
        MalformedRowError: the row holds no tree, or a message lacks a key.
    """
    root = row if settings.root is None else row.get(settings.root)
    waiting: list[tuple[Any, list[Message], str]] = [(root, [], place.where)]
    while waiting:
        node, before, where = waiting.pop()
        path = [*before, tree_message(node, settings, where)]
        replies = node.get(settings.replies_key) or []
        if not isinstance(replies, list):
            raise MalformedRowError(f"{where}, '{settings.replies_key}': expected a list", "not_a_tree")
        group: Group = ([], [])
        for number, reply in enumerate(replies, start=1):
            inner = f"{where}, reply {number}"
            message = tree_message(reply, settings, inner)
            score = tree_score(reply, message, settings, inner, place)
            if score is not None:
                group[0].append([*path, message])
                group[1].append(score)
        if len(group[0]) > 1:
            yield group
        # The first reply's replies come next.
        waiting += [
            (reply, path, f"{where}, reply {number}")
            for number, reply in reversed([*enumerate(replies, start=1)])
            if not reply.get(DELETED)
        ]


def tree_message(node: Any, settings: TreeComparison, where: str) -> Message:
    for key in (settings.text_key, settings.role_key):
        if not isinstance(node, dict) or key not in node:
            found = ", ".join(map(str, node)) if isinstance(node, dict) else type(node).__name__
            raise MalformedRowError(f"{where}: expected a message with '{key}', found {found}", "not_a_tree")
    role = role_from(node[settings.role_key], where)
    return {"role": role, "content": content_from(node[settings.text_key], f"{where}, '{settings.text_key}'")}


def tree_score(
    node: dict[str, Any], message: Message, settings: TreeComparison, where: str, place: RowPlace
) -> float | None:
    """The rank of a reply as a score; None for one that takes no part, which is counted unless it is the user's."""
    if message["role"] != "assistant":
        return None
    rank = node.get(settings.rank_key)
    if node.get(DELETED) or rank is None or rank == "":
        place.counts["responses_left_out/" + ("deleted" if node.get(DELETED) else "no_rank")] += 1
        return None
    number = number_from(rank)
    if number is None:
        raise MalformedRowError(f"{where}, '{settings.rank_key}': expected a number, found {str(rank)!r}", "bad_score")
    return number if settings.best == "highest" else -number


def trees_of_rows(rows: Iterable[tuple[str, RawRow]], settings: TreeComparison) -> Iterator[tuple[str, RawRow]]:
    """Trees, (where, first message), of a flat file whose rows are single messages that name the one they answer.

    All rows are held in memory, since a reply may come before what it answers. Replies keep the order of the rows.

    Raises:
        StageError: a row lacks an id, two have one, a row answers one that is not there, or messages a circle.
    """
    id_key, parent_key = settings.id_key, settings.parent_key
    assert id_key is not None, "else rows are trees already"
    assert parent_key is not None, "the settings have both or neither"
    nodes: dict[Any, tuple[str, RawRow]] = {}
    for where, row in rows:
        identity = row.get(id_key)
        parent = row.get(parent_key)
        for key, value in ((id_key, identity), (parent_key, "none" if parent in (None, "") else parent)):
            if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
                found = "nothing" if value in (None, "") else type(value).__name__
                raise StageError(f"{where}: expected the id of a message in '{key}', found {found}")
        if identity in nodes:
            raise StageError(f"{where}: the id {identity!r} stands twice, first at {nodes[identity][0]}")
        nodes[identity] = (where, {**row, settings.replies_key: []})
    roots = []
    for where, row in nodes.values():
        parent = row.get(parent_key)
        if parent in (None, ""):
            roots.append((where, row))
        elif parent not in nodes:
            raise StageError(f"{where}: it answers the message {parent!r}, which is not among the rows")
        else:
            nodes[parent][1][settings.replies_key].append(row)
    if reached(roots, settings) < len(nodes):
        where = next(iter(nodes.values()))[0]
        raise StageError(f"{where} and the rows after it: messages answer each other in a circle")
    yield from roots


def found_in(value: Any) -> str:
    return "nothing" if value in (None, "") else type(value).__name__


def reached(roots: list[tuple[str, RawRow]], settings: TreeComparison) -> int:
    """The number of messages in the trees."""
    count, waiting = 0, [row for _, row in roots]
    while waiting:
        count += 1
        waiting += waiting.pop()[settings.replies_key]
    return count
