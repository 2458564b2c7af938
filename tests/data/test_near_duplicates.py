"""Near duplicates against Jaccard's similarity counted by hand, on texts edited a little and a lot."""

import random

import pytest

from minnow.data.clean import CleanOptions
from minnow.data.near_duplicates import HASHES, NearDuplicates, band_size
from minnow.data.ngrams import shingles, words

pytest.importorskip("rensa")

HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 2000)]
LATIN = [f"{a}{b}{c}" for a in ("ba", "co", "du", "fi", "ge") for b in ("la", "mo", "ni", "ru") for c in "abcdefgh"]


def sets(language, text):
    """Five-word (five-character) runs, made without the code under test."""
    parts = text.split(" ") if language == "en" else list(text)
    return {tuple(parts[i : i + 5]) for i in range(len(parts) - 4)}


def jaccard(language, left, right):
    a, b = sets(language, left), sets(language, right)
    return len(a & b) / len(a | b)


def families(language, count, seed):
    """`count` pairs (text, copy of it with some words changed); no two families share anything."""
    rng = random.Random(seed)
    vocabulary = LATIN if language == "en" else HAN
    joiner = " " if language == "en" else ""
    for _ in range(count):
        original = [rng.choice(vocabulary) for _ in range(rng.randint(60, 400))]
        changed = list(original)
        share = 0.09 * rng.random() ** 2  # squared: a third of the copies are changed too little to matter
        for place in rng.sample(range(len(original)), int(share * len(original))):
            changed[place] = rng.choice(vocabulary)
        yield joiner.join(original), joiner.join(changed)


def test_words_and_shingles_by_hand():
    assert words("Don't STOP,\nＡＢＣ １２!") == ["don", "t", "stop", "abc", "12"]
    assert words("水獭住在River边。ok") == ["水", "獭", "住", "在", "river", "边", "ok"]
    assert shingles([]) == []
    assert shingles(["a", "b"]) == ["a b"]
    assert shingles(list("abcdef")) == ["a b c d e", "b c d e f"]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_recall_and_false_positives_against_brute_force(language):
    """Found: all pairs well above the threshold; never: pairs well below. The margin is 3 standard errors, 0.1."""
    index = NearDuplicates(0.8, seed=0)
    found, errors = {True: [], False: []}, []
    for number, (original, changed) in enumerate(families(language, 200, seed=1)):
        assert index.match_or_add(2 * number, original, "") is None, "two families have nothing in common"
        true = jaccard(language, original, changed)
        match = index.match_or_add(2 * number + 1, changed, "")
        if match:
            assert match.row == 2 * number
            errors.append(match.similarity - true)
        if abs(true - 0.8) > 0.1:
            found[true > 0.8].append(match is not None)
    assert len(found[True]) > 30
    assert len(found[False]) > 30
    assert sum(found[True]) / len(found[True]) >= 0.99
    assert sum(found[False]) == 0
    # near the threshold only a lucky estimate is let through, so the mean is a little high; it must not be far off
    assert abs(sum(errors) / len(errors)) < 0.02
    assert max(map(abs, errors)) < 5 * 0.035


def test_the_first_of_a_family_stays_and_the_most_alike_is_named():
    text = " ".join(LATIN[:100])
    index = NearDuplicates(0.5, seed=0)
    assert index.match_or_add(7, text, "") is None
    assert index.match_or_add(8, " ".join([*LATIN[:70], *LATIN[100:150]]), "") is None
    assert index.match_or_add(9, text.upper().replace(" ", ", "), "") == (7, 1.0), "case and punctuation say nothing"
    assert index.match_or_add(10, " ".join([*LATIN[:70], *LATIN[100:149]]), "").row == 8


def test_rows_about_one_passage_differ_in_their_answers():
    passage = " ".join(LATIN[:120])
    index = NearDuplicates(0.8, seed=0)
    assert index.match_or_add(0, f"{passage} who? the otter", "the otter") is None
    assert index.match_or_add(1, f"{passage} where? the river", "the river") is None
    assert index.match_or_add(2, f"{passage} who then? the otter", "The otter.") == (0, pytest.approx(0.97, abs=0.06))


def test_rows_without_a_word_are_not_alike():
    index = NearDuplicates(0.8, seed=0)
    assert index.match_or_add(0, "!?", "") is None
    assert index.match_or_add(1, "...", "") is None


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
def test_bands_leave_a_chance_to_meet(threshold):
    size = band_size(threshold)
    assert HASHES % size == 0
    assert size == 1 or 1 - (1 - threshold**size) ** (HASHES // size) >= 0.9


def test_the_bands_of_the_default_by_hand():
    # 8 hashes a band: 1 - (1 - 0.8^8)^16 = 0.947; 16: 1 - (1 - 0.8^16)^8 = 0.204
    assert band_size(CleanOptions().near_duplicates) == 8


def test_signatures_do_not_depend_on_the_process():
    """One seed, one signature, on any machine: rensa promises it for a version of its algorithm."""
    import rensa

    sketch = rensa.RMinHash(HASHES, 0)
    sketch.update(["the otter lives in the", "otter lives in the river"])
    again = rensa.RMinHash(HASHES, 0)
    again.update(["otter lives in the river", "the otter lives in the", "the otter lives in the"])
    assert sketch.digest() == again.digest()
    other = rensa.RMinHash(HASHES, 1)
    other.update(["the otter lives in the", "otter lives in the river"])
    assert sketch.digest() != other.digest()
