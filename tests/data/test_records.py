import json
from pathlib import Path

import pytest
from datasets import Dataset

from trl_instruct.data.dialogues import (
    extract_prompt,
    messages_of,
    prompt_in_dialogue,
    split_reply,
)
from trl_instruct.data.records import (
    check_pair,
    check_reply,
    load_demonstrations,
    load_prompts,
    load_texts,
    openings,
)
from trl_instruct.errors import InputError

DATA = Path(__file__).parents[3] / "shared" / "data"


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def real(name):
    if not (DATA / name).is_file():
        pytest.skip(f"{name} lies in ../shared/data on the developers' machines only")
    return DATA / name


GOOD = {"prompt": "2+2=", "completion": "four"}
CHAT = {"prompt": [user("2+2=")], "completion": [assistant("four")]}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("row", [GOOD, CHAT])
def test_demonstrations_of_both_formats(tmp_path, row, streaming):
    rows = [{**row, "id": 1}, {**row, "id": 2}]
    dataset = load_demonstrations(write(tmp_path / "a.jsonl", rows), streaming=streaming)
    assert list(dataset) == rows


@pytest.mark.parametrize("streaming", [False, True])
def test_messages_become_prompt_and_completion(tmp_path, streaming):
    turns = [user("Hi"), assistant("Hello!"), user("2+2="), assistant("4")]
    path = write(tmp_path / "a.jsonl", [{"messages": turns, "id": 7}])
    dataset = load_demonstrations(path, streaming=streaming)
    assert list(dataset) == [{"prompt": turns[:3], "completion": turns[3:], "id": 7}]
    assert set(dataset.column_names) == {"id", "prompt", "completion"}


def test_openings_of_texts(tokenizer):
    """Three bytes of each: half of a letter is none, and a shorter text is a prompt as a whole."""
    texts = Dataset.from_dict({"text": ["naïve film", "ab", "{x} y"], "label": [0, 1, 1]})
    prompts = openings(texts, tokenizer, 3)
    assert prompts["prompt"][:] == ["na", "ab", "{x}"]
    assert prompts["label"][:] == [0, 1, 1]
    assert texts.column_names == ["text", "label"]
    blank = Dataset.from_dict({"text": ["good film", "    good film"]})
    with pytest.raises(InputError, match=r"row 2: `prompt` is empty \('   '\)"):
        openings(blank, tokenizer, 3)


FAULTS = [
    ({"prompt": None, "completion": "4"}, r"`prompt` is null or absent"),
    ({"completion": "4"}, r"`prompt` is null or absent"),
    ({"prompt": " \n", "completion": "4"}, r"`prompt` is empty \(' \\n'\)"),
    ({"prompt": "2+2=", "completion": ""}, r"`completion` is empty \(''\)"),
    ({"prompt": "2+2=", "completion": None}, r"`completion` is null or absent"),
    (CHAT, r"`prompt` is messages, but text in the first record"),
    ({**GOOD, "completion": [assistant("4")]}, r"`completion` is messages, but `prompt` is text"),
]
CHAT_FAULTS = [
    (GOOD, r"`prompt` is text, but messages in the first record"),
    ({**CHAT, "prompt": []}, r"`prompt` is an empty list"),
    ({**CHAT, "completion": "four"}, r"`completion` is text, but `prompt` is messages"),
    ({**CHAT, "completion": [user("4")]}, r"`completion` ends with a message of role 'user'"),
    ({**CHAT, "prompt": [{"role": "user"}]}, r"`prompt\[0\]` has no text `content`"),
    ({**CHAT, "prompt": [{"content": "x"}]}, r"`prompt\[0\]` has no text `role`"),
    ({**CHAT, "prompt": [{"from": "human", "value": "x"}]}, r"`prompt\[0\]` has no text `role`"),
    ({**CHAT, "prompt": [user(" ")]}, r"`prompt\[0\]` is empty"),
    ({**CHAT, "prompt": [user("a"), "b"]}, r"`prompt\[1\]` is str 'b'; a message is"),
]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [(GOOD, *fault) for fault in FAULTS] + [(CHAT, *fault) for fault in CHAT_FAULTS],
)
def test_a_faulty_demonstration_is_named(tmp_path, good, bad, message, streaming):
    path = write(tmp_path / "a.jsonl", [good, good, bad])
    with pytest.raises(InputError, match=r"a\.jsonl, line 3: " + message):
        list(load_demonstrations(path, streaming=streaming))


def test_a_prompt_that_is_a_number(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": 5, "completion": "x"}])
    with pytest.raises(InputError, match=r"line 1: `prompt` is int 5; text or a list of messages"):
        load_demonstrations(path)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "`messages` is null or absent"),
        ([user("a")], "`messages` has 1 message;"),
        ([user("a"), user("b")], "`messages` ends with a message of role 'user'"),
    ],
)
def test_faulty_messages(tmp_path, messages, message):
    rows = [{"messages": [user("a"), assistant("b")]}, {"messages": messages}]
    with pytest.raises(InputError, match="line 2: " + message):
        load_demonstrations(write(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize("streaming", [False, True])
def test_misnamed_columns(tmp_path, streaming):
    path = write(tmp_path / "a.jsonl", [{"query": "2+2=", "answer": "4"}])
    with pytest.raises(InputError) as caught:
        load_demonstrations(path, streaming=streaming)
    assert str(caught.value) == (
        f"{path}: `prompt` and `completion` missing. Columns found: query, answer. A "
        "demonstration needs `prompt` and `completion` or `messages`. Rename the field in the "
        'file, or load it and .rename_column("query", "prompt").'
    )
    with pytest.raises(InputError, match=r"Columns found: a\. .* Add it\."):
        load_prompts(Dataset.from_list([{"a": 1}]))


def test_prompts_keep_further_columns(tmp_path):
    rows = [{"prompt": "a", "country": "Italy"}, {"prompt": "b", "country": None}]
    assert load_prompts(write(tmp_path / "a.jsonl", rows)).to_list() == rows
    with pytest.raises(InputError, match=r"row 2: `prompt` is empty"):
        load_prompts(Dataset.from_list([{"prompt": "a"}, {"prompt": ""}]))


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_without_text_are_left_out_and_logged(tmp_path, caplog, streaming):
    path = write(tmp_path / "a.jsonl", [{"text": "a"}, {"text": " \n"}, {"text": "b"}])
    with caplog.at_level("INFO", logger="trl_instruct"):
        assert list(load_texts(path, streaming=streaming)) == [{"text": "a"}, {"text": "b"}]
    assert "without text" in caplog.text


def test_faulty_texts():
    with pytest.raises(InputError, match="row 2: `text` is null or absent"):
        load_texts(Dataset.from_list([{"text": "a"}, {"text": None}]))
    with pytest.raises(InputError, match="all 1 rows have an empty `text`"):
        load_texts(Dataset.from_list([{"text": ""}]))
    with pytest.raises(InputError, match=r'rename_column\("content", "text"\)'):
        load_texts(Dataset.from_list([{"content": "a"}]))


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Sky is blue.", "Sky is green.", ("Sky is", " blue.", " green.")),
        ("Q A1", "Q A2", ("Q A", "1", "2")),
        ("The tide is out.", "The tide is over.", ("The tide is", " out.", " over.")),
        ("Q:\nA: good", "Q:\nA: great", ("Q:\nA:", " good", " great")),
        ("same", "same", ("same", "", "")),
        ("no", "yes", ("", "no", "yes")),
        (
            "\n\nHuman: a\n\nAssistant: I do",
            "\n\nHuman: a\n\nAssistant: I am",
            ("\n\nHuman: a\n\nAssistant:", " I do", " I am"),
        ),
        (
            [user("a"), assistant("b")],
            [user("a"), assistant("c")],
            ([user("a")], [assistant("b")], [assistant("c")]),
        ),
        # One reply begins with the messages of the other: the shorter keeps its last message.
        (
            [user("a"), assistant("b")],
            [user("a"), assistant("b"), user("c"), assistant("d")],
            ([user("a")], [assistant("b")], [assistant("b"), user("c"), assistant("d")]),
        ),
    ],
)
def test_extract_prompt(chosen, rejected, expected):
    record = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert (record["prompt"], record["chosen"], record["rejected"]) == expected


@pytest.mark.parametrize(
    ("record", "implicit", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": ""}, False, "`rejected` is empty"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, False, "`chosen` is null"),
        ({"prompt": "", "chosen": "c", "rejected": "b"}, False, "`prompt` is empty"),
        ({"chosen": "no", "rejected": "yes"}, True, "`prompt` is empty"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")},
            False,
            "`margin` is float nan; a finite number",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": [assistant("c")]}, False, "`rejected` is mess"),
    ],
)
def test_faulty_pairs(record, implicit, message):
    with pytest.raises(InputError, match=message):
        check_pair(record, form="text", implicit=implicit)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "load"),
    [
        ("alpaca_demos_5k.jsonl.gz", 5000, load_demonstrations),
        ("alpaca_zh_demos_5k.jsonl.gz", 5000, load_demonstrations),
        ("oasst_val_human_demos_en_zh.jsonl.gz", 449, load_demonstrations),
        ("ppo_prompts_en_2k.jsonl.gz", 2000, load_prompts),
        ("ppo_prompts_zh_1k.jsonl.gz", 1000, load_prompts),
        ("text_en.jsonl.gz", 3677, load_texts),
    ],
)
def test_real_files(name, rows, load):
    assert len(load(real(name))) == rows


def test_columns_that_hold_one_field_together_are_to_be_joined():
    row = {"query": "Add.", "input": "2 and 3", "answer": "5"}
    with pytest.raises(InputError, match="Join `query` and `input` into `prompt`") as told:
        load_demonstrations(Dataset.from_list([row]))
    assert "rename" not in str(told.value)


def test_a_column_in_other_letters_is_to_be_renamed():
    with pytest.raises(InputError, match=r'rename_column\(" Completion", "completion"\)'):
        load_demonstrations(Dataset.from_list([{"prompt": "a", " Completion": "b"}]))


def test_a_fault_in_the_last_message_is_counted_from_the_first():
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}]
    with pytest.raises(InputError, match=r"`messages\[1\]` has no text `content`"):
        load_demonstrations(Dataset.from_list([{"messages": talk}]))


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids"])
def test_a_column_named_like_an_argument_of_rewards(name):
    with pytest.raises(InputError, match=f"a column is called `{name}`, .*Rename it"):
        load_prompts(Dataset.from_list([{"prompt": "a", name: "b"}]))


def test_turns_of_either_habit_are_messages():
    turns = [{"from": "human", "value": "Bye"}]
    assert messages_of("conversations", turns) == [{"role": "user", "content": "Bye"}]
    asked = [{"role": "user", "content": "Hi"}]
    assert split_reply(asked)["asked"] == asked
    dialogue = [*asked, {"role": "assistant", "content": "Hello."}]
    assert prompt_in_dialogue({"prompt": "Hi", "chosen": dialogue}, "chosen")
    both = {"chosen": "2+2= 4", "rejected": "2+2= 5"}
    assert extract_prompt(both) == {"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}


def test_an_empty_reply_is_named():
    told = r"^`completion` is empty \(''\); write its text or delete the record\.$"
    with pytest.raises(InputError, match=told):
        check_reply("completion", "", form="text")
    texts = Dataset.from_list([{"text": "Once upon a time."}, {"text": ""}])
    assert load_texts(texts).num_rows == 1
