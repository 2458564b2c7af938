"""E6: temperature 0 divided by zero, max_tokens was not honoured, finish_reason was never "length", and there was no
stop, seed, n or log-probability.
"""

from __future__ import annotations

from minnow.engine import Engine, SamplingParams
from minnow.model.config import ModelConfig
from minnow.model.transformer import CausalLM
from minnow.tokenizer.train import train_tokenizer


def test_options_do_what_they_say() -> None:
    tokenizer = train_tokenizer(["fish"] * 3, 288)
    config = ModelConfig(
        vocab_size=288, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    engine = Engine(CausalLM(config), tokenizer)

    def answers(**options: object) -> list[list[int]]:
        params = SamplingParams(**{"max_tokens": 7, "ignore_eos": True, **options})
        (output,) = engine.generate(["fish"], params)
        for completion in output.completions:
            assert completion.finish_reason == ("stop" if "stop_token_ids" in options else "length")
        return [completion.ids for completion in output.completions]

    (greedy,) = answers(temperature=0.0)
    assert len(greedy) == 7
    assert answers(temperature=0.0, n=2) == [greedy, greedy]
    assert answers(temperature=0.0, stop_token_ids=[greedy[0]]) == [greedy[:1]]
    seeded = answers(seed=5, n=3)
    assert answers(seed=5, n=3) == seeded
    assert answers(seed=6, n=3) != seeded
