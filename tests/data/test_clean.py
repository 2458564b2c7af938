"""Cleaning as a whole: what stays, in which order and form; what goes, and why; nothing is left half-written."""

import io
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from minnow.cli import main
from minnow.config import UserError
from minnow.data import clean as clean_module
from minnow.data.clean import CleanOptions, clean, output_names
from minnow.data.said import read_said
from minnow.data.sources import Source
from minnow.data.values import RowError

pytest.importorskip("rensa")
pytest.importorskip("py3langid")

STORY = (
    "The otter lives in the river and eats fish. Every morning it swims to the old mill, where the heron waits on one "
    "leg, and the two of them talk about the weather until the miller opens the gate and the water begins to run."
)
GERMAN = (
    "Der Otter lebt im Fluss und frisst Fische. Jeden Morgen schwimmt er zur alten Mühle, wo der Reiher schon wartet."
)
CHINESE = (
    "水獭住在河里，每天早上都游到老磨坊去。苍鹭单脚站在那里等它，两个朋友一起聊天气，直到磨坊主打开水闸，水开始流。"
)


def write(path, rows):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def lines(path):
    data = path.read_bytes()
    if path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read()
    return [json.loads(line) for line in data.decode().splitlines()]


def run(tmp_path, *paths, out="out", **options):
    report = clean(paths, tmp_path / out, CleanOptions(**options), progress=False)
    return report, lines(tmp_path / out / "removed.jsonl")


def chat(question, answer, system=None):
    start = [{"role": "system", "content": system}] if system else []
    return {"messages": [*start, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_every_reason_and_the_order_of_what_stays(tmp_path):
    evaluation = write(
        tmp_path / "eval.jsonl", [{"q": "Which animal did the miller see first when he opened the gate that day?"}]
    )
    rows = [
        {"text": STORY, "source": "a", "id": 1},
        {"text": "Short."},
        {"text": GERMAN},
        {"text": STORY, "source": "b"},
        {"text": STORY.replace("to run", "to roar").upper()},
        {"text": CHINESE},
        {"text": "word " * 400},
        {"text": f"Exam! Which animal did the miller see first when he opened the gate that day? {STORY[::-1]}"},
        {"nothing": "here"},
        {"text": f"{CHINESE}！"},
        {"text": "The heron is grey and very patient, and it has never once been seen to run or to hurry anywhere."},
    ]
    path = write(tmp_path / "mixed.jsonl", rows)
    report, removed = run(
        tmp_path, path, min_characters=20, max_characters=1500, languages=("en", "zh"), decontaminate=(evaluation,),
        on_bad_row="skip",
    )  # fmt: skip
    assert lines(tmp_path / "out" / "kept" / "mixed.jsonl") == [rows[0], rows[5], rows[10]]
    assert [(entry["line"], entry["reason"]) for entry in removed] == [
        (2, "too_short"),
        (3, "language"),
        (4, "exact_duplicate"),
        (5, "near_duplicate"),
        (7, "too_long"),
        (8, "contaminated"),
        (9, "bad_row"),
        (10, "near_duplicate"),
    ]
    by_line = {entry["line"]: entry for entry in removed}
    assert by_line[2]["characters"] == 6
    assert by_line[3]["language"] == "de"
    assert by_line[4]["duplicate_of"] == by_line[5]["duplicate_of"] == f"{path}:1"
    assert 0.8 <= by_line[5]["similarity"] < 1
    assert by_line[8]["example"] == f"{evaluation}:1"
    assert by_line[9]["message"].startswith("no `text`")
    assert by_line[10]["duplicate_of"] == f"{path}:6"
    assert (report["rows"], report["kept"]) == (11, 3)
    assert report["kinds"] == {"text": 10}
    assert report["removed"]["near_duplicate"]["rows"] == 2
    assert report["removed"]["language"]["share"] == pytest.approx(1 / 11)
    assert report["removed"]["too_short"]["example"] == by_line[2]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(json.dumps(report))


def test_a_row_as_short_or_as_long_as_allowed_stays(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "x" * count} for count in (4, 5, 6, 7, 8)])
    _, removed = run(tmp_path, path, min_characters=5, max_characters=7, near_duplicates=0)
    assert [(entry["line"], entry["reason"]) for entry in removed] == [(1, "too_short"), (5, "too_long")]


def test_a_system_message_is_no_part_of_the_length_or_the_language_but_may_hold_an_exam(tmp_path):
    exam = "Which animal did the miller see first when he opened the gate that day?"
    answer = "The otter lives in the river and eats fish, and every morning it swims to the old mill."
    rows = [chat("Where does the otter live?", answer, GERMAN * 9), chat("Who is it, then?", answer[::-1], exam)]
    options = {
        "languages": ("en",),
        "max_characters": 300,
        "decontaminate": (write(tmp_path / "e.jsonl", [{"q": exam}]),),
    }
    _, removed = run(tmp_path, write(tmp_path / "rows.jsonl", rows[:1]), **options)
    assert not removed
    options.pop("languages")
    _, removed = run(tmp_path, write(tmp_path / "rows.jsonl", rows), out="second", **options)
    assert [(entry["line"], entry["reason"]) for entry in removed] == [(2, "contaminated")]


def test_a_copy_names_the_kept_row_that_it_repeats(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": text} for text in ("one", "one", "two", "three", "two")])
    _, removed = run(tmp_path, path, near_duplicates=0)
    assert [(entry["line"], entry["duplicate_of"]) for entry in removed] == [(2, f"{path}:1"), (5, f"{path}:3")]


def test_of_a_removed_row_the_beginning_is_shown(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "fine"}, {"text": "word " * 400}])
    _, removed = run(tmp_path, path, max_characters=1500)
    assert removed[0]["text"] == ("word " * 400)[:200]


def test_others_may_read_the_folder_as_they_may_read_any(tmp_path):
    """It is made as a temporary folder, which is closed to them."""
    run(tmp_path, write(tmp_path / "rows.jsonl", [{"text": "fine"}]))
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_kept_rows_are_the_same_bytes(tmp_path):
    odd = '{ "text":"caf\\u00e9",  "n": 1e3 , "deep": {"b": [1, 2]}}'
    (tmp_path / "odd.jsonl").write_text(f"{odd}\n\n")
    run(tmp_path, str(tmp_path / "odd.jsonl"))
    assert (tmp_path / "out" / "kept" / "odd.jsonl").read_text() == odd + "\n"


def test_every_form_of_file_becomes_lines_of_json(tmp_path):
    rows = [{"text": f"number {number} of the rows", "score": number, "note": "kept too"} for number in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("one text\n<|endoftext|>\nanother text\n")
    (tmp_path / "d.jsonl.zst").write_bytes(zstandard.compress(json.dumps({"text": "packed"}).encode()))
    (tmp_path / "e.json").write_text(json.dumps({"text": "a single object"}, indent=1))
    report, removed = run(tmp_path, str(tmp_path), near_duplicates=0, exact=False)
    kept = tmp_path / "out" / "kept"
    assert not removed
    assert [source["output"] for source in report["sources"]] == [
        f"kept/{name}" for name in ("a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl.zst", "e.jsonl")
    ]
    assert lines(kept / "a.jsonl") == lines(kept / "b.jsonl") == rows
    assert lines(kept / "c.jsonl") == [{"text": "one text"}, {"text": "another text"}]
    assert lines(kept / "d.jsonl.zst") == [{"text": "packed"}]
    assert lines(kept / "e.jsonl") == [{"text": "a single object"}]
    run(tmp_path, str(tmp_path / "a.json"), out="packed", compress=True, near_duplicates=0)
    assert lines(tmp_path / "packed" / "kept" / "a.jsonl.zst") == rows


def test_what_json_cannot_hold_is_a_bad_row(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a", "picture": b"\0"}]), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet:1: it holds bytes, which JSON cannot"):
        run(tmp_path, str(tmp_path / "b.parquet"))


def test_names_that_two_sources_share_get_a_number():
    sources = [Source("x/a.jsonl", "jsonl"), Source("y/a.jsonl.gz", "jsonl"), Source("z/a.parquet", "parquet")]
    assert output_names(sources, None) == ["a.jsonl", "a.jsonl.zst", "a-2.jsonl"]
    assert output_names([Source("hub:org/name:c", "hub")], None) == ["hub-org-name-c.jsonl"]


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([chat("Where?", "In the river."), chat("Where?", "In the river.")], "conversation"),
        (
            [
                {"instruction": "Where?", "output": "In the river."},
                {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "In the river."}]},
            ],
            "conversation",
        ),
        (
            [
                {"prompt": "Where?", "chosen": "In the river.", "rejected": "On the moon."},
                {
                    "chosen": chat("Where?", "In the river.")["messages"],
                    "rejected": chat("Where?", "On the moon.")["messages"],
                },
            ],
            "preference",
        ),
        ([{"question": "2 + 2?", "answer": "4"}, {"prompt": "2 + 2?", "answer": "4", "id": 7}], "prompt"),
    ],
)  # fmt: skip
def test_the_same_in_another_format_is_an_exact_duplicate(tmp_path, rows, kind):
    report, removed = run(tmp_path, write(tmp_path / "rows.jsonl", rows), near_duplicates=0)
    assert report["kinds"] == {kind: 2}
    assert [entry["reason"] for entry in removed] == ["exact_duplicate"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (chat("2 + 2?", "4"), chat("2 + 2?", "5")),
        (chat("Go on", "Yes", system="You are a pirate."), chat("Go on", "Yes", system="You are a nun.")),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "c", "rejected": "b"}),
        ({"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": "c"}),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}),
        (
            {"prompt": "a", "reward_model": {"ground_truth": "b"}},
            {"prompt": "a", "reward_model": {"ground_truth": "c"}},
        ),
        (
            {**chat("Where?", "Here."), "tools": [{"name": "look_up"}]},
            {**chat("Where?", "Here."), "tools": [{"name": "calculate"}]},
        ),
    ],
)
def test_what_differs_in_any_part_is_no_exact_duplicate(one, other):
    assert read_said(one).digest != read_said(other).digest


def test_rows_that_teach_different_answers_of_one_conversation_are_no_copies(tmp_path):
    """As of a conversation that is written once for each of its answers, the others with weight 0."""
    turns = [
        turn
        for question, answer in ((STORY, "Who?"), ("The otter.", GERMAN))
        for turn in chat(question, answer)["messages"]
    ]
    rows = [
        {"messages": [{**turn, "weight": int(number == learnt)} for number, turn in enumerate(turns)]}
        for learnt in (1, 3, 1)
    ]
    _, removed = run(tmp_path, write(tmp_path / "rows.jsonl", rows))
    assert [(entry["line"], entry["reason"]) for entry in removed] == [(3, "exact_duplicate")]


ASKED = f"{STORY} Now answer in a word: what does the otter eat, as this story tells it?"


@pytest.mark.parametrize(
    "row",
    [
        lambda answer: {"prompt": ASKED, "answer": answer},
        lambda answer: {"prompt": chat(ASKED, "")["messages"][:1], "reward_model": {"ground_truth": answer}},
        lambda answer: {"conversations": chat(ASKED, "None")["messages"], "gt": [answer]},
        lambda answer: {"instruction": ASKED, "solution": answer},
    ],
    ids=["answer", "verl", "dummy", "alpaca"],
)
def test_rows_to_practise_on_with_other_right_answers_are_no_copies(tmp_path, row):
    """Wherever the right answer stands; verl's rows have it deeper, others behind a dummy of the assistant's."""
    rows = [row(answer) for answer in ("fish", "berries", "fish")]
    _, removed = run(tmp_path, write(tmp_path / "rows.jsonl", rows))
    assert [(entry["line"], entry["reason"]) for entry in removed] == [(3, "exact_duplicate")]
    assert read_said(row("fish")).digest != read_said(row("")).digest


def test_an_instruction_without_an_output_is_a_prompt(tmp_path):
    """`minnow distill generate` and `minnow rl` read it; here it was a bad row."""
    row = {"instruction": "Add the numbers.", "input": "3 and 4", "answer": "7"}
    assert read_said(row).kind == "prompt"
    assert read_said(row).digest == read_said({"prompt": "Add the numbers.\n3 and 4", "answer": "7"}).digest
    with pytest.raises(RowError, match="an `instruction` without an `output`"):
        read_said({"instruction": 5})


def test_a_row_says_its_reasoning_calls_and_results_but_not_its_tools():
    call = {"name": "look_up", "arguments": {"subject": "Fenrik"}}
    row = {
        "tools": [{"name": "look_up", "description": "finds things"}],
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Who hunts Fenrik?"},
            {"role": "assistant", "content": "", "reasoning_content": "I ask.", "tool_calls": [call]},
            {"role": "tool", "content": "owl"},
            {"role": "assistant", "content": "The owl."},
        ],
    }
    said = read_said(row)
    assert said.talk == 'Who hunts Fenrik?\nI ask.\nlook_up {"subject": "Fenrik"}\nowl\nThe owl.'
    assert said.text == f"Be kind.\n{said.talk}"
    assert said.answers == 'I ask.\nlook_up {"subject": "Fenrik"}\nThe owl.'


def test_a_system_message_that_all_rows_share_makes_no_duplicates(tmp_path):
    system = STORY * 5
    rows = [
        chat(f"What is {n} times {n}? Tell me now, please.", f"It is {n * n}, of course.", system) for n in range(9)
    ]
    report, _ = run(tmp_path, write(tmp_path / "rows.jsonl", rows))
    assert report["kept"] == 9


def test_a_conversation_that_ends_with_the_user_is_a_prompt(tmp_path):
    row = {"messages": [{"role": "user", "content": "Where does the otter live?"}]}
    assert read_said(row).kind == "prompt"
    with pytest.raises(RowError, match="must be a list"):
        read_said({"messages": 5})
    with pytest.raises(RowError, match="not valid JSON"):
        read_said({"messages": "[{"})


def test_twice_the_same_and_another_seed_finds_the_same_copies(tmp_path):
    rows = [{"text": f"{STORY} {number // 2} {'again' * (number % 2)}"} for number in range(40)]
    path = write(tmp_path / "rows.jsonl", rows)
    results = []
    for out, seed in (("one", 0), ("two", 0), ("three", 5)):
        run(tmp_path, path, out=out, seed=seed)
        files = sorted(p for p in (tmp_path / out).rglob("*") if p.is_file() and p.name != "report.json")
        results.append([p.read_bytes() for p in files])
    assert results[0] == results[1]
    assert results[0][0] == results[2][0]


def test_short_and_mixed_texts_pass_the_language_filter(tmp_path):
    rows = [
        {"text": text}
        for text in ("ok", "42 + 17 = 59", "x = [i for i in range(9)]", "静夜思 床前明月光", CHINESE, STORY)
    ]
    report, removed = run(tmp_path, write(tmp_path / "rows.jsonl", [*rows, {"text": GERMAN}]), languages=("en", "zh"))
    assert report["kept"] == len(rows)
    assert [entry["line"] for entry in removed] == [7]
    with pytest.raises(UserError, match=r"--languages xx: not known; known are .*en"):
        run(tmp_path, str(tmp_path / "rows.jsonl"), out="other", languages=("en", "xx"))


def test_bad_rows_stop_by_default_and_are_all_named(tmp_path):
    good, bad = {"text": "fine"}, {"txt": "not"}
    first, second = write(tmp_path / "a.jsonl", [good, bad]), write(tmp_path / "b.jsonl", [bad, good])
    with pytest.raises(UserError) as error:
        run(tmp_path, first, second)
    assert f"{first}:2: no `text`" in str(error.value)
    assert f"{second}:1: no `text`" in str(error.value)
    assert "2 of 4 rows are bad" in str(error.value)
    assert "leave such rows out with --on_bad_row skip" in str(error.value)  # it named an option of other commands
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", [{"text": f"row {number}"} for number in range(50)])

    def interrupted(source, **options):
        for number, raw in clean_iter_raw(source, **options):
            if number == 30:
                raise KeyboardInterrupt
            yield number, raw

    clean_iter_raw = clean_module.iter_raw
    monkeypatch.setattr(clean_module, "iter_raw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, path)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_of_two_at_once_the_second_to_be_done_says_so(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", [{"text": "fine"}])

    def slow(*arguments, **options):
        monkeypatch.setattr(clean_module, "iter_raw", reader)
        run(tmp_path, path)
        return reader(*arguments, **options)

    reader = clean_module.iter_raw
    monkeypatch.setattr(clean_module, "iter_raw", slow)
    with pytest.raises(UserError, match="out has been made by another process meanwhile: name a new folder"):
        run(tmp_path, path)
    assert lines(tmp_path / "out" / "kept" / "rows.jsonl")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "rows.jsonl"]


def test_what_makes_no_sense_is_refused_before_any_work(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "fine"}])
    run(tmp_path, path)
    with pytest.raises(UserError, match="exists already"):
        run(tmp_path, path)
    with pytest.raises(UserError, match="a weight"):
        run(tmp_path, f"{path}@2", out="new")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="there is not one row"):
        run(tmp_path, str(tmp_path / "empty.jsonl"), out="new")
    for options in ({"near_duplicates": 1.5}, {"min_characters": -1}, {"min_characters": 9, "max_characters": 8},
                    {"max_characters": 0}):  # fmt: skip
        with pytest.raises(UserError):
            CleanOptions(**options)


def test_the_command_prints_the_table_and_what_it_keeps_can_be_trained_on(tmp_path, capsys):
    rows = [{"text": STORY}, {"text": STORY}, {"text": "[red]hi[/red]"}, {"text": "The heron is grey and waits."}]
    path = write(tmp_path / "rows.jsonl", rows)
    figures = tmp_path / "figures.json"
    arguments = [f"--paths=[{path}]", f"--out={tmp_path / 'out'}", "--min_characters=15", f"--json={figures}"]
    assert main(["data", "clean", *arguments]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "rows in 4" in printed
    assert "exact duplicate 1 25.00%" in printed
    assert "too short 1 25.00%" in printed
    assert "kept 2 50.00%" in printed
    assert json.loads(figures.read_text())["kept"] == 2
    assert main(["data", "clean", *arguments]) == 2
    assert "exists already" in capsys.readouterr().err
    from minnow.data.readers import read_texts

    assert list(read_texts([str(tmp_path / "out" / "kept")])) == [STORY, rows[3]["text"]]
