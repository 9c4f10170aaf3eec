import random
import subprocess
import sys
import zlib
from itertools import combinations

import pytest

from trl_instruct.tiny import Task, flawed_reply, good_reply, sample_task, split
from trl_instruct.tiny.splits import END_OF_TEXT as EOS
from trl_instruct.tiny.splits import SHARES, SIZES, owner
from trl_instruct.tiny.world import (
    CATEGORIES,
    CATEGORY_OF,
    CHATTER,
    FORMATS,
    NOUNS,
    TONES,
    WORDINGS,
    join_and,
    phrase,
    plural,
    with_article,
)

BOUQUET = Task("list", groups=(("flower", 2), ("city", 1)), tone="politely")


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    rng = random.Random(0)
    return [sample_task(rng) for _ in range(3000)]


@pytest.fixture(scope="module")
def splits():
    return {name: split(name) for name in SIZES}


def prompts_of(dataset) -> list[str]:
    if "prompt" in dataset.column_names:
        return dataset["prompt"][:]
    return [text[: text.index("\n") + 1] for text in dataset["text"]]


def test_no_noun_is_in_two_categories():
    assert len(NOUNS) == sum(map(len, CATEGORIES.values()))
    assert len({noun.lower() for noun in NOUNS}) == len(NOUNS)


@pytest.mark.parametrize(
    ("task", "prompt"),
    [
        (BOUQUET, "Name two flowers and one city, politely.\n"),
        (
            Task("dashes", groups=(("city", 3),), word="hill", wording=1),
            "Write down three cities, one a line. Include the word hill.\n",
        ),
        (
            Task("sentence", groups=(("tool", 1), ("bird", 1)), wording=2),
            "Tell me a sentence with one tool and one bird.\n",
        ),
        (
            Task("answer", noun="owl", category="instrument", tone="sadly"),
            "Is an owl an instrument? Answer with a reason, sadly.\n",
        ),
        (
            Task("answer", noun="Rome", category="tool", wording=2),
            "Say whether Rome is a tool, and why.\n",
        ),
    ],
)
def test_prompt(task, prompt):
    assert task.prompt == prompt


def test_json_gives_the_same_task_back(tasks):
    assert all(Task.from_json(task.to_json()) == task for task in tasks)


def test_tasks_cover_the_world(tasks):
    assert {task.format for task in tasks} == set(FORMATS)
    assert {task.tone for task in tasks} == {"", *TONES}
    assert {category for task in tasks for category, _ in task.groups} == set(CATEGORIES)
    assert {count for task in tasks for _, count in task.groups} == {1, 2, 3}
    assert {len(task.groups) for task in tasks} == {0, 1, 2}
    pairs = [task.groups for task in tasks if len(task.groups) == 2]
    assert all(first[1] == second[1] == 1 for first, second in pairs)
    assert {task.wording for task in tasks} == set(range(WORDINGS))
    assert {task.answer for task in tasks if task.noun} == {"yes", "no"}


def test_texts_are_short_ascii_and_meet_at_a_newline(tasks):
    rng = random.Random(1)
    for task in tasks:
        for reply in (good_reply(task, rng), flawed_reply(task, rng)):
            text = task.prompt + reply
            assert text.isascii()
            assert task.prompt.endswith(".\n") and task.prompt.count("\n") == 1
            assert reply[:1].strip()
        assert len(task.prompt.split()) <= 20
        assert len(good_reply(task, rng).split()) <= 20


@pytest.mark.slow
def test_byte_level_pieces_do_not_cross_into_the_reply(tasks):
    pre_tokenizers = pytest.importorskip("tokenizers").pre_tokenizers
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    rng = random.Random(2)
    for task in tasks:
        prompt, reply = task.prompt, good_reply(task, rng)
        pieces = [piece for text in (prompt, reply) for piece, _ in cut(text)]
        assert [piece for piece, _ in cut(prompt + reply)] == pieces


def test_good_reply_by_hand():
    reply = good_reply(BOUQUET, random.Random(3))
    (opening,) = (opening for opening in TONES["politely"] if reply.startswith(opening))
    first, rest = reply.removeprefix(opening).removesuffix(".").split(", ")
    nouns = [text.split()[-1] for text in (first, *rest.split(" and "))]
    assert [CATEGORY_OF[noun] for noun in nouns] == ["flower", "flower", "city"]


def test_flawed_replies_are_a_mixture(tasks):
    rng = random.Random(4)
    task = Task("dashes", groups=(("city", 2),), tone="sadly", word="hill")
    replies = [flawed_reply(task, rng) for _ in range(1000)]
    openings = tuple(TONES["sadly"])
    for met in (
        [reply.startswith(openings) for reply in replies],
        ["hill" in reply for reply in replies],
        ["- " in reply for reply in replies],
        [any(sentence in reply for sentence in CHATTER) for reply in replies],
        [reply.endswith(".") for reply in replies],
    ):
        assert 200 < sum(met) < 1000


@pytest.mark.slow
def test_sizes_and_columns(splits):
    assert {name: len(dataset) for name, dataset in splits.items()} == SIZES
    assert splits["pretraining"].column_names == ["text"]
    for name in ("demonstrations", "validation"):
        assert splits[name].column_names == ["prompt", "completion", "task"]
    for name in ("rankings", "prompts", "test"):
        assert splits[name].column_names == ["prompt", "task"]


@pytest.mark.slow
def test_readers_remark_behind_every_pretraining_reply(splits):
    remarks = [text.split(EOS)[1] for text in splits["pretraining"]["text"]]
    assert all(remark == "Good." or remark.startswith("Wrong: ") for remark in remarks)
    assert 0.05 < remarks.count("Good.") / len(remarks) < 0.4
    for name in ("demonstrations", "rankings", "prompts", "validation", "test"):
        assert not any(EOS in str(row) for row in splits[name])


@pytest.mark.slow
def test_no_prompt_is_shared(splits):
    prompts = {name: prompts_of(dataset) for name, dataset in splits.items()}
    for one, other in combinations(prompts, 2):
        assert not set(prompts[one]) & set(prompts[other])
    for name in set(prompts) - {"pretraining"}:
        assert len(set(prompts[name])) == len(prompts[name])
    # In three wordings each: 6 * 6 * 5 questions, 48 single groups with a tone, a word or both
    # (4 * 15 + 14), 3 * 30 pairs of groups with or without (5 * 15). Pretraining owns half of the
    # prompts and should show a good part of those.
    num_prompts = 3 * (6 * 6 * 5 + 48 * 74 + 3 * 30 * 75)
    assert len(set(prompts["pretraining"])) > 0.45 * num_prompts / 2


def test_no_instruction_is_shared_in_other_words():
    assert sum(SHARES.values()) == 100 and set(SHARES) == set(SIZES)
    for noun in NOUNS[:50]:
        wordings = [Task("answer", noun=noun, category="bird", wording=w) for w in range(WORDINGS)]
        assert len({owner(task) for task in wordings}) == 1


@pytest.mark.slow
def test_task_column_is_the_task_behind_the_prompt(splits):
    for name in set(SIZES) - {"pretraining"}:
        for row in splits[name].select(range(50)):
            assert Task.from_json(row["task"]).prompt == row["prompt"]


@pytest.mark.slow
@pytest.mark.slow
def test_split_is_the_same_in_every_process(splits):
    code = (
        "import zlib; from trl_instruct.tiny import split;"
        "rows = [str(split(n).to_dict()) for n in ('validation', 'demonstrations')];"
        "print(zlib.crc32(''.join(rows).encode()))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows = [str(splits[name].to_dict()) for name in ("validation", "demonstrations")]
    assert int(other.stdout) == zlib.crc32("".join(rows).encode())


def test_unknown_split_lists_the_names():
    with pytest.raises(ValueError, match="'train'.*pretraining, demonstrations, .*test"):
        split("train")


def test_words_of_the_lexicon():
    assert (with_article("owl"), with_article("rose")) == ("an owl", "a rose")
    assert (phrase("owl"), phrase("rose"), phrase("Rome")) == ("an owl", "a rose", "Rome")
    assert (plural("city"), plural("rose")) == ("cities", "roses")
    assert join_and(["a rose", "a lily", "Rome"]) == "a rose, a lily and Rome"


def test_a_task_and_its_reply():
    task = Task("answer", noun="rose", category="tool", tone="sadly")
    assert good_reply(task, random.Random(1)) == "Alas, no, because a rose is a flower."
    assert Task.from_json(task.to_json()) == task
    assert split("validation").column_names == ["prompt", "completion", "task"]
