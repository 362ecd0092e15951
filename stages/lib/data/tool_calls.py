"""Calls and descriptions of tools, in the shape that chat templates take: OpenAI's, with arguments as objects."""

from collections.abc import Mapping
from typing import Any

from stages.lib.command.errors import StageError
from stages.lib.command.jsonl import parse_json
from stages.lib.data.cell_values import value_in_cell
from stages.lib.data.row_errors import MalformedRowError

OF_THE_RENDERER = ("messages", "tools", "add_generation_prompt", "chat_template", "conversations", "documents")


def calls_from(value: Any, where: str) -> list[dict[str, Any]]:
    """The calls of a message: `[{"type": "function", "function": {"name", "arguments": an object}, "id"?}]`.

    OpenAI's own files hold the arguments as JSON text, which a template would quote a second time.

    Args:
        value: calls as OpenAI, TRL or ShareGPT have them, one or a list; ShareGPT's are JSON text.
    Raises:
        MalformedRowError: not JSON, a call without a name, arguments that are no object.
    """
    value = from_json_text(value, where)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise MalformedRowError(f"{where}: expected a call, found an empty list", "bad_tool_calls")
    return [call_from(call, f"{where}, call {number}") for number, call in enumerate(calls, start=1)]


def call_from(value: Any, where: str) -> dict[str, Any]:
    function = function_in(value, where, "bad_tool_calls")
    arguments = function.get("arguments")
    arguments = {} if arguments in (None, "") else from_json_text(arguments, f"{where}, 'arguments'")
    if not isinstance(arguments, dict):
        found = type(arguments).__name__
        raise MalformedRowError(
            f"{where}, 'arguments': expected an object, or one as JSON text, found {found}", "bad_tool_calls"
        )
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return call | ({"id": value["id"]} if isinstance(value.get("id"), str) else {})


def tools_from(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Descriptions of tools, of a list or of its text; None where there are none.

    A bare function (LLaMA-Factory's) is put into its `{"type": "function", "function": …}`.

    Raises:
        MalformedRowError: anything else, or a tool without a name.
    """
    tools = in_cell(value, where)
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise MalformedRowError(f"{where}: expected a list of tools, found {type(tools).__name__}", "bad_tools")
    functions = [
        function_in(tool, f"{where}, tool {number}", "bad_tools") for number, tool in enumerate(tools, start=1)
    ]
    return [
        tool if tool is not function else {"type": "function", "function": function}
        for tool, function in zip(tools, functions, strict=True)
    ]


def function_in(value: Any, where: str, reason: str) -> dict[str, Any]:
    """The function of a call or a tool, which may be that function itself."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise MalformedRowError(f"{where}: expected a function with a 'name'", reason)
    return function


def object_from(value: Any, where: str) -> dict[str, Any] | None:
    """An object, or its text; None where there is none. Raises MalformedRowError for anything else."""
    value = in_cell(value, where)
    if value is not None and not isinstance(value, dict):
        raise MalformedRowError(f"{where}: expected an object, found {type(value).__name__}", "not_an_object")
    return value or None


def refuse_arguments_of_the_renderer(arguments: Mapping[str, Any], where: str) -> None:
    """Raise a MalformedRowError for an argument of a chat template that a row cannot give."""
    for name in OF_THE_RENDERER:
        if name in arguments:
            raise MalformedRowError(f"{where}: '{name}' cannot be given so; leave it out", "bad_template_argument")


def in_cell(value: Any, where: str) -> Any:
    """The value that a text holds, None for an empty one; any other value as it is."""
    if not isinstance(value, str):
        return value
    return value_in_cell(value, where) if value.strip() else None


def from_json_text(value: Any, where: str) -> Any:
    """The value of JSON text; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, where)
    except StageError as error:
        raise MalformedRowError(str(error), "bad_tool_calls") from None
