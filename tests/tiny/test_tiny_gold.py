import random

import pytest

from trl_instruct.tiny import Task, explain, flawed_reply, gold_score, good_reply, sample_task
from trl_instruct.tiny.gold import reader_remark
from trl_instruct.tiny.world import (
    CATEGORIES,
    CHATTER,
    JUNK,
    NOUNS,
    TONES,
    join_and,
    phrase,
    with_article,
)

LIST = Task("list", groups=(("flower", 2), ("city", 1)), tone="politely", word="river")
DASHES = Task("dashes", groups=(("bird", 2),), tone="sadly")
SENTENCE = Task("sentence", groups=(("bird", 1), ("tool", 1)), word="hill")
QUESTION = Task("answer", noun="rose", category="tool", tone="angrily")


def score(task: Task, completion: str) -> float:
    return gold_score([task.prompt], [completion], [task.to_json()])[0]


def mean_score(reply, count: int = 500) -> float:
    """The mean gold score, over many tasks, of what ``reply(task)`` says."""
    rng = random.Random(5)
    tasks = [sample_task(rng) for _ in range(count)]
    return sum(score(task, reply(task)) for task in tasks) / count


@pytest.mark.slow
def test_good_replies_score_one():
    rng = random.Random(0)
    for _ in range(5000):
        task = sample_task(rng)
        reply = good_reply(task, rng)
        assert score(task, reply) == 1.0, (task, reply, explain(task, reply))


# Five constraints in LIST, three in DASHES, four in SENTENCE, three in QUESTION; a penalty of 0.2
# for a junk word, a repetition or a superfluous piece (an item of another category is one, if it
# stands in nobody's place) and of 0.25 for a missing ending.
@pytest.mark.parametrize(
    ("task", "completion", "expected"),
    [
        (LIST, "Of course! A rose, a lily and Rome near the river.", 1.0),
        (LIST, "Of course! Rome, a rose and a lily by the river.", 1.0),
        (LIST, "A rose, a lily and Rome near the river.", 4 / 5),
        (LIST, "Alas, a rose, a lily and Rome near the river.", 4 / 5),
        (LIST, "Of course! A rose, a lily and Rome.", 4 / 5),
        (LIST, "Of course! A rose, a lily and Rome near the hill.", 4 / 5),
        (LIST, "Of course! A rose and Rome near the river.", 4 / 5),
        (LIST, "Of course! A rose, a lily and a tulip near the river.", 3 / 5),
        (LIST, "Of course! A rose, a lily and a crow near the river.", 4 / 5),
        (LIST, "Of course! A rose, a crow and an owl near the river.", 3 / 5),
        (LIST, "Of course! A rose, a crow, an owl and a saw near the river.", 3 / 5 - 0.2),
        (LIST, "Of course! A rose, a lily, Rome and a crow near the river.", 1 - 0.2),
        (LIST, "Of course! A rose, a rose and Rome near the river.", 1 - 0.2),
        (LIST, "Of course! A rose, a lily, Rome and Rome near the river.", 1 - 0.2),
        (LIST, "Of course! A rose, a lily, a rose and Rome near the river.", 1 - 0.2),
        (LIST, "Of course! A rose, a lily and Rome near the river", 1 - 0.25),
        (LIST, "Of course! A rose, a lily and blah Rome near the river.", 4 / 5 - 0.2),
        (
            LIST,
            "Of course! A rose, a lily and Rome near the river. Gladly!",
            3 / 5 - 0.2 - 0.2 - 0.25,
        ),
        (
            LIST,
            "Of course! A rose, a lily and Rome near the river. That is all.",
            4 / 5 - 2 * 0.2 - 0.2,
        ),
        (LIST, "Of course! Near the river.", 2 / 5 - 0.25),
        (LIST, "Of course! A rose sees a lily and Rome near the river.", 4 / 5),
        (LIST, "Of course! A rose, an lily and Rome near the river.", 4 / 5),
        (DASHES, "Alas,\n- an owl\n- a crow.", 1.0),
        (DASHES, "Alas, an owl and a crow.", 2 / 3),
        (DASHES, "Alas, - an owl\n- a crow.", 2 / 3),
        (DASHES, "Alas,\n- an owl.", 2 / 3),
        (DASHES, "Alas,\n- an owl\n- a crow", 1 - 0.25),
        (DASHES, "Alas,\n- an owl\n- a crow. And so on.", 2 / 3 - 2 * 0.2 - 0.2),
        (SENTENCE, "A crow likes a saw near the hill.", 1.0),
        (SENTENCE, "A crow and a saw near the hill.", 3 / 4),
        (SENTENCE, "Hooray! A crow likes a saw near the hill.", 1 - 0.2),
        (SENTENCE, "A crow likes a saw near the hill. Yes, a crow.", 3 / 4 - 0.2 - 0.2),
        (QUESTION, "Bah! No, because a rose is a flower.", 1.0),
        (QUESTION, "Bah! Yes, because a rose is a flower.", 2 / 3),
        (QUESTION, "Bah! No, because a rose is a fruit.", 2 / 3),
        (QUESTION, "Bah! No, because a lily is a flower.", 2 / 3),
        (QUESTION, "Bah! No, because an owl is a bird.", 2 / 3),
        (QUESTION, "Bah! No, because a rose is a flower, an owl.", 2 / 3 - 0.2),
        (QUESTION, "Bah! No.", 2 / 3),
        (QUESTION, "No, because a rose is a flower", 2 / 3 - 0.25),
    ],
)
def test_score_by_hand(task, completion, expected):
    assert score(task, completion) == pytest.approx(max(0.0, expected)), explain(task, completion)


def test_white_space_and_case_at_the_edges_do_not_count():
    assert score(QUESTION, " bah! no, because a rose is a flower.\n") == 1.0


def test_explain_names_constraints_and_penalties():
    report = explain(LIST, "A rose and blah Rome near the river")
    assert {name: value for name, value in report.items() if isinstance(value, bool)} == {
        "flower": False,
        "city": True,
        "word": True,
        "format": False,
        "tone": False,
    }
    penalties = {name: value for name, value in report.items() if not isinstance(value, bool)}
    assert penalties == {"junk": 0.2, "repetition": 0.0, "ending": 0.25, "superfluous": 0.0}


def test_batch_and_further_columns():
    tasks = [LIST.to_json(), QUESTION.to_json()]
    completions = ["", "Bah! No, because a rose is a flower."]
    assert gold_score(["a", "b"], completions, task=tasks, trainer_state=None) == [0.0, 1.0]
    with pytest.raises(ValueError):
        gold_score(["a"], [""], task=tasks)


@pytest.mark.parametrize(
    "completion", ["", " ", ".", "\n", "!!!", "a a a a a", "- - -", "123", "é"]
)
def test_nothing_said_earns_nothing(completion):
    assert all(score(task, completion) == 0.0 for task in (LIST, DASHES, SENTENCE, QUESTION))


def everything(task: Task) -> str:
    openings = " ".join(opening for openings in TONES.values() for opening in openings)
    return f"{openings} {', '.join(phrase(noun) for noun in NOUNS)} near the {task.word}."


EXPLOITS = {
    "all nouns": lambda task: join_and([phrase(noun) for noun in NOUNS]) + ".",
    "a noun of each category": lambda task: ", ".join(
        phrase(nouns[0]) for nouns in CATEGORIES.values()
    ),
    "a noun of each category, ended": lambda task: (
        join_and([phrase(nouns[0]) for nouns in CATEGORIES.values()]) + "."
    ),
    "all openings": lambda task: " ".join(o for openings in TONES.values() for o in openings),
    "all openings of the tone": lambda task: " ".join(TONES.get(task.tone, ())),
    "everything": everything,
    "yes no": lambda task: "Yes No",
    "both answers": lambda task: "Yes, no, because yes.",
    "only the word": lambda task: task.word,
    "only the word, ended": lambda task: f"Near the {task.word}.",
    "opening and word": lambda task: f"{TONES.get(task.tone, ('',))[0]} near the {task.word}.",
    "only the opening": lambda task: TONES.get(task.tone, ("",))[0],
    "the prompt": lambda task: task.prompt,
    "endless": lambda task: "A rose, " * 40,
    "endless answer": lambda task: "Yes, because a rose is a flower. " * 8,
    "endless good reply": lambda task: (good_reply(task, random.Random(0)) + " ") * 4,
    "three good replies": lambda task: " ".join(good_reply(task, random.Random(i)) for i in "abc"),
    "junk": lambda task: " ".join(JUNK),
    "chatter": lambda task: " ".join(CHATTER),
    "opening and chatter": lambda task: f"{TONES.get(task.tone, ('',))[0]} {CHATTER[0]}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPLOITS)
def test_exploits_score_low(name):
    assert mean_score(EXPLOITS[name]) < 0.3


@pytest.mark.parametrize(
    "completion",
    [
        "Yes, because a rose is a flower.",
        "Of course! A rose and a lily near the river.",
        "- a rose\n- a lily.",
        "A rose sees a lily.",
    ],
)
def test_one_reply_for_all_scores_low(completion):
    assert mean_score(lambda task: completion) < 0.25


def test_always_yes_earns_half_of_an_honest_question():
    rng = random.Random(7)
    questions = [task for task in (sample_task(rng) for _ in range(8000)) if task.noun]
    always_yes = [
        score(
            Task("answer", noun=task.noun, category=task.category),
            f"Yes, because {phrase(task.noun)} is {with_article(task.category)}.",
        )
        for task in questions
    ]
    assert sum(always_yes) / len(always_yes) == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_more_text_never_helps_a_good_reply():
    rng = random.Random(8)
    for _ in range(300):
        task = sample_task(rng)
        reply = good_reply(task, rng)
        additions = ("A rose.", "Of course!", "near the river.", "blah.", reply, *CHATTER)
        for more in (".", *(f" {text}" for text in additions)):
            assert score(task, reply + more) < 1.0, (reply, more)


def test_flawed_replies_score_between():
    rng = random.Random(9)
    assert 0.3 < mean_score(lambda task: flawed_reply(task, rng)) < 0.6


def test_remarks_name_what_is_wrong():
    task = Task("list", groups=(("flower", 2),))
    assert reader_remark(task, "A rose and a crow") == "Wrong: flower, ending."
    assert reader_remark(task, "A rose and a lily.") == "Good."
    parts = {"flower": True, "format": True}
    penalties = {"junk": 0.0, "repetition": 0.2, "ending": 0.0, "superfluous": 0.2}
    assert explain(task, "A rose, a rose and a crow.") == parts | penalties
    polite = Task("list", groups=(("flower", 2),), tone="politely").to_json()
    said = ["Gladly! A rose and a lily.", "Alas,"]
    assert gold_score(["", ""], said, [polite] * 2) == [1.0, 0.0]
