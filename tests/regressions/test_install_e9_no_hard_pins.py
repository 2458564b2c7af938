"""E9: hard pins of a package that everybody installs beside others conflict on a clean machine."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path


def test_what_users_install_has_lower_bounds_only() -> None:
    """`constraints.txt`, which a user may leave out, says what it was tested with; `dev` is for those who test."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(need for name, needs in extras.items() if name != "dev" for need in needs)]
    assert len(wanted) > 20
    assert [need for need in wanted if not re.fullmatch(r"[\w-]+(>=[\d.]+)?", need)] == []
