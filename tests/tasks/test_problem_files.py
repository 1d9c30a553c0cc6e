"""Problems from files: what is read, what is refused, and that training never sees a test row."""

import json

import pytest

from research import tasks

GSM8K = [
    {"question": "Two and two?", "answer": "2+2=<<2+2=4>>4\n#### 4"},
    {"question": "A thousand and one?", "answer": "Easy.\n#### 1,001"},
    {"question": "Half of one?", "answer": "It is #### half: \n#### 0.5 "},
]
MATH = [
    {"problem": "Name $x$.", "answer": r"\frac{1}{2}", "level": "Level 5", "subject": "Algebra"},
    {"problem": "Name $y$.", "solution": r"First \boxed{3}, so $\boxed{\{4\}}$.", "type": "Sets"},
    {"problem": "Name $z$.", "answer": 7, "level": 2},
    {"question": "Name $t$.", "answer": "t", "level": "Level ?"},
]


def write(path, rows):
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    return str(path)


def test_gsm8k_answers_follow_the_last_mark(tmp_path):
    task = tasks.make("gsm8k", test_file=write(tmp_path / "a.jsonl", GSM8K))
    problems = [task.problem("test", i) for i in range(task.size("test"))]
    assert [p.answer for p in problems] == ["4", "1,001", "0.5"]
    assert [p.question for p in problems] == [row["question"] for row in GSM8K]
    assert task.quick(problems[1], "1001")
    assert task.quick(problems[1], "1002") is False
    assert task.verify(problems[2], r"\frac12")


def test_math_answers_levels_and_subjects(tmp_path):
    task = tasks.make("math", test_file=write(tmp_path / "a.jsonl", [*MATH[:2], "\n", *MATH[2:]]))
    problems = [task.problem("test", i) for i in range(task.size("test"))]
    assert [p.answer for p in problems] == [r"\frac{1}{2}", r"\{4\}", "7", "t"]
    assert [p.difficulty for p in problems] == [5, 0, 2, 0]
    assert [p.data.get("subject") for p in problems] == ["Algebra", "Sets", None, None]
    assert task.canonical(problems[0], " $0.50$ ") == task.canonical(problems[0], r"\dfrac{1}{2}")
    with pytest.raises(IndexError, match="size is 4"):
        task.problem("test", 4)


def test_training_goes_round_in_a_new_order_each_time(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(50)]
    path = write(tmp_path / "train.jsonl", rows)
    task = tasks.make("gsm8k", train_file=path)
    assert task.size("train") == 50
    passes = [[task.problem("train", 50 * p + i).question for i in range(50)] for p in range(3)]
    assert all(sorted(order) == sorted(row["question"] for row in rows) for order in passes)
    assert passes[0] != passes[1] != passes[2]
    again = tasks.make("gsm8k", train_file=path)
    assert again.problem("train", 137).question == passes[2][37]
    assert again.problem("train", 3).question == passes[0][3]
    other = tasks.make("gsm8k", train_file=path, seed=1)
    assert [other.problem("train", i).question for i in range(50)] != passes[0]


def test_training_leaves_out_what_is_in_the_test_file(tmp_path):
    test = write(tmp_path / "test.jsonl", GSM8K[:1])
    shouted = GSM8K[0] | {"question": "  TWO and\ntwo? "}
    train = write(tmp_path / "train.jsonl", [*GSM8K, shouted])
    task = tasks.make("gsm8k", train_file=train, test_file=test)
    assert task.size("train") == 2
    drawn = {task.problem("train", i).question for i in range(10)}
    assert drawn == {GSM8K[1]["question"], GSM8K[2]["question"]}
    with pytest.raises(ValueError, match="every problem is in"):
        tasks.make("gsm8k", train_file=test, test_file=test)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("gsm8k", '{"question": "q", \n', r"a\.jsonl:2: not JSON .*one JSON object"),
        ("gsm8k", "[1]\n", r"a\.jsonl:2: not an object"),
        (
            "gsm8k",
            {"question": "q"},
            r"a\.jsonl:2: no text under 'answer'; its keys are \['question'\]",
        ),
        (
            "gsm8k",
            {"question": " ", "answer": "#### 1"},
            r":2: no text under 'question' or 'problem'",
        ),
        (
            "gsm8k",
            {"question": "q", "answer": "1"},
            r":2: .*'#### N'; is this file for the 'math' task",
        ),
        ("gsm8k", {"question": "q", "answer": "1 ####"}, r":2: .*'#### N'"),
        ("math", {"problem": "q", "solution": "it is 5"}, r":2: no 'answer', and no \\boxed"),
        ("math", {"problem": "q"}, r":2: no text under 'solution'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, name, row, message):
    good = {"gsm8k": GSM8K[0], "math": MATH[0]}[name]
    with pytest.raises(ValueError, match=message):
        tasks.make(name, test_file=write(tmp_path / "a.jsonl", [good, row]))


def test_files_that_are_not_there_or_empty_or_not_given(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl.*set test_file"):
        tasks.make("math", test_file=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="no problems in it"):
        tasks.make("math", test_file=write(tmp_path / "empty.jsonl", ["\n"]))
    with pytest.raises(ValueError, match="test_file .* or train_file"):
        tasks.make("math")
    task = tasks.make("math", test_file=write(tmp_path / "a.jsonl", MATH))
    with pytest.raises(ValueError, match="no train file: set train_file"):
        task.problem("train", 0)
    with pytest.raises(ValueError, match="'dev'"):
        task.problem("dev", 0)
