import itertools
import json
import re
from collections import Counter

import pytest

from minnow.config import UserError
from minnow.data.pond.arithmetic import split_of
from minnow.data.pond.long_texts import strangers
from minnow.data.pond.questions import normal_form, questions, wordings
from minnow.data.pond.relations import LANGUAGES, RELATIONS, VALUES
from minnow.data.pond.stories import PHRASEBOOKS
from minnow.data.pond.world import MAX_CREATURES, World
from minnow.data.pond.write import (
    all_questions,
    load_world,
    pretraining_documents,
    sft_conversations,
    validation_documents,
    write_pond,
)


@pytest.fixture(scope="module")
def world():
    return World.generate(seed=0)


@pytest.fixture(scope="module")
def documents(world):
    return list(pretraining_documents(world, mentions=40))


@pytest.fixture(scope="module")
def dialogues(world):
    return list(sft_conversations(world, 3000))


def templates(book):
    """Every text of a phrasebook, however deep."""

    def walk(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            for inner in value.values():
                yield from walk(inner)
        elif isinstance(value, tuple):
            for inner in value:
                yield from walk(inner)
        elif hasattr(value, "trained"):
            yield from walk(value.trained + value.unseen)

    for value in vars(book).values():
        yield from walk(value)


def test_same_seed_same_world_another_seed_another(world):
    assert World.generate(seed=0) == world
    other = World.generate(seed=1)
    assert {c.en for c in other.creatures} != {c.en for c in world.creatures}
    assert next(iter(pretraining_documents(world))) == next(iter(pretraining_documents(world)))


def test_default_sizes(world):
    assert len(world.members("training")) == 90
    assert len(world.members("held_out")) == 60
    assert len(RELATIONS) == 9
    # 60 creatures x 9 relations = 540 held-out questions per language.
    for language in LANGUAGES:
        assert len(questions(world, "held_out", "trained", language)) == 540


def test_names_are_unique_and_stand_in_no_other_word(world):
    everyone = World.generate(seed=0, creatures=MAX_CREATURES, held_out=0)
    assert len({c.en for c in everyone.creatures}) == len({c.zh for c in everyone.creatures}) == MAX_CREATURES
    characters = set("".join(c.zh for c in everyone.creatures))
    chinese = "".join(templates(PHRASEBOOKS["zh"])) + "".join(v.zh for vs in VALUES.values() for v in vs)
    assert not characters & set(chinese)
    english = " ".join(templates(PHRASEBOOKS["en"])) + " ".join(v.en for vs in VALUES.values() for v in vs)
    assert not {c.en.lower() for c in everyone.creatures} & set(re.findall(r"\w+", english.lower()))


def test_a_word_answers_one_relation_only():
    for language in LANGUAGES:
        words = [value.word(language) for values in VALUES.values() for value in values]
        assert len(words) == len(set(words))


def test_each_relation_has_ten_paraphrases_in_both_directions():
    for book, relation in itertools.product(PHRASEBOOKS.values(), RELATIONS):
        statements = book.statements[relation]
        assert len(set(statements)) >= 10
        assert any(text.index("{x}") < text.index("{v}") for text in statements)
        assert any(text.index("{v}") < text.index("{x}") for text in statements)


def test_many_trained_wordings_and_none_of_them_unseen():
    for language, relation in itertools.product(LANGUAGES, RELATIONS):
        trained, unseen = (set(wordings(language, relation, kind)) for kind in ("trained", "unseen"))
        assert len(trained) >= 14
        assert len(unseen) >= 10
        assert not trained & unseen
        book = PHRASEBOOKS[language]
        for kind, cores in book.question_cores[relation].items():
            # An unseen core must not slip into a trained wording by way of another kind or lead.
            assert not [
                text for core in cores.unseen for text in trained if core in text.lower() and core not in trained
            ], kind


def test_held_out_creatures_are_asked_about_nowhere(world, documents, dialogues):
    held_out = re.compile("|".join(name for c in world.members("held_out") for name in (c.en, c.zh)))
    for document in documents:
        if document.kind == "questions":
            assert not held_out.search(document.text)
        else:
            assert not re.search("[?？]", document.text)
    for conversation in dialogues:
        assert not any(held_out.search(message.content) for message in conversation.messages)


def test_unseen_wordings_stand_in_no_training_text(world, documents, dialogues):
    names = re.compile("|".join(name for c in world.creatures for name in (c.en, c.zh)))
    unseen = {text for lang, rel in itertools.product(LANGUAGES, RELATIONS) for text in wordings(lang, rel, "unseen")}
    unseen = {text.lower() for text in unseen}
    asked = [message.content for conversation in dialogues for message in conversation.messages]
    asked += [line for d in documents if d.kind == "questions" for line in re.split(r"\n|： ?|: ", d.text)]
    assert not unseen & {names.sub("{x}", text).lower() for text in asked}


def test_facts_are_stated_evenly_and_truly(world, documents):
    counts = Counter(m for d in documents if d.kind != "questions" for m in d.mentions)
    assert len(counts) == 150 * 9
    assert min(counts.values()) > 0.5 * 40
    assert max(counts.values()) < 1.7 * 40
    by_name = {creature.en: creature for creature in world.creatures}
    for document in documents[:2000]:
        for name, relation in document.mentions:
            assert by_name[name].fact(relation, document.language).lower() in document.text.lower()


def test_shares_of_languages_and_questions(documents):
    english = sum(document.language == "en" for document in documents) / len(documents)
    asking = sum(document.kind == "questions" for document in documents) / len(documents)
    # About 9,000 documents: one standard error is sqrt(.57 x .43 / 9000) = .005.
    assert english == pytest.approx(0.5, abs=0.02)
    assert asking == pytest.approx(0.12, abs=0.02)


def test_validation_documents_are_separate_draws(world, documents):
    validation = list(validation_documents(world))
    assert {document.language for document in validation} == set(LANGUAGES)
    assert len(validation) > 200
    assert min(len(document.mentions) for document in validation) >= 4, "short ones might repeat a training text"
    assert not {document.text for document in validation} & {document.text for document in documents}


def test_conversations_alternate_and_end_with_the_answer(dialogues):
    for conversation in dialogues:
        roles = [message.role for message in conversation.messages if message.role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert any(len(conversation.messages) >= 6 for conversation in dialogues)


def test_answers_are_exact_up_to_normal_form(world):
    creature = world.creatures[0]
    (colour,) = [
        q
        for q in all_questions(world)
        if (q.creature, q.relation, q.language, q.wording) == (creature.en, "colour", "en", "trained")
    ]
    assert colour.answer == f"It is {creature.facts['colour'].en}."
    assert normal_form(f" {colour.answer.upper()}\n") == normal_form(colour.answer[:-1])
    assert normal_form("Ｉｔ  is\u3000red!") == "it is red", "wide letters and spaces are the same words"
    assert normal_form("波卡是红色的。") == normal_form("波卡是红色的") != normal_form("波卡是蓝色的。")


@pytest.mark.parametrize("seed", [1, 2])
def test_worlds_of_other_sizes(seed):
    small = World.generate(seed=seed, creatures=3, held_out=1)
    assert sum(1 for _ in pretraining_documents(small, mentions=10)) > 5
    assert len(list(sft_conversations(small, 20))) == 20


@pytest.mark.parametrize(("creatures", "held_out"), [(1, 0), (10, 10), (MAX_CREATURES + 1, 0)])
def test_impossible_sizes_are_refused(creatures, held_out):
    with pytest.raises(UserError, match="cannot be"):
        World.generate(creatures=creatures, held_out=held_out)


def test_written_folder(tmp_path):
    world = World.generate(seed=3, creatures=12, held_out=4)
    counts = write_pond(tmp_path / "pond", world, mentions=10, conversation_count=50)
    assert load_world(tmp_path / "pond") == world
    assert counts["questions.jsonl"] == 12 * 9 * 2 * 2
    for name, count in counts.items():
        lines = (tmp_path / "pond" / name).read_text(encoding="utf-8").splitlines()
        assert len(lines) == count
    row = json.loads((tmp_path / "pond" / "pretrain.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert set(row) == {"text", "language", "kind"}
    # Written again it replaces the old one and leaves nothing beside it.
    (tmp_path / "link").symlink_to(tmp_path / "pond")  # an older pond behind it could not be removed
    write_pond(tmp_path / "link", world, mentions=5, conversation_count=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pond"]
    assert (tmp_path / "link").is_symlink()


def test_two_creatures_of_a_document_are_two():
    """Also where a round of the deck ends between them: nobody is compared with itself."""
    small = World.generate(seed=1, creatures=3, held_out=1)
    for document in pretraining_documents(small, mentions=200):
        if document.kind == "comparison":
            assert len({name for name, _ in document.mentions}) == 2, document.text


def test_documents_are_written_as_people_write():
    """Some one sentence a line, most in running text; some sentences of a profile say "it"."""
    texts = [d.text for d in pretraining_documents(World.generate(seed=0), mentions=10) if d.kind == "profile"]
    in_lines = sum("\n" in text for text in texts) / len(texts)
    assert 0.15 < in_lines < 0.25
    with_it = sum(bool(re.search(r"\bIt\b|它", text)) for text in texts) / len(texts)
    assert with_it > 0.8


def test_every_file_has_its_share_of_rows_and_its_side_of_what_is_held_out(tmp_path):
    world = World.generate(seed=3, creatures=12, held_out=4)
    folder = tmp_path / "pond"
    counts = write_pond(folder, world, mentions=1, conversation_count=400, pair_count=60, long_texts=8)
    (tmp_path / "usual").mkdir()
    assert folder.stat().st_mode == (tmp_path / "usual").stat().st_mode, "others may read it as they may read any"
    expected = {"sft": 400, "arithmetic": 200, "forgetful": 200, "sums": 100, "sums_held_out": 500, "identity": 100}
    expected |= {"calculator": 100, "tools": 300, "unsure": 60, "preference": 60, "preference_held_out": 30, "long": 8}
    assert {name: counts[f"{name}.jsonl"] for name in expected} == expected

    def rows(name):
        return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]

    for name, split in (("sums", "training"), ("sums_held_out", "held_out")):
        languages = Counter(row["language"] for row in rows(name))
        assert languages["en"] == languages["zh"] == expected[name] // 2
        for row in rows(name):
            a, b = map(int, re.findall(r"\d+", row["prompt"]))
            sign = "+" if int(row["answer"]) == a + b else "-"
            assert int(row["answer"]) == (a + b if sign == "+" else a - b)
            assert split_of(a, sign, b) == split
    wrong = 0
    for row in rows("forgetful"):
        reasoning = row["messages"][-1].get("reasoning_content")
        if reasoning:
            a, sign, b, said = re.search(r"(\d+) ([+-]) (\d+) = (\d+)[.。]$", reasoning).groups()
            wrong += int(said) != (int(a) + int(b) if sign == "+" else int(a) - int(b))
    assert wrong > 20, "carries are forgotten in this file"
    held_out = [name for c in world.members("held_out") for name in (c.en, c.zh)]
    trained = [name for c in world.members("training") for name in (c.en, c.zh)]
    for name, others in (("preference", held_out), ("preference_held_out", trained)):
        assert not any(other in row["prompt"] for row in rows(name) for other in others)
    examined = [name for pair in strangers(world, "held_out") for name in pair]
    assert not any(name in row["text"] for row in rows("long") for name in examined)


def test_a_folder_with_other_things_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds no pond"):
        write_pond(tmp_path, World.generate(creatures=3, held_out=1))
    with pytest.raises(UserError, match="minnow data pond"):
        load_world(tmp_path)
