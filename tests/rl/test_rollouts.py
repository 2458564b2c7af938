"""Rollouts are tokens from beginning to end; batches hold exactly what the model wrote."""

import copy
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import torch

from minnow.config import UserError
from minnow.data.prompts import Prompt
from minnow.engine import Engine
from minnow.rl.environment import Reply, SingleTurn
from minnow.rl.experience import pack_trajectories, score_trajectories, trained_logprobs
from minnow.rl.rollouts import RolloutConfig, live_engine, play
from minnow.tokenizer.chat import Conversation, Message, ToolCall, render, render_continuation
from tests.rl.helpers import tiny


@pytest.fixture(scope="module")
def engine():
    model, tokenizer = tiny()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return Engine(model, tokenizer)


def prompts(count):
    return [Prompt(Conversation((Message("user", f"say {n}"),)), str(n)) for n in range(count)]


@dataclass
class Echo:
    """Replies with a tool result until it has been asked `turns` times."""

    prompt: Prompt
    turns: int
    seen: list = field(default_factory=list)

    def reset(self):
        return self.prompt.conversation

    def step(self, answer):
        self.seen.append(answer)
        return Reply((Message("tool", f"result {len(self.seen)}"),), done=len(self.seen) == self.turns, reward=1.0)


def echoes(count):
    return [Echo(prompt, 3) for prompt in prompts(count)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 0.0},  # nothing is explored
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"thinking_share": 0.0, "enable_thinking": True},
        {"prompts": 0},
        {"samples": 0},
        {"max_tokens": 0},
        {"max_turns": 0},
        {"environment_threads": 0},
    ],
)
def test_settings_that_nothing_can_be_played_with_are_refused(wrong):
    with pytest.raises(UserError, match=f"rollout.{next(iter(wrong))} is"):
        RolloutConfig(**wrong)
    RolloutConfig(prompts=1, samples=1, max_tokens=1, max_turns=1, environment_threads=1, top_p=1.0)


def test_draws_repeat_and_do_not_depend_on_company(engine):
    config = RolloutConfig(max_tokens=12)
    first = play(engine, [SingleTurn(p) for p in prompts(4)], range(4), config, seed=3, longest=128)
    again = play(engine, [SingleTurn(p) for p in prompts(4)], range(4), config, seed=3, longest=128)
    alone = play(engine, [SingleTurn(prompts(1)[0])], [0], config, seed=3, longest=128)
    assert [t.ids for t in first] == [t.ids for t in again]
    assert alone[0].ids == first[0].ids
    other = play(engine, [SingleTurn(p) for p in prompts(4)], range(4), config, seed=4, longest=128)
    assert [t.ids for t in first] != [t.ids for t in other]


def test_every_turn_of_every_episode_has_draws_of_its_own(engine, monkeypatch):
    """And is drawn as `rollout` says."""
    engine = Engine(copy.deepcopy(engine.model), engine.tokenizer)
    engine.model.head_weight.data[engine.tokenizer.im_end_id] += 0.5  # so that turns end
    asked, generate = [], engine.generate
    monkeypatch.setattr(engine, "generate", lambda ids, params: asked.extend(params) or generate(ids, params))
    config = RolloutConfig(max_tokens=20, max_turns=3, temperature=0.7, top_p=0.9)
    play(engine, echoes(6), range(6), config, seed=0, longest=256)
    assert len(asked) > 6, "some have a second turn"
    assert len({params.seed for params in asked}) == len(asked)
    assert {(p.temperature, p.top_p, p.max_tokens) for p in asked} == {(0.7, 0.9, 20)}


def test_a_compiled_model_plays_compiled_with_the_weights_it_has_then(engine, monkeypatch):
    """Traced as for inductor and run as it is; the second phase follows an update of the weights."""
    model, tokenizer = tiny()
    played = partial(play, seed=3, longest=128)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model.compile_backbone()
    compiled = live_engine(model, tokenizer)
    for weights in (model.state_dict(), engine.model.state_dict()):
        model.load_state_dict(weights)
        plain = Engine(copy.deepcopy(model), tokenizer)
        compiled.weights_updated()
        config = RolloutConfig(max_tokens=12)
        found, expected = (
            played(each, [SingleTurn(p) for p in prompts(4)], range(4), config) for each in (compiled, plain)
        )
        assert [t.ids for t in found] == [t.ids for t in expected]
    assert compiled._parts().runner.compiled is not None


def test_a_tool_dialogue_stays_tokens_and_its_results_are_not_trained(engine):
    """B5: the token that ends a turn is the model's own and is trained; a tool's words are not."""
    engine.model.head_weight.data[engine.tokenizer.im_end_id] += 0.5  # so that turns end
    engine.weights_updated()
    environments = [Echo(p, 3) for p in prompts(6)]
    config = RolloutConfig(max_tokens=20, max_turns=3)
    for trajectory, environment in zip(
        play(engine, environments, range(6), config, seed=0, longest=128), environments, strict=True
    ):
        opening = render(engine.tokenizer, environment.reset(), add_generation_prompt=True).ids.tolist()
        at = len(opening)
        assert trajectory.ids[:at] == opening
        assert not any(trajectory.trained[:at])
        turns = len(trajectory.answers)
        said = list(environment.reset().messages)
        for turn, answer in enumerate(trajectory.answers):
            said += [answer] if turn + 1 == turns else [answer, Message("tool", f"result {turn + 1}")]
        assert trajectory.conversation == Conversation(tuple(said)), "what a reward model reads"
        for turn in range(turns):
            wrote = 0
            while at + wrote < len(trajectory.ids) and trajectory.trained[at + wrote]:
                wrote += 1
            assert wrote > 0
            at += wrote
            if turn + 1 < turns:
                assert trajectory.ids[at - 1] == engine.tokenizer.im_end_id
                reply = render_continuation(engine.tokenizer, [Message("tool", f"result {turn + 1}")])
                assert trajectory.ids[at : at + len(reply)] == reply
                assert not any(trajectory.trained[at : at + len(reply)])
                at += len(reply)
        assert at == len(trajectory.ids)
        assert trajectory.num_trained == sum(trajectory.trained)
        assert trajectory.reward == len(environment.seen), "1 for every turn that it heard"
    assert max(len(environment.seen) for environment in environments) > 1


def test_after_the_end_of_the_text_nothing_follows(engine):
    """It ends more than the turn: the environment is heard, and the model is not asked again."""
    engine = Engine(copy.deepcopy(engine.model), engine.tokenizer)
    end = engine.tokenizer.end_of_text_id
    engine.model.head_weight.data[end] += 0.5
    played = play(engine, echoes(6), range(6), RolloutConfig(max_tokens=20, max_turns=3), seed=0, longest=256)
    ended = [t for t in played if end in t.ids]
    assert ended
    assert [(t.ids.index(end), t.ending) for t in ended] == [(len(t.ids) - 1, "stop") for t in ended]
    assert all(t.reward == len(t.answers) for t in ended)


def test_what_just_fits_is_played(engine):
    """A turn needs room for max_tokens: one token less, and it is not begun."""
    engine = Engine(copy.deepcopy(engine.model), engine.tokenizer)
    engine.model.head_weight.data[engine.tokenizer.im_end_id] += 0.5  # so that turns end
    config = RolloutConfig(max_tokens=20, max_turns=2)
    played = play(engine, echoes(6), range(6), config, seed=0, longest=256)
    place = next(place for place, t in enumerate(played) if len(t.answers) == 2)
    trained = played[place].trained
    opening, second = trained.index(True), len(trained) - trained[::-1].index(False)

    def turns(longest):
        (found,) = play(engine, [echoes(6)[place]], [place], config, seed=0, longest=longest)
        return len(found.answers), found.ending == "length"

    assert turns(second + 20)[0] == 2
    assert turns(second + 19) == (1, True)
    assert turns(opening + 20)[0] == 1
    with pytest.raises(UserError, match=f"opens with {opening} tokens"):
        turns(opening + 19)


def test_a_model_that_is_to_think_begins_every_turn_in_its_thoughts(engine):
    engine = Engine(copy.deepcopy(engine.model), engine.tokenizer)
    engine.model.head_weight.data[engine.tokenizer.im_end_id] += 0.5  # so that turns end
    environments = echoes(6)
    config = RolloutConfig(max_tokens=20, max_turns=2, enable_thinking=True)
    turns = 0
    for trajectory, environment in zip(
        play(engine, environments, range(6), config, seed=0, longest=128), environments, strict=True
    ):
        opening = render(
            engine.tokenizer, environment.reset(), add_generation_prompt=True, enable_thinking=True
        ).ids.tolist()
        assert trajectory.ids[: len(opening)] == opening
        assert [turn.content for turn in trajectory.answers] == [""] * len(trajectory.answers)  # it thought to the end
        if len(trajectory.answers) == 2:
            reply = render_continuation(engine.tokenizer, [Message("tool", "result 1")], enable_thinking=True)
            text = " ".join(map(str, trajectory.ids))
            assert f" {' '.join(map(str, reply))} " in text
            turns += 1
    assert turns
    plain = render(engine.tokenizer, environment.reset(), add_generation_prompt=True).ids.tolist()
    assert opening != plain


def test_a_share_of_the_prompts_is_reasoned_about(engine):
    """The same ones every time and whoever plays them; their turns, and their format, are what each was asked for."""
    engine = Engine(copy.deepcopy(engine.model), engine.tokenizer)
    engine.model.head_weight.data[engine.tokenizer.im_end_id] += 0.5  # so that turns end
    config = RolloutConfig(max_tokens=20, max_turns=2, enable_thinking=True, thinking_share=0.5)
    asked = echoes(24)
    played = play(engine, asked, range(24), config, seed=0, longest=128)
    thinking = [t.thinking for t in played]
    assert 6 <= sum(thinking) <= 18
    assert thinking == [config.thinks(each.prompt) for each in asked]
    again = play(engine, echoes(24)[::2], range(7, 19), config, seed=9, longest=128)
    assert [t.thinking for t in again] == thinking[::2]
    for trajectory, environment in zip(played, asked, strict=True):
        how = {"enable_thinking": trajectory.thinking}
        opening = render(engine.tokenizer, environment.reset(), add_generation_prompt=True, **how).ids.tolist()
        assert trajectory.ids[: len(opening)] == opening
        for turn in trajectory.answers:
            assert not (turn.content if trajectory.thinking else turn.reasoning_content)  # nobody closes the block
        if len(trajectory.answers) == 2:
            reply = render_continuation(engine.tokenizer, [Message("tool", "result 1")], **how)
            assert f" {' '.join(map(str, reply))} " in " ".join(map(str, trajectory.ids))
    for kind in (True, False):
        assert any(len(t.answers) == 2 for t in played if t.thinking == kind)
        assert any(turn.reasoning_content if kind else turn.content for t in played for turn in t.answers)
    assert all(RolloutConfig(enable_thinking=True).thinks(each.prompt) for each in asked)
    assert not any(RolloutConfig().thinks(each.prompt) for each in asked)


def test_continuation_is_what_the_template_writes(engine):
    call = Message("assistant", "", tool_calls=(ToolCall("f", {"x": 1}), ToolCall("g", {})))
    before = (Message("user", "hi"), call)
    after = (Message("tool", "one <|im_end|>"), Message("tool", "two"))
    whole = render(engine.tokenizer, Conversation((*before, *after)), add_generation_prompt=True).ids.tolist()
    head = render(engine.tokenizer, Conversation(before)).ids.tolist()
    newline = engine.tokenizer.encode("\n")
    assert head[-len(newline) :] == newline
    assert head[: -len(newline)] + render_continuation(engine.tokenizer, after) == whole


def test_sampler_and_trainer_agree_and_packing_changes_nothing(engine):
    """B3: the log-probabilities of the behaviour policy are those of the distribution that was sampled."""
    config = RolloutConfig(max_tokens=16, temperature=0.7)
    trajectories = play(engine, [SingleTurn(p) for p in prompts(8)], range(8), config, seed=0, longest=128)
    scores = {}
    for T, rows in ((64, 8), (128, 1)):
        packed = pack_trajectories(trajectories, range(8), T, rows)
        assert sum(len(p.sequence_N) for p in packed) == sum(t.num_trained for t in trajectories)
        scores[T] = score_trajectories(engine.model, packed, 8, config.temperature)
    for n, trajectory in enumerate(trajectories):
        np.testing.assert_allclose(scores[64][n], trajectory.sampler_logprobs, atol=1e-5)
        np.testing.assert_allclose(scores[64][n], scores[128][n], atol=1e-5)


def test_packed_batches_hold_the_targets_that_the_model_wrote(engine):
    trajectories = play(
        engine, [SingleTurn(p) for p in prompts(5)], range(5), RolloutConfig(max_tokens=9), seed=1, longest=128
    )
    for part in pack_trajectories(trajectories, [4, 1, 3], 64, 2):
        trained_BT = part.batch.weights_BT > 0
        expected = [
            i for n in part.trajectories for i, t in zip(trajectories[n].ids, trajectories[n].trained, strict=True) if t
        ]
        assert part.batch.targets_BT[trained_BT].tolist() == expected
        values = part.flat([np.full(t.num_trained, n, np.float32) for n, t in enumerate(trajectories)])
        assert values.tolist() == [float(n) for n in part.trajectories for _ in range(trajectories[n].num_trained)]
        out = [np.zeros(0)] * 5
        part.split(values, out)
        assert all((out[n] == n).all() for n in part.trajectories)
        logprobs = trained_logprobs(engine.model, part.batch, 1.0)
        assert logprobs.shape == values.shape


def test_what_no_episode_fills_is_marked_as_filler(engine):
    """E3: a mixture's experts and their balance would count it otherwise."""
    trajectories = play(
        engine, [SingleTurn(p) for p in prompts(3)], range(3), RolloutConfig(max_tokens=9), seed=1, longest=128
    )
    positions = sum(len(trajectory.ids) - 1 for trajectory in trajectories)
    packed = pack_trajectories(trajectories, range(3), 128, 1)
    assert sum(part.batch.num_real_tokens for part in packed) == positions < 128 * len(packed)
    for part in packed:
        filler_T = part.batch.filler_BT[0]
        assert torch.equal(filler_T, filler_T.cummax(0).values), "at the end of a row"
        assert not part.batch.weights_BT[0, filler_T].any()


def test_no_room_for_a_turn_that_there_is_not_is_no_cut(engine):
    """Its last turn is whole: a right answer in it is right, and nothing was overlong."""
    config = RolloutConfig(max_tokens=20, max_turns=1)
    longest = max(len(t.ids) for t in play(engine, echoes(6), range(6), config, seed=0, longest=128)) + 1
    endings = [t.ending for t in play(engine, echoes(6), range(6), config, seed=0, longest=longest)]
    assert "turns" in endings
    assert endings == [t.ending for t in play(engine, echoes(6), range(6), config, seed=0, longest=128)]


def test_an_episode_that_might_outgrow_a_row_ends_before(engine):
    config = RolloutConfig(max_tokens=20, max_turns=3)
    for trajectory in play(engine, [Echo(p, 3) for p in prompts(6)], range(6), config, seed=0, longest=64):
        assert len(trajectory.ids) <= 64
        assert trajectory.ending == "length" or len(trajectory.answers) < 3
