"""Sources: records by index from files, and every kind of bad file refused with a remedy."""

import json
import pickle

import pyarrow
import pyarrow.parquet
import pytest

from research.core.sources import DataError, SourceConfig, check, open_source


def jsonl(path, *records, **keys):
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return SourceConfig(str(path), **(keys or {"text_key": "text"}))


def parquet(path, columns, **keys):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return SourceConfig(str(path), "parquet", **keys)


def test_json_lines_by_index(tmp_path):
    texts = ["erste", "zweite Zeile: ä €", "x" * 5000, "\u2028 is no line end", ""]
    source = open_source(jsonl(tmp_path / "a.jsonl", *({"text": t, "id": 1} for t in texts)))
    assert len(source) == 5
    for index in (3, 0, 4, 2, 1, 2):
        assert source[index] == {"text": texts[index]}
    copy = pickle.loads(pickle.dumps(source))  # as sent to a worker, its file open or not
    assert copy[1] == {"text": texts[1]}


def test_json_lines_tolerate_blank_lines_and_a_missing_last_newline(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "a"}\r\n  \n\n{"text": "b"}')
    source = open_source(SourceConfig(str(path), text_key="text"))
    assert [source[i]["text"] for i in range(len(source))] == ["a", "b"]
    assert source.where(1).endswith("line 5")


def test_prompts_are_strings_or_messages(tmp_path):
    messages = [{"role": "user", "content": "1 + 1?"}]
    pairs = [{"q": "2 + 2?", "a": "4"}, {"q": messages, "a": "2"}]
    source = open_source(jsonl(tmp_path / "a.jsonl", *pairs, prompt_key="q", response_key="a"))
    assert source[0] == {"prompt": "2 + 2?", "response": "4"}
    assert source[1] == {"prompt": messages, "response": "2"}


def test_preferences_have_two_answers(tmp_path):
    record = {"q": "2 + 2?", "good": "4", "bad": "5"}
    keys = {"prompt_key": "q", "chosen_key": "good", "rejected_key": "bad"}
    source = open_source(jsonl(tmp_path / "a.jsonl", record, **keys))
    assert source[0] == {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
    with pytest.raises(DataError, match="'bad' is null, not a string"):
        open_source(jsonl(tmp_path / "b.jsonl", record | {"bad": None}, **keys))


def test_parquet_by_index(tmp_path):
    columns = {"text": list("abcde"), "unused": [1, 2, 3, 4, 5]}
    source = open_source(parquet(tmp_path / "a.parquet", columns, text_key="text"))
    assert [source[i]["text"] for i in (4, 0, 2)] == ["e", "a", "c"]
    assert pickle.loads(pickle.dumps(source))[3] == {"text": "d"}
    messages = [[{"role": "user", "content": "1 + 1?"}]]
    columns = {"q": messages, "a": ["2"]}
    pairs = open_source(parquet(tmp_path / "b.parquet", columns, prompt_key="q", response_key="a"))
    assert pairs[0] == {"prompt": messages[0], "response": "2"}


def test_text_documents_are_separated_by_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo lines\n\n\n  \nsecond ä\n\nthird\n", encoding="utf-8")
    source = open_source(SourceConfig(str(path), "text"))
    texts = [source[i]["text"] for i in range(len(source))]
    assert texts == ["one\ntwo lines", "second ä", "third"]


def test_patterns_join_files_in_order(tmp_path):
    for name in ("b", "a", "c"):
        jsonl(tmp_path / f"{name}.jsonl", {"text": f"{name}0"}, {"text": f"{name}1"})
    source = open_source(SourceConfig(str(tmp_path / "*.jsonl"), text_key="text"))
    assert [source[i]["text"] for i in range(6)] == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert source.where(3).endswith("b.jsonl, line 2")


@pytest.mark.parametrize(
    "content, words",
    [
        (b'{"text": "a"}\n{"text": \n', ["bad.jsonl, line 2", "not JSON", "delete"]),
        (b'{"text": "a"}\n\n["text"]\n', ["bad.jsonl, line 3", "list", '{"text": "…"}']),
        (b'{"txt": "a", "id": 3}\n', ["bad.jsonl, line 1", "no key 'text'", "'txt', 'id'"]),
        (b'{"text": 7}\n', ["bad.jsonl, line 1", "'text' is int"]),
        (b'{"text": null}\n', ["bad.jsonl, line 1", "'text' is null"]),
        (b'{"text": "\xff"}\n', ["bad.jsonl, line 1", "not JSON", "utf-8"]),
        (b"", ["bad.jsonl is empty"]),
        (b"\n \n", ["bad.jsonl is empty"]),
    ],
)
def test_bad_json_lines_name_file_line_and_remedy(tmp_path, content, words):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        open_source(SourceConfig(str(path), text_key="text"))
    for word in words:
        assert word in str(error.value)


def test_bad_messages_are_named(tmp_path):
    bad = jsonl(tmp_path / "a.jsonl", {"q": ["hello"], "a": ""}, prompt_key="q", response_key="a")
    with pytest.raises(DataError, match="line 1.*messages with 'role'"):
        open_source(bad)


def test_bad_parquet_is_named(tmp_path):
    with pytest.raises(DataError, match="no key 'text'; it has 'txt'"):
        open_source(parquet(tmp_path / "a.parquet", {"txt": ["a"]}, text_key="text"))
    with pytest.raises(DataError, match="row 2: 'text' is null"):
        open_source(parquet(tmp_path / "b.parquet", {"text": ["a", "b", None]}, text_key="text"))
    with pytest.raises(DataError, match="is empty"):
        empty = pyarrow.array([], pyarrow.string())
        open_source(parquet(tmp_path / "c.parquet", {"text": empty}, text_key="text"))
    (tmp_path / "d.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(DataError, match="d.parquet is not a Parquet file"):
        open_source(SourceConfig(str(tmp_path / "d.parquet"), "parquet", text_key="text"))


def test_bad_text_is_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"gut\n\nnicht\ngut: " + "ä".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.txt, line 4 \(document 1\): not UTF-8"):
        open_source(SourceConfig(str(path), "text"))
    path.write_bytes(b"\n\n")
    with pytest.raises(DataError, match="a.txt is empty"):
        open_source(SourceConfig(str(path), "text"))


def test_missing_files_and_directories(tmp_path):
    (tmp_path / "there.jsonl").write_text("{}\n")
    with pytest.raises(FileNotFoundError, match=r"here.jsonl.*holds \['there.jsonl'\]"):
        open_source(SourceConfig(str(tmp_path / "here.jsonl"), text_key="text"))
    with pytest.raises(FileNotFoundError, match="correct the source's path"):
        check(SourceConfig(str(tmp_path / "here.jsonl"), text_key="text"))
    check(SourceConfig(str(tmp_path / "there.jsonl"), text_key="text"))  # not read
    with pytest.raises(FileNotFoundError, match="is a directory"):
        open_source(SourceConfig(str(tmp_path), text_key="text"))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_source(SourceConfig(str(tmp_path / "no" / "x.jsonl"), text_key="text"))


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"prompt_key": "p"},
        {"text_key": "t", "prompt_key": "p"},
        {"prompt_key": "p", "chosen_key": "c"},
        {"prompt_key": "p", "response_key": "r", "chosen_key": "c", "rejected_key": "x"},
    ],
)
def test_keys_must_say_documents_or_pairs(tmp_path, keys):
    (tmp_path / "a.jsonl").write_text("{}\n")
    config = SourceConfig(str(tmp_path / "a.jsonl"), **keys)
    for refuses in (open_source, check):
        with pytest.raises(ValueError, match="set text_key .* or both prompt_key and response_key"):
            refuses(config)
