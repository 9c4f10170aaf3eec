import pytest
from datasets import Dataset

from trl_instruct.data.pairs import load_pairs
from trl_instruct.data.rankings import load_rankings
from trl_instruct.data.records import load_demonstrations
from trl_instruct.errors import InputError


def user(text):
    return {"role": "user", "content": text}


def reply(text):
    return {"role": "assistant", "content": text}


def given(rows, streaming=False):
    dataset = Dataset.from_list(rows)
    return dataset.to_iterable_dataset() if streaming else dataset


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("chat", [False, True])
def test_the_prompt_that_replies_repeat_is_read_once(chat, streaming, caplog):
    prompts = [[user(f"Sea {n}?")] if chat else f"Q: sea {n}?\nA:" for n in range(3)]
    best, worst = ([reply("Red")], [reply("Cat")]) if chat else (" Red", " Cat")
    pairs = [{"prompt": p, "chosen": p + best, "rejected": p + worst} for p in prompts]
    read = list(load_pairs(given(pairs, streaming)))
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in read] == [
        (p, best, worst) for p in prompts
    ]
    assert "`chosen` and `rejected` begin with the prompt, which is taken off" in caplog.text
    shown = [{"prompt": p, "completion": p + best} for p in prompts]
    assert [r["completion"] for r in load_demonstrations(given(shown, streaming))] == [best] * 3
    ranked = [{"prompt": p, "responses": [p + worst, p + best], "ranks": [2, 1]} for p in prompts]
    assert [r["responses"] for r in load_rankings(given(ranked, streaming))] == [[worst, best]] * 3


def test_text_that_happens_to_begin_like_its_prompt_stays(caplog):
    rows = [{"prompt": "Hi", "completion": "Hi!"}, {"prompt": "Bye", "completion": "See you."}]
    assert [row["completion"] for row in load_demonstrations(given(rows))] == ["Hi!", "See you."]
    rows = [{"prompt": "Hi", "chosen": "Hi!", "rejected": "No"}] * 2
    assert [row["chosen"] for row in load_pairs(given(rows))] == ["Hi!"] * 2
    rows = [{"prompt": "Hi", "completion": "Hi"}]  # nothing would be left
    assert load_demonstrations(given(rows))[0]["completion"] == "Hi"
    assert not caplog.text


def test_one_conversation_that_repeats_its_prompt_is_cut():
    rows = [
        {"prompt": [user("a")], "completion": [reply("b")]},
        {"prompt": [user("c")], "completion": [user("c"), reply("d")]},
    ]
    read = load_demonstrations(given(rows))
    assert [row["completion"] for row in read] == [[reply("b")], [reply("d")]]
    pair = {"prompt": [user("a")], "chosen": [user("a"), reply("b")], "rejected": [reply("c")]}
    (read,) = load_pairs(given([pair]))
    assert (read["chosen"], read["rejected"]) == ([reply("b")], [reply("c")])


def test_a_text_prompt_beside_conversations(caplog):
    talk = [user("Name a sea."), reply("Red.")]
    row = {"prompt": "Name a sea. ", "chosen": talk, "rejected": [talk[0], reply("Cat.")]}
    pair = load_pairs(given([{**row, "messages": talk}]))[0]
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (
        [talk[0]],
        [talk[1]],
        [reply("Cat.")],
    )
    shown = load_demonstrations(given([{**row, "messages": talk}]))[0]
    assert (shown["prompt"], shown["completion"]) == (talk[:1], talk[1:])
    assert "`prompt` repeats a message of `messages`; `messages` is read" in caplog.text
    with pytest.raises(InputError, match="`chosen` is messages, but `prompt` is text"):
        load_pairs(given([{**row, "prompt": "Something else"}]))
    with pytest.raises(InputError, match="`completion` missing"):
        load_demonstrations(given([{"prompt": "Something else", "messages": talk}]))
