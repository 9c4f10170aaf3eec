"""Files that were read wrongly in silence: each is now read right, or refused in one line."""

import json

import pytest
from datasets import Dataset

from trl_instruct.data.pairs import load_pairs
from trl_instruct.data.preferences import count_pairs, load_either
from trl_instruct.data.rankings import load_rankings
from trl_instruct.data.reading import Reading
from trl_instruct.data.records import load_demonstrations, load_prompts
from trl_instruct.errors import InputError


def u(text):
    return {"role": "user", "content": text}


def a(text):
    return {"role": "assistant", "content": text}


def rows(*records):
    return Dataset.from_list(list(records))


def written(path, *records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def test_streamed_prompts_are_all_there_in_every_pass(tmp_path):
    path = written(
        tmp_path / "a.jsonl",
        {"instruction": "a", "output": "x"},
        {"instruction": "b", "output": "x"},
    )
    prompts = load_prompts(path, streaming=True)
    for _ in range(2):
        assert [row["prompt"] for row in prompts] == ["a", "b"]


@pytest.mark.parametrize("name", ["query", "Prompt", "prompts", "context", "post", "trajectory"])
def test_pairs_whose_prompt_has_another_name(name):
    """The replies begin alike, which is no prompt."""
    pair = {name: "Capital of France?", "chosen": "The capital is Paris.", "rejected": "The end."}
    with pytest.raises(InputError, match=f"`prompt` missing.*--columns|Rename.*{name}"):
        load_pairs(rows(pair))
    read = load_pairs(rows(pair), reading=Reading({"prompt": name}))
    assert read[0]["prompt"] == "Capital of France?"


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        (("true", "false"), "'true'"),
        (("good", "bad"), "'good'"),
        (("1", "0"), "'1'"),
        (("yes", "no"), "'yes'"),
        (("Positive", "Negative"), "'Positive'"),
        ((1, -1), "-1"),
        ((1, 3), "3"),
    ],
)
@pytest.mark.parametrize("name", ["label", "kto_tag", "Label"])
def test_labels_that_are_not_true_or_false(name, labels, shown):
    given = [
        {"prompt": "q", "completion": reply, name: label}
        for reply, label in zip(("good", "bad"), labels, strict=True)
    ]
    with pytest.raises(InputError, match=f"`label` is .*{shown}; true .a good reply. or false"):
        load_demonstrations(rows(*given))


@pytest.mark.parametrize("question", ["question", "instruction", "input"])
def test_a_bad_reply_is_no_demonstration(question):
    reply = "output" if question == "input" else "response"
    given = [{question: "q", reply: text, "label": text == "yes"} for text in ("yes", "no")]
    assert load_demonstrations(rows(*given))["completion"][:] == ["yes"]


def test_a_text_that_is_rated_twice():
    """Which of two criteria is the order? The last one was taken."""
    answers = {
        f"response_{n}_{criterion}": [{"value": value, "user_id": "bob"}]
        for n, values in (("1", (5, 1)), ("2", (1, 5)))
        for criterion, value in zip(("helpful", "safe"), values, strict=True)
    }
    fields = {"prompt": "q", "response_1": "one", "response_2": "two"}
    with pytest.raises(InputError, match="`response_1` is rated in two questions"):
        load_rankings(rows({"fields": fields, "responses": answers}))
    results = [
        {"value": {"rating": rating}, "to_name": name, "from_name": f"{name}_{tag}"}
        for name, tag, rating in (("one", "a", 5), ("two", "a", 1), ("one", "b", 1))
    ]
    task = {"data": {"prompt": "q", "one": "x", "two": "y"}, "annotations": [{"result": results}]}
    with pytest.raises(InputError, match="a text has two ratings"):
        load_rankings(rows(task))


def test_the_id_of_a_record_is_no_response():
    """`id` stands in the name of the question `validity`."""
    rated = {"validity": 5, "text_1_rating": 2, "text_2_rating": 3}
    answers = {f"{question}.responses": [value] for question, value in rated.items()}
    given = {"id": "r-1", "status": "completed", "prompt": "q", "text_1": "x", "text_2": "y"}
    read = load_rankings(rows(given | answers))
    assert read[0]["responses"] == ["x", "y"] and read[0]["ranks"] == [2, 1]


def test_ratings_of_label_studio_in_two_tasks(caplog):
    """Each has an answer; the question may have another name."""
    tasks = [
        {
            "data": {"question": "q", "completion": text},
            "annotations": [{"result": [{"value": {"rating": rating}}]}],
        }
        for text, rating in (("x", 2), ("y", 5))
    ]
    with pytest.raises(InputError, match="prompt"):
        load_rankings(rows(*tasks))
    for task in tasks:
        task["data"]["prompt"] = task["data"].pop("question")
    read = load_rankings(rows(*tasks))
    assert read[0]["ranks"] == [2, 1] and "left out" not in caplog.text


def test_our_own_rating_layout_in_json_min():
    given = {
        **{"prompt": "q", "response_1": "x", "response_2": "y", "annotator": 1},
        **{"annotation_id": 3, "response_1_rating": [{"rating": 4}]},
        "response_2_rating": [{"rating": 5}],
    }
    read = load_rankings(rows(given))
    assert read[0]["responses"] == ["x", "y"] and read[0]["ranks"] == [2, 1]


def test_what_a_chat_template_reads_is_kept():
    tools = '[{"type": "function"}]'
    kto = {"prompt": [u("q")], "completion": [a("x")], "label": True, "tools": tools}
    assert load_demonstrations(rows(kto))[0]["tools"] == tools
    pair = {"prompt": "q", "chosen": "x", "rejected": "y", "score_chosen": 2, "score_rejected": 1}
    assert load_rankings(rows(pair | {"tools": tools}))[0]["tools"] == tools


def test_a_call_of_a_tool_is_not_dropped():
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    turns = [{**u("q"), "tool_calls": None}, call, {**a("x"), "tool_calls": None}]
    with pytest.raises(InputError, match=r"`conversations\[1\]` calls a tool"):
        load_demonstrations(rows({"conversations": turns}))


def test_messages_that_are_written_as_text():
    text = json.dumps([u("Hi")])
    with pytest.raises(InputError, match="`prompt` is messages as text"):
        load_prompts(rows({"prompt": text}))
    pair = {"prompt": "Hi", "chosen": json.dumps([a("x")]), "rejected": json.dumps([a("y")])}
    with pytest.raises(InputError, match="`chosen` is messages as text"):
        load_pairs(rows(pair))
    assert load_prompts(rows({"prompt": '[{"key": 1}] is a list of what?'}))[0]["prompt"]


def test_one_empty_reply_leaves_no_prompt_doubled():
    pairs = [{"prompt": f"Q{n}:", "chosen": f"Q{n}: yes", "rejected": f"Q{n}: no"} for n in (1, 2)]
    pairs[1]["rejected"] = "Q2:"
    with pytest.raises(InputError, match="row 2: `rejected` is empty"):
        load_pairs(rows(*pairs))
    kept = load_pairs(rows(*pairs), reading=Reading(on_bad_record="skip"))
    assert kept["chosen"][:] == [" yes"]


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_system_prompts_are_kept(name):
    """OpenOrca, Nemotron, Alpaca, ShareGPT."""
    told = {"role": "system", "content": "Be brief."}
    for given in (
        {"question": "q", "response": "x"},
        {"input": "q", "output": "x"},
        {"instruction": "q", "output": "x"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]},
    ):
        read = load_demonstrations(rows({**given, name: "Be brief."}))[0]
        assert (read["prompt"], read["completion"]) == ([told, u("q")], [a("x")])
    talk = {"context_messages": [u("q")], "response": "x", name: "Be brief."}
    assert load_prompts(rows(talk))[0]["prompt"] == [told, u("q")]


@pytest.mark.parametrize("name", ["choice", "chosen_index", "better_response_id", "preferred"])
def test_an_order_under_another_name(name):
    with pytest.raises(InputError, match=f"`{name}` is .*which looks like the order"):
        load_rankings(rows({"prompt": "q", "responses": ["a", "b"], name: 1}))


@pytest.mark.parametrize(
    ("roles", "write"),
    [(("human", "gpt"), "user"), (("User", "Assistant"), "user"), (("user", "model"), "assistant")],
)
def test_roles_that_no_chat_template_knows(roles, write):
    """The whole dialogue, with its reply, was the prompt."""
    turns = [{"role": role, "content": "x"} for role in roles]
    for load in (load_prompts, load_demonstrations):
        with pytest.raises(InputError, match=f"is of role .*; write '{write}'"):
            load(rows({"messages": turns}))


def test_rankings_and_pairs_in_one_mixture(tmp_path):
    ranking = {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [1, 2, 3]}
    pair = {"prompt": "p", "chosen": "x", "rejected": "y"}
    paths = [written(tmp_path / "r.jsonl", ranking), written(tmp_path / "p.jsonl", pair)]
    mixed = load_either([{"path": str(path)} for path in paths])
    assert mixed["responses"][:] == [["a", "b", "c"], ["x", "y"]]
    assert mixed["ranks"][:] == [[1, 2, 3], [1, 2]] and count_pairs(mixed) == 4
    named = [written(tmp_path / f"{n}.jsonl", ranking | {"chosen": n}) for n in "vw"]
    alone = load_either([{"path": str(path)} for path in named])
    assert alone["chosen"][:] == ["v", "w"] and len(alone["responses"][0]) == 3
    for share in (0, "0.5", -1):
        shares = [{"path": str(path), "fraction": share} for path in paths]
        with pytest.raises(InputError, match="fraction: give it for each, above 0"):
            load_either(shares)


def test_a_name_that_is_a_pattern(tmp_path):
    """`[a].jsonl` is not `a.jsonl`."""
    written(tmp_path / "a.jsonl", {"prompt": "other"})
    path = written(tmp_path / "[a].jsonl", {"prompt": "own"})
    assert load_prompts(path)["prompt"][:] == ["own"]


def test_an_exported_row_without_fields():
    given = [{"fields": {"question": "q"}, "responses": {}}, {"fields": None, "responses": {}}]
    with pytest.raises(InputError):
        load_rankings(rows(*given), reading=Reading({"prompt": "question"}))


def test_one_of_pku_safe_rlhfs_columns_can_be_named():
    given = {"prompt": "q", "response_0": "x", "response_1": "y", "better_response_id": 1}
    read = load_rankings(rows(given), reading=Reading({"ranks": "better_response_id"}))
    assert read[0]["ranks"] == [2, 1]


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_prompt_beside_messages(column, caplog):
    """It is put before them, unless they begin with one."""
    own = {"role": "system", "content": "Own."}
    talks = [[u("q"), a("r")], [u("q2"), a("r2")], [own, u("q3"), a("r3")]]
    data = rows(*({"messages": m, column: t} for m, t in zip(talks, ["", "S", "S"], strict=True)))
    found = load_demonstrations(data)
    assert [row["prompt"][0]["content"] for row in found] == ["q", "S", "Own."]
    assert found["completion"][:] == [talk[-1:] for talk in talks]
    assert "system prompt beside messages" in caplog.text
    prompts = load_prompts(rows(*data))
    assert [row["prompt"][0]["content"] for row in prompts] == ["q", "S", "Own."]


def test_tool_calls_beside_a_system_prompt_are_kept():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    talk = [u("q"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    found = load_demonstrations(rows({"messages": talk, "system": "S"}))[0]
    assert found["prompt"][0]["content"] == "S"
    assert found["completion"][0]["tool_calls"] == [call]


@pytest.mark.parametrize(
    "text",
    [
        "prompt,completion\nName a city, please.,Rome\nName a river, please.,Po\n",
        "prompt,chosen,rejected\nq,yes, sure,no\nq2,well, sure,no\n",
        "prompt,completion\na,b,\nc,d,\n",
    ],
)
def test_a_csv_with_more_cells_than_its_header(text, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8")
    for load in (load_demonstrations, load_either, load_prompts):
        with pytest.raises(InputError, match=r"a\.csv: rows have more cells than the header"):
            load(path)
    path.write_text("prompt,completion,__index_level_0__\na,b,7\n", encoding="utf-8")
    assert load_demonstrations(path)["completion"][:] == ["b"]


def test_messages_that_are_no_list_beside_a_system_prompt():
    with pytest.raises(InputError, match="`messages` is dict"):
        load_demonstrations(rows({"messages": u("q"), "system": "S"}))
    with pytest.raises(InputError, match=r"`system` is list \['S'\]; text is needed"):
        load_demonstrations(rows({"messages": [u("q"), a("r")], "system": ["S"]}))


def test_a_system_prompt_beside_pairs_of_messages():
    pair = {"system": "S", "chosen": [u("q"), a("good")], "rejected": [u("q"), a("bad")]}
    found = load_pairs(rows(pair))[0]
    assert found["prompt"] == [{"role": "system", "content": "S"}, u("q")]
    assert (found["chosen"], found["rejected"]) == ([a("good")], [a("bad")])


@pytest.mark.parametrize("parts", [False, True])
def test_a_system_prompt_beside_dialogues_of_every_shape(parts):
    """Contents in parts, rated pairs, prompts of pairs, another tool's pairs."""

    def said(message):
        content = message["content"]
        return message | {"content": [{"type": "text", "text": content}] if parts else content}

    good, bad = [said(u("q")), said(a("good"))], [said(u("q")), said(a("bad"))]
    prompt = [{"role": "system", "content": "S"}, u("q")]
    shown = load_demonstrations(rows({"messages": good, "system": "S"}))[0]
    assert (shown["prompt"], shown["completion"]) == (prompt, [a("good")])
    assert load_prompts(rows({"messages": good, "system": "S"}))[0]["prompt"] == prompt
    if parts:  # pairs need contents of text
        return
    pair = {"chosen": good, "rejected": bad, "system": "S"}
    rated = pair | {"score_chosen": 5.0, "score_rejected": 1.0}
    swift = {"messages": good, "rejected_response": "bad", "system": "S"}
    for given in (pair, rated, swift):
        found = load_pairs(rows(given))[0]
        assert (found["prompt"], found["chosen"]) == (prompt, [a("good")])
        assert found["rejected"] == [a("bad")]
    assert load_prompts(rows(pair))[0]["prompt"] == prompt
