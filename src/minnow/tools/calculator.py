"""A calculator over the syntax tree: numbers and operators, nothing that could run."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from minnow.tools.tool import Tool, ToolError

MAX_CHARACTERS = 200
MAX_POWER = 64
DECIMALS = 10
MAX_DIGITS = 60
"""Larger results are refused: 9**9**9 would otherwise take for ever."""

_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}
_TRANSLATION = str.maketrans({"×": "*", "÷": "/", "−": "-", "（": "(", "）": ")", "^": "**"})
_GROUPS = re.compile(r"(?<=\d)[,，](?=\d{3}(?!\d))")  # 1,000; what 1,5 means nobody knows


def calculate(expression: str) -> str:
    """The value of an expression of numbers with + - * / // % ** and brackets: exact, as an integer or a decimal.

    Decimals are rounded to DECIMALS digits after the point. × ÷ ^ and full-width brackets are understood. Raises
    ToolError.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ToolError(f"the expression has {len(expression)} characters, at most {MAX_CHARACTERS} are allowed")
    try:
        tree = ast.parse(_GROUPS.sub("", expression).translate(_TRANSLATION).strip(), mode="eval")
        value = _value(tree.body)
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ToolError(f"{expression!r} is no expression of numbers and operators") from None
    return _decimal(value)


def _decimal(value: Fraction) -> str:
    # No float on the way: it has 16 digits, and would make up those that follow.
    whole, rest = divmod(round(abs(value) * 10**DECIMALS), 10**DECIMALS)
    sign = "-" if value < 0 and (whole or rest) else ""
    return f"{sign}{whole}.{rest:0{DECIMALS}}".rstrip("0").rstrip(".")


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _small(Fraction(str(node.value)))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            if right.denominator != 1 or abs(right) > MAX_POWER:
                raise ToolError(f"powers are whole numbers up to {MAX_POWER}")
            return _small(left ** int(right))
        if type(node.op) in _OPERATORS:
            return _small(_OPERATORS[type(node.op)](left, right))
    raise ToolError("only numbers, + - * / // % ** and brackets are understood")


def _small(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= 10**MAX_DIGITS:
        raise ToolError("the numbers are too large")
    return value


CALCULATOR = Tool(
    "calculate",
    "Compute an arithmetic expression.",
    {
        "type": "object",
        "properties": {"expression": {"type": "string"}},
        "required": ["expression"],
    },
    calculate,
)
