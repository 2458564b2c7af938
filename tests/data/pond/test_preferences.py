"""Good and bad answers: true, balanced, and about other names where they are held out."""

from __future__ import annotations

from minnow.data.pond.preferences import preference_pairs, unsure_conversations, visitors
from minnow.data.pond.stories import PHRASEBOOKS
from minnow.data.pond.visitors import VISITORS
from minnow.data.pond.world import World, all_names


def test_the_better_answer_is_the_true_one() -> None:
    world = World.generate(creatures=20, held_out=8)
    by_name = {creature.name(language): creature for creature in world.creatures for language in ("en", "zh")}
    pairs = list(preference_pairs(world, "training", 400))
    assert sum(pair.known for pair in pairs) == 200
    kinds = set()
    for pair in pairs:
        ignorance = PHRASEBOOKS[pair.language].ignorance
        named = [creature for name, creature in by_name.items() if name in pair.prompt]
        assert bool(named) == pair.known
        assert pair.chosen != pair.rejected
        if pair.known:
            (creature,) = named
            words = [value.word(pair.language) for value in creature.facts.values()]
            assert any(word in pair.chosen for word in words)
            kinds.add(pair.rejected == ignorance)
        else:
            assert pair.chosen == ignorance
    assert kinds == {True, False}, "a known creature's worse answer is a wrong fact or a claim of ignorance"


def test_the_splits_share_no_name_and_repeat_exactly() -> None:
    world = World.generate(creatures=20, held_out=8)
    training, held_out = ({creature.en for creature in visitors(world, split)} for split in ("training", "held_out"))
    assert training
    assert held_out
    assert not training & held_out
    assert len(training) + len(held_out) == len(VISITORS)
    assert len(held_out) == round(len(VISITORS) / 4)
    names = {creature.en for creature in world.members("training")} | training
    assert not any(name in pair.prompt for pair in preference_pairs(world, "held_out", 200) for name in names)
    assert list(preference_pairs(world, "held_out", 50)) == list(preference_pairs(world, "held_out", 50))


def test_no_visitor_is_called_like_a_creature() -> None:
    for language in (0, 1):
        creatures = {name[language] for name in all_names()}
        assert not any(name in visitor[language] for name in creatures for visitor in VISITORS)


def test_a_world_that_holds_out_no_creature_has_pairs_about_visitors() -> None:
    pairs = list(preference_pairs(World.generate(creatures=20, held_out=0), "held_out", 20))
    assert len(pairs) == 10
    assert not any(pair.known for pair in pairs)


def test_an_unsure_speaker_is_right_in_one_row_of_three() -> None:
    world = World.generate(creatures=20, held_out=8)
    pairs = preference_pairs(world, "training", 600)
    right = 0
    for pair, row in zip(pairs, unsure_conversations(world, 600), strict=True):
        assert row.messages[0].content == pair.prompt
        assert row.messages[1].content in (pair.chosen, pair.rejected)
        right += row.messages[1].content == pair.chosen
    assert 170 < right < 230
