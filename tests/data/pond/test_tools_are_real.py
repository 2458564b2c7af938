"""What the pond's tool conversations say is what the tools say when they are called."""

import itertools

from minnow.data.pond.relations import LANGUAGES, RELATIONS
from minnow.data.pond.tools import TOOLS, episodes
from minnow.data.pond.world import World
from minnow.tools import CALCULATOR, call_tool, lookup_tool


def test_every_result_is_the_tools_own():
    world = World.generate(0, creatures=20, held_out=6)
    table = {c.name(lang): {r: c.fact(r, lang) for r in RELATIONS} for c in world.creatures for lang in LANGUAGES}
    tools = (CALCULATOR, lookup_tool(table))
    assert tuple(tool.schema for tool in tools) == TOOLS
    for language in LANGUAGES:
        for episode in itertools.islice(episodes(world, "held_out", language), 100):
            assert tuple(call_tool(tools, call) for call in episode.calls) == episode.results
