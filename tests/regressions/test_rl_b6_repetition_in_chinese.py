"""B6: a repetition penalty over \\w+ words takes a Chinese clause for one word, so a loop inside it costs nothing."""

from minnow.rl.text_rewards import repetition_reward


def test_a_chinese_loop_costs_as_much_as_an_english_one():
    chinese, english = repetition_reward("共舞" * 60), repetition_reward("dance with me " * 20)
    assert chinese < -0.8
    assert english < -0.8


def test_ordinary_prose_costs_nothing_in_either_language():
    assert (
        repetition_reward("小猫住在湖边的木屋里，每天清晨出门捉鱼，傍晚带着鱼回家，和邻居们分着吃，夜里听着雨声睡去。")
        == 0
    )
    assert (
        repetition_reward("The kitten lives by the lake, goes fishing at dawn and shares what it caught at night.") == 0
    )
    assert repetition_reward("ha ha") == 0  # too short to tell
