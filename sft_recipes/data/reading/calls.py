"""Tool definitions and calls, brought into the one shape that chat templates and servers share."""

from collections.abc import Mapping
from typing import Any

from sft_recipes.data.reading.json_reader import RowProblem, parse_json, type_name

_CALL = "an object with name and arguments"


def expect(kind: type, value: Any, field: str, what: str) -> Any:
    """The value, which must be of this type; `what` is how messages call what belongs there.

    True and false are no whole numbers, although Python takes them for such.
    """
    is_truth_value = kind is int and isinstance(value, bool)
    if is_truth_value or not isinstance(value, kind):
        raise RowProblem(field, f"expected {what}, got {type_name(value)}", f"write {what}")
    return value


def text_of(value: Any, field: str) -> str:
    """The value, which must be text."""
    return expect(str, value, field, "a string")


def json_value(value: Any, field: str) -> Any:
    """A value that formats may spell as JSON inside a string."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except RowProblem as error:
        what = f"{error.what} in the JSON text"
        raise RowProblem(field, what, "write valid JSON, or the object itself") from error


def tool_calls(value: Any, field: str) -> list[dict[str, Any]]:
    """Calls, nested as OpenAI's or flat, one or a list, in the one shape.

    That is {type: function, id?, function: {name, arguments}}.
    """
    items = json_value(value, field)
    if not isinstance(items, list):
        items = [items]
    calls: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        place = f"{field}[{index}]"
        calls.append(_tool_call(json_value(item, place), place))
    return calls


def _tool_call(item: Any, field: str) -> dict[str, Any]:
    expect(dict, item, field, _CALL)
    function = item.get("function", item)
    expect(dict, function, field, _CALL)
    arguments: Any = {}
    if function.get("arguments") is not None:
        arguments = json_value(function["arguments"], f"{field}.arguments")
    expect(dict, arguments, f"{field}.arguments", "an object with named values")
    call: dict[str, Any] = {"type": "function"}
    if item.get("id") is not None:
        call["id"] = text_of(item["id"], f"{field}.id")
    call["function"] = {
        "name": text_of(function.get("name"), f"{field}.name"),
        "arguments": arguments,
    }
    return call


def tool_definitions(value: Any) -> list[Mapping[str, Any]] | None:
    """Tool definitions in the shape in which servers hand them to templates.

    That is {type: function, function: {...}}.
    """
    if not value or (isinstance(value, str) and value.isspace()):
        return None
    definitions = json_value(value, "tools")
    expect(list, definitions, "tools", "a list of tool definitions")
    tools: list[Mapping[str, Any]] = []
    for index, given in enumerate(definitions):
        field = f"tools[{index}]"
        tool = json_value(given, field)
        expect(dict, tool, field, "an object with name, description and parameters")
        if "name" in tool and "function" not in tool:
            tool = {"type": "function", "function": tool}
        tools.append(tool)
    return tools or None
