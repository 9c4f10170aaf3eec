import gzip
import json
import re
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from trl_instruct.data import sources
from trl_instruct.data.records import load_prompts
from trl_instruct.data.sources import Source, load_records
from trl_instruct.errors import InputError

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}, {"prompt": "c", "n": 3}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(path: Path, text: str) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", LINES),
        ("b.json", LINES),
        ("c.jsonl.gz", LINES),
        ("d.json", json.dumps(ROWS, indent=1)),
        ("e.json.gz", json.dumps(ROWS)),
        ("f.csv", "prompt,n\na,1\nb,2\nc,3\n"),
    ],
)
def test_every_text_format_gives_the_same_rows(tmp_path, name, text, streaming):
    dataset = load_records(write(tmp_path / name, text), streaming=streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    assert list(dataset) == ROWS


def test_parquet_folder_and_saved_folder(tmp_path):
    dataset = Dataset.from_list(ROWS)
    (tmp_path / "folder").mkdir()
    dataset.to_parquet(tmp_path / "folder" / "train.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(tmp_path / "splits")
    assert load_records(tmp_path / "folder" / "train.parquet").to_list() == ROWS
    assert load_records(tmp_path / "folder").to_list() == ROWS
    assert load_records(str(tmp_path / "saved")).to_list() == ROWS
    assert load_records(tmp_path / "splits", split="test").to_list() == ROWS[:1]
    assert list(load_records(tmp_path / "splits", streaming=True)) == ROWS


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_csv_files_is_read_as_one_of_them(tmp_path, streaming):
    text = 'prompt,responses,ranks\nNA,"[""None"", ""b""]","[1, 2]"\n'
    write(tmp_path / "train.csv", text)
    (row,) = load_records(tmp_path / "train.csv", streaming=streaming)
    assert row == {"prompt": "NA", "responses": ["None", "b"], "ranks": [1, 2]}
    assert list(load_records(tmp_path, streaming=streaming)) == [row]


def test_faults_in_a_folder_of_csv_files_are_one_line(tmp_path):
    write(tmp_path / "a.csv", 'prompt,responses\nA,"[""x""]"\n')
    write(tmp_path / "b.csv", "prompt,n\nB,1\n")
    assert [row["prompt"] for row in load_records(tmp_path, streaming=True)] == ["A", "B"]
    with pytest.raises(InputError, match="could not be loaded: Schema at index 1") as caught:
        load_records(tmp_path)
    assert "\n" not in str(caught.value)
    write(tmp_path / "b.csv", "prompt,responses\nA,[x\n")
    with pytest.raises(InputError, match=f"^{tmp_path}, row 2: `responses` is str"):
        load_records(tmp_path)
    write(tmp_path / "b.csv", "prompt;n\nA;1\n")
    with pytest.raises(InputError, match="b.csv: the columns are separated by ';'"):
        load_records(tmp_path)


def test_files_that_a_folder_leaves_out_are_named(tmp_path, monkeypatch, caplog):
    write(tmp_path / "train.jsonl", LINES)
    write(tmp_path / "metrics.json", "{}")
    monkeypatch.chdir(tmp_path)
    assert list(load_records(".")) == ROWS and not caplog.messages
    write(tmp_path / "more.jsonl", LINES)
    write(tmp_path / "old.csv", "prompt,n\na,1\n")
    assert list(load_records(tmp_path)) == ROWS
    left_out = "left out by kind or name: more.jsonl, old.csv."
    assert caplog.messages == [f"{tmp_path}: read as json; {left_out}"]


def test_a_dataset_is_taken_as_it_is():
    dataset = Dataset.from_list(ROWS)
    stream = dataset.to_iterable_dataset()
    assert load_records(dataset) is dataset
    assert load_records(stream) is stream
    assert load_records(DatasetDict(train=dataset)) is dataset


def test_a_slice_of_a_file_is_counted_in_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", LINES)
    assert load_records(path, split="train[1:]").to_list() == ROWS[1:]
    assert Source.of(path, "train[1:]").where(0).endswith("(train[1:]), row 1")


def test_text_cells_of_a_csv_stay_text(tmp_path):
    path = write(tmp_path / "a.csv", 'prompt,completion,n\nNA,007,1\n"x\ny",null,2\n')
    assert load_records(path).to_list() == [
        {"prompt": "NA", "completion": "007", "n": 1},
        {"prompt": "x\ny", "completion": "null", "n": 2},
    ]


def test_lists_in_the_cells_of_a_csv_are_json(tmp_path):
    path = write(
        tmp_path / "a.csv", 'prompt,responses,scores\nq,"[""a"", ""b""]","[1, 2.5]"\nr,,\n'
    )
    assert load_records(path).to_list() == [
        {"prompt": "q", "responses": ["a", "b"], "scores": [1.0, 2.5]},
        {"prompt": "r", "responses": None, "scores": None},
    ]
    path = write(tmp_path / "b.csv", "prompt,responses\nq,a;b\n")
    with pytest.raises(InputError, match=r"b.csv, row 1: `responses` is str 'a;b'; a JSON list is"):
        load_records(path)


def test_where_counts_lines_with_blank_ones(tmp_path):
    path = write(tmp_path / "a.jsonl", '\n{"a": 1}\n\n{"a": 2}\n')
    assert Source.of(path).where(1) == f"{path}, line 4"
    assert Source.of(write(tmp_path / "a.json", "[]")).where(1) == f"{tmp_path}/a.json, row 2"
    assert Source.of(Dataset.from_list(ROWS)).where(0) == "the given Dataset, row 1"


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"\n', r"a.jsonl, line 3: malformed JSON"),
        ("a.jsonl.gz", '{"a": 1}\nnot json\n', r"gz, line 2: malformed JSON .*'not json'"),
        ("a.json", '[{"prompt": "a"},\n{"prompt": }]', r"a.json, line 2: malformed JSON"),
        ("a.jsonl", '{"a": 1}\n"text"\n', r"line 2: str 'text'; each line needs a JSON object"),
        ("a.jsonl", '{"a": "b"}\n{"a": "\\ud83d c"}\n', r"line 2: \\ud83d is half of a surrogate"),
        ("a.jsonl", "", r"a.jsonl holds no records"),
        ("a.json", "[]", r"a.json holds no records"),
        ("a.csv", "prompt,n\n", r"a.csv holds no records"),
        ("a.jsonl", '\nnull\n{"a": 1}\n', r"a.jsonl begins with null"),  # ends pyarrow's process
        ("a.json", "null", r"a.json begins with null"),
        (
            "a.jsonl",
            '{"a": ' + "[" * 1000 + "]" * 1000 + "}",
            r"a.jsonl cannot be read: .*recursion",
        ),
    ],
)
def test_unreadable_files(tmp_path, name, text, message, streaming):
    with pytest.raises(InputError, match=message):
        load_records(write(tmp_path / name, text), streaming=streaming)


@pytest.mark.slow
def test_a_late_fault_of_a_stream_names_its_line(tmp_path):
    rows = [json.dumps({"prompt": "x" * 1000}) for _ in range(12_000)]
    path = write(tmp_path / "a.jsonl", "\n".join([*rows, '{"prompt": ']))
    with pytest.raises(InputError, match=r"a.jsonl, line 12001: malformed JSON"):
        list(load_records(path, streaming=True))


def test_a_file_that_is_not_gzip_or_not_utf8(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(b'{"a": 1}\n')
    (tmp_path / "b.jsonl").write_bytes(b'{"a": "\xff\xfe"}\n')
    with pytest.raises(InputError, match=r"a.jsonl.gz cannot be read: Not a gzipped file"):
        load_records(tmp_path / "a.jsonl.gz")
    with pytest.raises(InputError, match="b.jsonl: the records are not UTF-8 text"):
        load_records(tmp_path / "b.jsonl")
    rows = b'{"prompt": "a"}\n' * 1000 + b'{"prompt": "\xff"}\n'  # behind the first batch
    (tmp_path / "c.jsonl").write_bytes(rows)
    with pytest.raises(InputError, match="c.jsonl: the records are not UTF-8 text"):
        load_prompts(tmp_path / "c.jsonl")


@pytest.mark.parametrize("mark", [";", "\t", "|"])
def test_a_csv_without_commas(tmp_path, mark):
    path = write(tmp_path / "a.csv", f"\ufeffprompt{mark}completion\na{mark}b\n")
    with pytest.raises(InputError, match="a.csv: the columns are separated by .*; commas are"):
        load_records(path)


def test_the_reader_of_datasets_says_nothing_beside_our_error(tmp_path, caplog):
    with pytest.raises(InputError, match="line 2: malformed JSON"):
        load_records(write(tmp_path / "a.jsonl", '{"prompt": "a"}\nnot json\n'))
    assert not caplog.records


@pytest.mark.parametrize("name", ["a.jsonl", "./a", "nowhere/a.csv", "a.parquet"])
def test_a_missing_file(name):
    with pytest.raises(InputError, match=r"no such file or folder \(looked in "):
        load_records(name)


@pytest.mark.parametrize("split", ["train[:200%]", "train[a:b]", "train["])
def test_a_slice_that_cannot_be_is_no_malformed_json(tmp_path, split):
    path = write(tmp_path / "a.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(InputError, match=re.escape(f"a.jsonl ({split})")) as told:
        load_records(path, split)
    assert "malformed" not in str(told.value)


@pytest.mark.parametrize("name", ["state.json", "dataset_dict.json"])
@pytest.mark.parametrize("content", ["{", "{}", "[1]"])
def test_a_saved_dataset_that_is_cut(tmp_path, name, content):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / name, content)
    with pytest.raises(InputError, match="data: (the folder holds no whole saved|split 'train')"):
        load_records(tmp_path / "data")


def test_faults_of_place_and_type(tmp_path):
    with pytest.raises(InputError, match=r"extension must be one of \.json, .*found 'a.txt'"):
        load_records(write(tmp_path / "a.txt", "x"))
    with pytest.raises(InputError, match=r"from a list\. .*Dataset\.from_list"):
        load_records(ROWS)
    with pytest.raises(InputError, match="holds no records"):
        load_records(Dataset.from_list([]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"the folder holds no data file \(\.json, "):
        load_records(tmp_path / "empty")


def test_a_missing_split_lists_the_others(tmp_path):
    splits = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS))
    with pytest.raises(InputError, match=r"no split 'dev'; there are train, test"):
        load_records(splits, split="dev")
    with pytest.raises(InputError, match=r"no split 'dev'; a single file has only 'train'"):
        load_records(write(tmp_path / "a.jsonl", LINES), split="dev")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach it"), "someone/data: no file or folder here, .*reach it"),
        (FileNotFoundError("doesn't exist"), "someone/data: no file or folder here"),
        (ValueError("Unknown split. Should be one of ['a']"), "split 'train' could .*one of"),
    ],
)
def test_faults_of_the_hub(monkeypatch, error, message):
    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=message):
        load_records("someone/data")


@pytest.mark.slow
def test_the_tiny_world():
    tiny = pytest.importorskip("trl_instruct.tiny")
    if not hasattr(tiny, "split"):
        pytest.skip("the tiny world has no split() yet")
    assert "prompt" in load_records("tiny:prompts").column_names
    assert isinstance(load_records("tiny:prompts", streaming=True), IterableDataset)
    with pytest.raises(InputError, match="tiny:nothing"):
        load_records("tiny:nothing")


@pytest.mark.slow
@pytest.mark.parametrize("early", [{}, {"source": None}])
def test_a_column_that_comes_after_the_first_block_of_a_file(tmp_path, early):
    rows = [{"prompt": f"a{n}", "completion": "x" * 700, **early} for n in range(16_000)]
    rows.append({"prompt": "z", "completion": "b", "source": "x"})
    loaded = load_records(write(tmp_path / "late.jsonl", "\n".join(map(json.dumps, rows))))
    assert loaded[0]["source"] is None and loaded[16_000]["source"] == "x"
