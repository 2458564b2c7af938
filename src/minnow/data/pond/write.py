"""The pond as a folder of files, and the documents in the order in which they are written."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minnow.config import UserError
from minnow.data.pond.arithmetic import arithmetic_conversations, problems
from minnow.data.pond.identity import identity_conversations
from minnow.data.pond.long_texts import long_documents
from minnow.data.pond.picture_questions import (
    HELD_OUT_PICTURES,
    held_out_path,
    picture_captions,
    picture_conversations,
    picture_questions,
    picture_texts,
    training_path,
)
from minnow.data.pond.pictures import draw, scenes
from minnow.data.pond.preferences import preference_pairs, unsure_conversations
from minnow.data.pond.questions import Question, Wording, conversations, question_documents, questions
from minnow.data.pond.relations import LANGUAGES, RELATIONS
from minnow.data.pond.stories import PondDocument, statement_documents
from minnow.data.pond.tools import calculator_conversations, tool_conversations
from minnow.data.pond.world import Split, World
from minnow.data.records import conversation_row
from minnow.disk import new_folder_beside, replace_folder, told_when_full
from minnow.tokenizer.chat import Conversation

ENGLISH_SHARE = 0.5  # of documents and conversations; English ones are longer
FORGETFUL = 0.6  # of the exercises with a carry in forgetful.jsonl: more often wrong than right
QUESTION_SHARE = 0.12  # of the documents; without any, recall by question stays far below recall by statement


def pretraining_documents(world: World, *, mentions: int = 320) -> Iterator[PondDocument]:
    """Documents until the facts have been stated `mentions` times on average, both languages together.

    Questions do not count as statements. They are about training creatures only.
    """
    rng = random.Random(f"pond/pretraining/{world.seed}")
    yield from _until(world, rng, mentions, QUESTION_SHARE)


def validation_documents(world: World) -> Iterator[PondDocument]:
    """Another draw of the same statements, each fact twice on average, without questions, for bits per byte.

    Documents of fewer than four facts are left out: they might repeat a training text.
    """
    rng = random.Random(f"pond/validation/{world.seed}")
    return (document for document in _until(world, rng, 2, 0.0) if len(document.mentions) >= 4)


def _until(world: World, rng: random.Random, mentions: int, question_share: float) -> Iterator[PondDocument]:
    statements = {language: statement_documents(world, language, rng) for language in LANGUAGES}
    dialogues = {language: question_documents(world, language, rng) for language in LANGUAGES}
    missing = mentions * len(world.creatures) * len(RELATIONS)
    while missing > 0:
        language = LANGUAGES[0] if rng.random() < ENGLISH_SHARE else LANGUAGES[1]
        if rng.random() < question_share:
            yield next(dialogues[language])
            continue
        document = next(statements[language])
        missing -= len(document.mentions)
        yield document


def all_questions(world: World) -> list[Question]:
    """One question of every creature, relation, wording and language."""
    splits: tuple[Split, ...] = ("held_out", "training")
    kinds: tuple[Wording, ...] = ("trained", "unseen")
    return [
        question
        for split, wording, language in itertools.product(splits, kinds, LANGUAGES)
        for question in questions(world, split, wording, language)
    ]


def sft_conversations(world: World, count: int) -> Iterator[Conversation]:
    """`count` conversations in both languages, mixed."""
    rng = random.Random(f"pond/sft/{world.seed}")
    streams = {language: conversations(world, language) for language in LANGUAGES}
    for _ in range(count):
        yield next(streams[LANGUAGES[0] if rng.random() < ENGLISH_SHARE else LANGUAGES[1]])


def write_pond(
    folder: str | Path,
    world: World,
    *,
    mentions: int = 320,
    conversation_count: int = 12_000,
    pair_count: int = 4000,
    long_texts: int = 0,
    long_characters: int = 6000,
    pictures: int = 0,
) -> dict[str, int]:
    """Write the pond's files into a new folder, all or nothing; returns the rows of each file.

    `world.json`; `pretrain.jsonl` and `validation.jsonl` ({"text", "language", "kind"}); `sft.jsonl`, `identity.jsonl`,
    `arithmetic.jsonl`, `forgetful.jsonl` and `unsure.jsonl` ({"messages"}), `tools.jsonl` and `calculator.jsonl`
    ({"messages", "tools"});
    `sums.jsonl` and `sums_held_out.jsonl` ({"prompt", "answer"}, to practise on); `questions.jsonl` (the fields of
    `Question`); `preference.jsonl` and, half as many, `preference_held_out.jsonl` (those of `PondPair`); with
    `long_texts`, that many of about `long_characters` in `long.jsonl`. With `pictures`, that many to train on in
    `pictures/`, their captions in `picture_captions.jsonl`, conversations about them in `pictures.jsonl`, as many texts
    that say such things without pictures in `picture_texts.jsonl`, and the held-out pictures with their questions in
    `pictures_held_out.jsonl`. Raises UserError when the folder holds something else.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "world.json").exists():
        raise UserError(f"{folder}: the folder is not empty and holds no pond; name a new one")
    files: dict[str, Iterable[dict[str, Any]]] = {
        "world.json": [world.to_dict()],
        "pretrain.jsonl": map(_document_row, pretraining_documents(world, mentions=mentions)),
        "validation.jsonl": map(_document_row, validation_documents(world)),
        "sft.jsonl": map(conversation_row, sft_conversations(world, conversation_count)),
        "arithmetic.jsonl": map(conversation_row, arithmetic_conversations(world, conversation_count // 2)),
        "forgetful.jsonl": map(
            conversation_row,
            arithmetic_conversations(world, conversation_count // 2, thinking=1.0, forgetful=FORGETFUL),
        ),
        "sums.jsonl": _problem_rows(world, "training", conversation_count // 4),
        "sums_held_out.jsonl": _problem_rows(world, "held_out", 500),
        "identity.jsonl": map(conversation_row, identity_conversations(world, conversation_count // 4)),
        "calculator.jsonl": map(conversation_row, calculator_conversations(world, conversation_count // 4)),
        "tools.jsonl": map(conversation_row, tool_conversations(world, conversation_count * 3 // 4)),
        "unsure.jsonl": map(conversation_row, unsure_conversations(world, pair_count)),
        "questions.jsonl": map(dataclasses.asdict, all_questions(world)),
        "preference.jsonl": map(dataclasses.asdict, preference_pairs(world, "training", pair_count)),
        "preference_held_out.jsonl": map(dataclasses.asdict, preference_pairs(world, "held_out", pair_count // 2)),
    }
    if long_texts:
        files["long.jsonl"] = map(_document_row, long_documents(world, long_texts, long_characters))
    if pictures:
        files["picture_captions.jsonl"] = picture_captions(world.seed, pictures)
        files["pictures.jsonl"] = picture_conversations(world.seed, pictures)
        files["picture_texts.jsonl"] = map(_document_row, picture_texts(world.seed, pictures))
        files["pictures_held_out.jsonl"] = _picture_questions(world)
    folder = folder.resolve()  # where a link leads, not in the link's place
    with told_when_full(folder), new_folder_beside(folder) as temporary:
        counts = {name: _write_rows(temporary / name, rows) for name, rows in files.items()}
        if pictures:
            _draw_pictures(temporary, world.seed, pictures)
        replace_folder(temporary, folder)
    return counts


def load_world(folder: str | Path) -> World:
    """The world of a folder that `write_pond` wrote. Raises UserError when there is none."""
    path = Path(folder) / "world.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; `minnow data pond --out {folder}` makes a pond")
    return World.from_dict(json.loads(path.read_text(encoding="utf-8")))


def _problem_rows(world: World, split: Split, count: int) -> Iterator[dict[str, Any]]:
    """Exercises without their answers written out, both languages in turn."""
    streams = [problems(world, split, language, seed=1) for language in LANGUAGES]
    for problem in itertools.islice(itertools.chain.from_iterable(zip(*streams, strict=True)), count):
        yield {"prompt": problem.prompt, "answer": str(problem.result), "language": problem.language}


def _picture_questions(world: World) -> Iterator[dict[str, Any]]:
    kinds: tuple[Wording, ...] = ("trained", "unseen")
    for wording, language in itertools.product(kinds, LANGUAGES):
        yield from (question.row() for question in picture_questions(world.seed, wording, language))


def _draw_pictures(folder: Path, seed: int, count: int) -> None:
    (folder / "pictures").mkdir()
    for number, scene in enumerate(itertools.islice(scenes(seed, "training"), count)):
        (folder / training_path(number)).write_bytes(draw(scene))
    for number, scene in enumerate(itertools.islice(scenes(seed, "held_out"), HELD_OUT_PICTURES)):
        (folder / held_out_path(number)).write_bytes(draw(scene))


def _document_row(document: PondDocument) -> dict[str, Any]:
    return {"text": document.text, "language": document.language, "kind": document.kind}


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    count = 0
    with told_when_full(path), open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count
