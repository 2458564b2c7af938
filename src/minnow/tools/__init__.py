"""Tools that a model may call without danger: a calculator, a clock, a look-up, and Python in a closed room."""

from minnow.tools.calculator import CALCULATOR, calculate
from minnow.tools.clock import CLOCK
from minnow.tools.lookup import lookup_tool
from minnow.tools.tool import Tool, ToolError, call_tool

__all__ = ["CALCULATOR", "CLOCK", "Tool", "ToolError", "calculate", "call_tool", "lookup_tool"]
