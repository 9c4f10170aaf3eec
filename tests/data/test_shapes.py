"""Published shapes, each with a small sample in own words, and the traps that each one sets."""

import json

import pytest
from datasets import Dataset

from trl_instruct.data import conversion, sources
from trl_instruct.data.pairs import load_pairs
from trl_instruct.data.rankings import load_rankings
from trl_instruct.data.reading import AS_PUBLISHED, Reading
from trl_instruct.data.recognition import _holds
from trl_instruct.data.records import load_demonstrations, load_prompts
from trl_instruct.errors import InputError


def u(text):
    return {"role": "user", "content": text}


def a(text):
    return {"role": "assistant", "content": text}


def s(text):
    return {"role": "system", "content": text}


LOADERS = {
    "demonstration": load_demonstrations,
    "ranking": load_rankings,
    "pair": load_pairs,
    "prompt": load_prompts,
}
FIELDS = {
    "demonstration": ("prompt", "completion"),
    "ranking": ("prompt", "responses", "ranks"),
    "pair": ("prompt", "chosen", "rejected"),
    "prompt": ("prompt",),
}


def read(kind, rows, **reading):
    source = rows if not isinstance(rows, list) else Dataset.from_list(rows)
    records = LOADERS[kind](source, reading=Reading(**reading))
    return [tuple(record[name] for name in FIELDS[kind]) for record in records]


ALPACA = [
    {"instruction": "Past tense?", "input": "swim", "output": "swam"},
    {"instruction": "Name a gem.", "input": "", "output": "Opal."},
    {"instruction": "Name a sea.", "input": None, "output": ""},
]
SHAREGPT = [
    {
        "id": "7",
        "conversations": [
            {"from": "system", "value": "Be kind."},
            {"from": "human", "value": "Bye"},
            {"from": "gpt", "value": "Take care!"},
        ],
    },
    {
        "id": "8",
        "conversations": [
            {"from": "gpt", "value": "Welcome."},
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello."},
            {"from": "human", "value": "And you?"},
        ],
    },
    {"id": "9", "conversations": [{"from": "human", "value": "Anyone?"}]},
]
ULTRACHAT = [
    {
        "prompt": "Name a poet.",
        "prompt_id": "ab",
        "messages": [u("Name a poet."), a("Rilke."), u("Another?"), a("Rumi.")],
    }
]
UNPAIRED = [
    {"prompt": "Tin?", "completion": "Soft.", "label": True},
    {"prompt": "Tin?", "completion": "A fish.", "label": False},
    {"prompt": "Lead?", "completion": "A dance.", "label": False},
]
STEPWISE = [
    {"prompt": "2+2+2?", "completions": ["2+2=4", "4+2=6"], "labels": [True, True]},
    {"prompt": "3+3?", "completions": ["3+3=7", "7"], "labels": [False, False]},
]
HH = [
    {
        "chosen": "\n\nHuman: Is tin soft?\n\nAssistant: Fairly, yes.",
        "rejected": "\n\nHuman: Is tin soft?\n\nAssistant: Fair question.",
    },
    {
        "chosen": "\n\nHuman: Hi\n\nMore?\n\nAssistant: Yes.\n\nHuman: Go\n\nAssistant: A.",
        "rejected": "\n\nHuman: Hi\n\nMore?\n\nAssistant: Yes.\n\nHuman: Go\n\nAssistant:  B.",
    },
    {
        "chosen": "\n\nHuman: Hm\n\nAssistant: Yes?",
        "rejected": "\n\nHuman: Hm\n\nAssistant: ",
    },
]
H4 = [
    {
        "prompt": "Hi",
        "prompt_id": "1",
        "chosen": [u("Hi"), a("Hello")],
        "rejected": [u("Hi"), a("What")],
        "messages": [u("Hi"), a("Hello")],
        "score_chosen": 8.0,
        "score_rejected": 3.0,
    },
    {
        "prompt": "Yo",
        "prompt_id": "2",
        "chosen": [u("Yo"), a("Hey")],
        "rejected": [u("Yo"), a("Ho")],
        "messages": [u("Yo"), a("Hey")],
        "score_chosen": 5.0,
        "score_rejected": 5.0,
    },
]
ARGILLA_CLEANED = [
    {
        "source": "s",
        "prompt": "Hi",
        "chosen": [u("Hi"), a("Hello")],
        "chosen-rating": 4.5,
        "rejected": [u("Hi"), a("What")],
        "rejected-rating": 3.0,
    }
]
ARGILLA_OLD = [
    {
        "instruction": "Hi",
        "chosen_response": "Hello",
        "rejected_response": "What",
        "chosen_avg_rating": 4.0,
        "rejected_avg_rating": 2.0,
    }
]
FACTORY = [
    {
        "instruction": "And west?",
        "input": "",
        "chosen": "Pacific.",
        "rejected": "Baltic.",
        "history": [["Ocean east of Chile?", "None; the Andes."]],
        "system": "Geography only.",
    },
    {
        "instruction": "Largest?",
        "input": "Of oceans.",
        "chosen": "Pacific.",
        "rejected": "Baltic.",
        "history": None,
        "system": "",
    },
]
ORCA = [{"system": "Brief.", "question": "Sky?", "chosen": "Blue.", "rejected": "Blue cheese."}]
FACTORY_SHAREGPT = [
    {
        "conversations": [{"from": "human", "value": "Sky?"}],
        "chosen": {"from": "gpt", "value": "Blue."},
        "rejected": {"from": "gpt", "value": "Cheese."},
    }
]
SWIFT = [{"messages": [u("Sky?"), a("Blue.")], "rejected_response": "Cheese."}]
OPENRLHF_RM = [
    {
        "context_messages": [u("Name a pass.")],
        "chosen": [a("Brenner.")],
        "rejected": [a("A pass is a ticket.")],
    }
]
HELPSTEER2 = [
    {"split": split, "prompt": "Bay?", "response_1": "Fundy.", "response_2": "Leaf.", **strength}
    for split, strength in (
        ("train", {"preference_strength": -3}),
        ("train", {"preference_strength": 2}),
        ("train", {"preference_strength": 0}),
        ("validation", {"preference_strength": -1}),
    )
]
HELPSTEER3 = [
    {
        "domain": "general",
        "language": "english",
        "context": [u("Name a cape."), a("Good Hope."), u("Another.")],
        "response1": "Horn.",
        "response2": "Cloak.",
        "overall_preference": -2,
        "individual_preference": [],
    }
]
PKU = [
    {
        "prompt": "Thaw a pipe?",
        "response_0": "Hair dryer.",
        "response_1": "Torch.",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
        "better_response_id": better,
        "safer_response_id": 0,
    }
    for better in (0, 1)
]
WEBGPT = [
    {
        "question": {"dataset": "eli5", "id": "x", "full_text": "Why is ash light?"},
        "quotes_0": {"title": ["t"], "extract": ["e"]},
        "answer_0": first,
        "score_0": score,
        "quotes_1": {"title": [], "extract": []},
        "answer_1": "It flies.",
        "score_1": -score,
    }
    for first, score in (("Gas left it [1].", 0.5), ("Gas.", -1.0), ("Burnt.", 0.0), ("", -0.5))
]
TLDR = [
    {
        "info": {
            "id": "t",
            "post": "I lost\n\na shoe.",
            "title": "Shoe",
            "subreddit": "casual",
            "site": None,
            "article": None,
        },
        "summaries": [{"text": " Lost shoe.", "policy": "ref"}, {"text": " Shoes.", "policy": "s"}],
        "choice": 0,
        "split": "train",
    },
    {
        "info": {
            "id": "n",
            "post": None,
            "title": "Rain",
            "subreddit": None,
            "site": "x",
            "article": "It\n\nrains.",
        },
        "summaries": [{"text": " Sun.", "policy": "ref"}, {"text": " Rain.", "policy": "s"}],
        "choice": 1,
        "split": "train",
    },
]
SHP = [
    {
        "post_id": "p",
        "history": "Dough tears?",
        "human_ref_A": "Let it rest.",
        "human_ref_B": "Bad luck.",
        "score_A": 31,
        "score_B": 4,
        "labels": label,
        "score_ratio": 7.75,
    }
    for label in (1, 0)
]
ARENA = [
    {
        "model_a": "x",
        "model_b": "y",
        "winner": winner,
        "conversation_a": [u("Hi"), a("Hello"), u("1?"), a("One")],
        "conversation_b": [u("Hi"), a("Hey"), u("1?"), a("Uno")],
    }
    for winner in ("model_a", "model_b", "tie", "tie (bothbad)")
]
ULTRAFEEDBACK = [
    {
        "instruction": "Name a sea.",
        "models": ["a", "b", "c", "d"],
        "completions": [
            {"response": "Aral.", "overall_score": 7.5, "fine-grained_score": 1.0},
            {"response": "A pond.", "overall_score": 3.0, "fine-grained_score": 9.0},
            {"response": "Baltic.", "overall_score": 9.0, "fine-grained_score": 1.0},
            {"response": "Black.", "overall_score": 7.5, "fine-grained_score": 1.0},
        ],
    }
]
ATTRIBUTES = [
    {"prompt": p, "response": r, "helpfulness": h, "correctness": 4 - h, "verbosity": v}
    for p, r, h, v in (
        ("Fox?", "Fennec.", 4, 0),
        ("Fox?", "A dog.", 1, 4),
        ("Owl?", "Barn.", 3, 1),
        ("Owl?", "Eagle.", 3, 4),
    )
]
NECTAR = [
    {
        "prompt": "\n\nHuman: Name a ship. \n\nAssistant: ",
        "answers": [
            {"answer": "Sheep.", "model": "m", "rank": 3.0},
            {"answer": "The Fram.", "model": "n", "rank": 1.0},
            {"answer": "Ark.", "model": "o", "rank": 2.0},
        ],
        "turns": 1,
    }
]
REWARD_BENCH = [
    {
        "id": "9",
        "prompt": "Noble gas?",
        "chosen": ["Argon"],
        "rejected": ["Iron", "Tin"],
        "num_correct": 1,
    }
]
DISTILABEL = [
    {"instruction": "Gem?", "generations": ["Opal.", "Gum.", "Jam."], "ratings": [5, None, 2]},
    {"instruction": "Ore?", "generations": ["Iron.", "Oar."], "ratings": [None, None]},
    {"instruction": "Elm?", "generations": ["A tree.", "Helm."], "ratings": [4]},
]
QUALITY = [{"instruction": "Gem?", "responses": ["Gum.", "Opal."], "scores": [1.0, 4.0]}]
PAIRRM = [
    {
        "input": "Gem?",
        "candidates": ["Gum.", "Opal.", "Jam."],
        "ranks": [3, 1, 2],
        "ranked_candidates": ["Jam.", "Gum.", "Opal."],
    }
]
DPO = [
    {
        "prompt": "Gem?",
        "prompt_id": "1",
        "chosen": [u("Gem?"), a("Opal.")],
        "chosen_rating": 5.0,
        "rejected": [u("Gem?"), a("Gum.")],
        "rejected_rating": 1.0,
    }
]


def node(number, role, text, *replies, **more):
    base = {"message_id": str(number), "role": role, "text": text, "rank": None, "deleted": False}
    base |= {"synthetic": False, "review_result": True, "lang": "en"}
    return base | {"replies": list(replies)} | more


def tree(state="ready_for_export"):
    second = node(
        5, "prompter", "More?", node(6, "assistant", "No.", rank=0), node(7, "assistant", "Yes.")
    )
    root = node(
        1,
        "prompter",
        "Hi",
        node(2, "assistant", "Go away", rank=2),
        node(3, "assistant", "Hello", second, rank=0),
        node(4, "assistant", "Spam", rank=1, deleted=True),
        node(8, "assistant", "Hey", node(9, "prompter", "Who?"), rank=1),
    )
    return {"message_tree_id": "1", "tree_state": state, "prompt": root}


def flat(message, parent=None, state="ready_for_export"):
    row = {k: v for k, v in message.items() if k != "replies"}
    yield {**row, "parent_id": parent, "message_tree_id": "1", "tree_state": state}
    for reply in message["replies"]:
        yield from flat(reply, message["message_id"], state)


class File:
    """Rows that a table cannot hold as they are, in a file."""

    def __init__(self, rows):
        self.rows = rows


OASST = File([tree()])
OASST_FLAT = [*flat(tree()["prompt"])]
ARGILLA2 = [
    {
        "id": "1",
        "fields": {"prompt": "Fern?", "response_1": "Fir.", "response_2": "Bracken."},
        "responses": {
            "ranking": [
                {"value": ["response_2", "response_1"], "user_id": "u"},
                {"value": ["response_1", "response_2"], "user_id": "v"},
            ]
        },
        "suggestions": {"ranking": {"value": ["response_1", "response_2"], "agent": "m"}},
    }
]
ARGILLA_FLAT = [
    {
        "prompt": "Fern?",
        "response_1": "Fir.",
        "response_2": "Bracken.",
        "ranking.responses": [
            [{"value": "response_1", "rank": 2}, {"value": "response_2", "rank": 1}],
            [{"value": "response_1", "rank": 1}, {"value": "response_2", "rank": 1}],
            [{"value": "response_1", "rank": 1}, {"value": "response_2", "rank": 2}],
        ],
        "ranking.responses.users": ["u", "v", "w"],
        "ranking.responses.status": ["submitted", "submitted", "draft"],
        "ranking.suggestion": None,
    }
]
ARGILLA1 = [
    {
        "prompt": "Fern?",
        "response_1": "Fir.",
        "response_2": "Bracken.",
        "ranking": [
            {
                "user_id": "u",
                "value": [{"rank": 2, "value": "response_1"}, {"rank": 1, "value": "response_2"}],
                "status": "submitted",
            }
        ],
    }
]
PAIRWISE = [
    {
        "id": 1,
        "data": {"prompt": "Reed?", "answer1": "Sedge.", "answer2": "Read."},
        "annotations": [
            {
                "completed_by": 2,
                "was_cancelled": False,
                "result": [{"type": "pairwise", "value": {"selected": "right"}}],
            },
            {"completed_by": 3, "was_cancelled": True, "result": []},
        ],
    }
]
RANKER = [
    {
        "id": 1,
        "data": {
            "prompt": "Reed?",
            "items": [{"id": "x", "title": "1", "body": "Read."}, {"id": "y", "body": "Sedge."}],
        },
        "annotations": [
            {
                "completed_by": 2,
                "was_cancelled": False,
                "result": [{"type": "ranker", "value": {"ranker": {"rank": ["y", "x"]}}}],
            }
        ],
    }
]
RATING = [
    {
        "id": number,
        "data": {"prompt": "Reed?", "answer": answer},
        "annotations": [
            {
                "completed_by": 2,
                "was_cancelled": False,
                "result": [{"type": "rating", "value": {"rating": stars}}],
            }
        ],
    }
    for number, (answer, stars) in enumerate((("Sedge.", 4), ("Read.", 1), ("Rush.", 0)))
]
JSON_MIN = [
    {
        "prompt": "Reed?",
        "answer1": "Sedge.",
        "answer2": "Read.",
        "id": 1,
        "comparison": [{"selected": "left"}],
        "annotator": 2,
        "annotation_id": 5,
    },
    {
        "prompt": "Rush?",
        "answer1": "Hour.",
        "answer2": "Soft rush.",
        "id": 2,
        "comparison": None,
        "annotator": 2,
        "annotation_id": 6,
    },
]
SIDES = {"left": "answer1", "right": "answer2"}
POST = "SUBREDDIT: r/casual\n\nTITLE: Shoe\n\nPOST: I lost\na shoe.\n\nTL;DR:"
NEWS = "TITLE: Rain\n\nIt\nrains.\n\nTL;DR:"
SHIP = "\n\nHuman: Name a ship. \n\nAssistant: "
FACTORY_PROMPT = [s("Geography only."), u("Ocean east of Chile?"), a("None; the Andes.")]
FACTORY_PROMPTS = [[*FACTORY_PROMPT, u("And west?")], [u("Largest?\nOf oceans.")]]
HH1, HH2 = "\n\nHuman: Is tin soft?\n\nAssistant:", HH[1]["chosen"].removesuffix(" A.")

READINGS = [
    ("alpaca", ALPACA, "demonstration", [("Past tense?\nswim", "swam"), ("Name a gem.", "Opal.")]),
    ("alpaca", ALPACA, "prompt", [("Past tense?\nswim",), ("Name a gem.",), ("Name a sea.",)]),
    (
        "alpaca in capitals",
        [{"INSTRUCTION": "Gem?", "RESPONSE": "Opal."}],
        "demonstration",
        [("Gem?", "Opal.")],
    ),
    (
        "dolly",
        [
            {"instruction": "Who?", "context": "Ann sang.", "response": "Ann.", "category": "qa"},
            {"instruction": "Gem?", "context": "", "response": "Opal.", "category": "open"},
        ],
        "demonstration",
        [("Who?\nAnn sang.", "Ann."), ("Gem?", "Opal.")],
    ),
    (
        "alpaca with a system prompt",
        [{"instruction": "Gem?", "input": "", "output": "Opal.", "system": "Brief."}],
        "demonstration",
        [([s("Brief."), u("Gem?")], [a("Opal.")])],
    ),
    (
        "alpaca, ranked",
        [{"instruction": "Gem?", "input": "", "output": ["Opal.", "Gum."]}],
        "ranking",
        [("Gem?", ["Opal.", "Gum."], [1, 2])],
    ),
    (
        "sharegpt",
        SHAREGPT,
        "demonstration",
        [([s("Be kind."), u("Bye")], [a("Take care!")]), ([u("Hi")], [a("Hello.")])],
    ),
    (
        "sharegpt",
        SHAREGPT,
        "prompt",
        [
            ([s("Be kind."), u("Bye")],),
            ([u("Hi"), a("Hello."), u("And you?")],),
            ([u("Anyone?")],),
        ],
    ),
    (
        "sharegpt, system beside",
        [{"system": "Be kind.", "conversations": SHAREGPT[0]["conversations"][1:]}],
        "demonstration",
        [([s("Be kind."), u("Bye")], [a("Take care!")])],
    ),
    (
        "messages, the end cut",
        [{"messages": [u("Ping"), a("Pong"), u("Again")]}],
        "demonstration",
        [([u("Ping")], [a("Pong")])],
    ),
    (
        "messages in parts",
        [
            {
                "messages": [
                    {"role": r, "content": [{"type": "text", "text": t}]}
                    for r, t in (("user", "Ping"), ("assistant", "Pong"))
                ]
            }
        ],
        "demonstration",
        [([u("Ping")], [a("Pong")])],
    ),
    (
        "messages",
        [{"messages": [u("A"), a("B"), u("C"), a("D")]}],
        "prompt",
        [([u("A"), a("B"), u("C")],)],
    ),
    (
        "ultrachat",
        ULTRACHAT,
        "demonstration",
        [([u("Name a poet."), a("Rilke."), u("Another?")], [a("Rumi.")])],
    ),
    ("ultrachat", ULTRACHAT, "prompt", [([u("Name a poet.")],)]),
    ("openrlhf", [{"question": "Gem?", "response": "Opal."}], "demonstration", [("Gem?", "Opal.")]),
    ("openrlhf", [{"input": "Gem?", "output": "Opal."}], "demonstration", [("Gem?", "Opal.")]),
    ("openrlhf", [{"context_messages": [u("Gem?")]}], "prompt", [([u("Gem?")],)]),
    ("openrlhf", [{"input": "Gem?"}], "prompt", [("Gem?",)]),
    (
        "openrlhf",
        OPENRLHF_RM,
        "pair",
        [([u("Name a pass.")], [a("Brenner.")], [a("A pass is a ticket.")])],
    ),
    ("unpaired", UNPAIRED, "demonstration", [("Tin?", "Soft.")]),
    ("unpaired", UNPAIRED, "ranking", [("Tin?", ["Soft.", "A fish."], [1, 2])]),
    ("unpaired", UNPAIRED, "prompt", [("Tin?",), ("Lead?",)]),
    ("stepwise", STEPWISE, "demonstration", [("2+2+2?", "2+2=4\n4+2=6")]),
    ("stepwise", STEPWISE, "prompt", [("2+2+2?",), ("3+3?",)]),
    (
        "implicit",
        [{"chosen": [u("Q"), a("A")], "rejected": [u("Q"), a("B")]}],
        "pair",
        [([u("Q")], [a("A")], [a("B")])],
    ),
    (
        "implicit",
        [{"chosen": [u("Q"), a("A")], "rejected": [u("Q"), a("B")]}],
        "prompt",
        [([u("Q")],)],
    ),
    (
        "hh",
        HH,
        "pair",
        [(HH1, " Fairly, yes.", " Fair question."), (HH2, " A.", "  B.")],
    ),
    (
        "hh",
        HH,
        "ranking",
        [(HH1, [" Fairly, yes.", " Fair question."], [1, 2]), (HH2, [" A.", "  B."], [1, 2])],
    ),
    ("hh", HH, "prompt", [(HH1,), (HH2,), ("\n\nHuman: Hm\n\nAssistant:",)]),
    ("h4", H4, "pair", [([u("Hi")], [a("Hello")], [a("What")])]),
    (
        "h4",
        H4,
        "ranking",
        [
            ([u("Hi")], [[a("Hello")], [a("What")]], [1, 2]),
            ([u("Yo")], [[a("Hey")], [a("Ho")]], [1, 1]),
        ],
    ),
    ("h4", H4, "demonstration", [([u("Hi")], [a("Hello")]), ([u("Yo")], [a("Hey")])]),
    ("h4", H4, "prompt", [([u("Hi")],), ([u("Yo")],)]),
    ("argilla cleaned", ARGILLA_CLEANED, "pair", [([u("Hi")], [a("Hello")], [a("What")])]),
    ("argilla old", ARGILLA_OLD, "pair", [("Hi", "Hello", "What")]),
    (
        "llama-factory",
        FACTORY,
        "pair",
        [
            (FACTORY_PROMPTS[0], [a("Pacific.")], [a("Baltic.")]),
            (FACTORY_PROMPTS[1], [a("Pacific.")], [a("Baltic.")]),
        ],
    ),
    ("llama-factory", FACTORY, "prompt", [(FACTORY_PROMPTS[0],), (FACTORY_PROMPTS[1],)]),
    ("orca", ORCA, "pair", [([s("Brief."), u("Sky?")], [a("Blue.")], [a("Blue cheese.")])]),
    (
        "llama-factory sharegpt",
        FACTORY_SHAREGPT,
        "pair",
        [([u("Sky?")], [a("Blue.")], [a("Cheese.")])],
    ),
    ("swift", SWIFT, "pair", [([u("Sky?")], [a("Blue.")], [a("Cheese.")])]),
    ("swift", SWIFT, "demonstration", [([u("Sky?")], [a("Blue.")])]),
    (
        "helpsteer2",
        HELPSTEER2,
        "ranking",
        [("Bay?", ["Fundy.", "Leaf."], ranks) for ranks in ([1, 2], [2, 1], [1, 1])],
    ),
    ("helpsteer2", HELPSTEER2, "pair", [("Bay?", "Fundy.", "Leaf."), ("Bay?", "Leaf.", "Fundy.")]),
    ("helpsteer2", HELPSTEER2, "prompt", [("Bay?",)]),
    (
        "helpsteer3",
        HELPSTEER3,
        "ranking",
        [(HELPSTEER3[0]["context"], [[a("Horn.")], [a("Cloak.")]], [1, 2])],
    ),
    (
        "webgpt",
        WEBGPT,
        "ranking",
        [
            ("Why is ash light?", ["Gas left it [1].", "It flies."], [1, 2]),
            ("Why is ash light?", ["Gas.", "It flies."], [2, 1]),
            ("Why is ash light?", ["Burnt.", "It flies."], [1, 1]),
        ],
    ),
    ("tldr", TLDR, "pair", [(POST, " Lost shoe.", " Shoes."), (NEWS, " Rain.", " Sun.")]),
    ("tldr", TLDR, "prompt", [(POST,), (NEWS,)]),
    (
        "shp",
        SHP,
        "pair",
        [
            ("Dough tears?", "Let it rest.", "Bad luck."),
            ("Dough tears?", "Bad luck.", "Let it rest."),
        ],
    ),
    (
        "arena",
        ARENA,
        "ranking",
        [
            ([u("Hi")], [talk["conversation_a"][1:], talk["conversation_b"][1:]], ranks)
            for talk, ranks in zip(ARENA, ([1, 2], [2, 1], [1, 1], [1, 1]), strict=True)
        ],
    ),
    (
        "ultrafeedback",
        ULTRAFEEDBACK,
        "ranking",
        [("Name a sea.", ["Aral.", "A pond.", "Baltic.", "Black."], [2, 3, 1, 2])],
    ),
    (
        "helpsteer2 attributes",
        ATTRIBUTES,
        "ranking",
        [("Fox?", ["Fennec.", "A dog."], [1, 2]), ("Owl?", ["Barn.", "Eagle."], [1, 1])],
    ),
    ("helpsteer2 attributes", ATTRIBUTES, "prompt", [("Fox?",), ("Owl?",)]),
    ("nectar", NECTAR, "ranking", [(SHIP, ["Sheep.", "The Fram.", "Ark."], [3, 1, 2])]),
    (
        "reward bench",
        REWARD_BENCH,
        "ranking",
        [("Noble gas?", ["Argon", "Iron", "Tin"], [1, 2, 2])],
    ),
    (
        "reward bench",
        REWARD_BENCH,
        "pair",
        [("Noble gas?", "Argon", "Iron"), ("Noble gas?", "Argon", "Tin")],
    ),
    ("distilabel", DISTILABEL, "ranking", [("Gem?", ["Opal.", "Jam."], [1, 2])]),
    ("distilabel quality", QUALITY, "ranking", [("Gem?", ["Gum.", "Opal."], [2, 1])]),
    ("distilabel pairrm", PAIRRM, "ranking", [("Gem?", ["Gum.", "Opal.", "Jam."], [3, 1, 2])]),
    ("distilabel dpo", DPO, "pair", [([u("Gem?")], [a("Opal.")], [a("Gum.")])]),
    (
        "argilla",
        ARGILLA2,
        "ranking",
        [("Fern?", ["Bracken.", "Fir."], [1, 2]), ("Fern?", ["Fir.", "Bracken."], [1, 2])],
    ),
    ("argilla", ARGILLA2, "prompt", [("Fern?",)]),
    (
        "argilla flat",
        ARGILLA_FLAT,
        "ranking",
        [("Fern?", ["Fir.", "Bracken."], [2, 1]), ("Fern?", ["Fir.", "Bracken."], [1, 1])],
    ),
    ("argilla 1", ARGILLA1, "ranking", [("Fern?", ["Fir.", "Bracken."], [2, 1])]),
    ("label studio ranker", RANKER, "ranking", [("Reed?", ["Sedge.", "Read."], [1, 2])]),
    ("label studio rating", RATING, "ranking", [("Reed?", ["Sedge.", "Read."], [1, 2])]),
]


@pytest.mark.parametrize(
    ("rows", "kind", "expected"),
    [row[1:] for row in READINGS],
    ids=[f"{name}-{kind}" for name, _, kind, _ in READINGS],
)
def test_published_shapes(rows, kind, expected):
    assert read(kind, rows) == expected


TAGGED = [
    {"instruction": "Gem?", "input": "", "output": "Opal.", "kto_tag": True},
    {"instruction": "Gem?", "input": "", "output": "Gum.", "kto_tag": False},
    {"instruction": "Gem?", "input": "Red.", "output": "Ruby.", "kto_tag": True},
]


@pytest.mark.parametrize("labels", [(True, False, True), (1, 0, 1), (None, False, True)])
def test_kto_of_llama_factory(labels):
    rows = [{**row, "kto_tag": label} for row, label in zip(TAGGED, labels, strict=True)]
    good = [("Gem?", "Opal.")] if labels[0] else []
    assert read("demonstration", rows) == [*good, ("Gem?\nRed.", "Ruby.")]
    assert read("prompt", rows) == [("Gem?",), ("Gem?\nRed.",)]
    if labels[0]:
        assert read("ranking", rows) == [("Gem?", ["Opal.", "Gum."], [1, 2])]


def test_a_faulty_row_among_those_that_belong_together():
    rows = [*TAGGED, {**TAGGED[0], "history": [[1]]}]
    with pytest.raises(InputError, match="row 4: the row is not as unpaired preferences is publ"):
        read("demonstration", [{"history": None, **row} for row in rows])


def test_kto_of_messages():
    rows = [{"messages": [u("Gem?"), a(t)], "label": t == "Opal."} for t in ("Gum.", "Opal.")]
    assert read("demonstration", rows) == [([u("Gem?")], [a("Opal.")])]
    assert read("ranking", rows) == [([u("Gem?")], [[a("Gum.")], [a("Opal.")]], [2, 1])]


def test_one_scale_a_ranking():
    """A fine-grained score beside overall scores is on another scale: it gives no place."""
    scores = [(7.0, 4.0), (None, 5.0), (2.0, 1.0)]
    given = [
        {"response": text, "overall_score": overall, "fine-grained_score": fine}
        for text, (overall, fine) in zip("abc", scores, strict=True)
    ]
    row = {"instruction": "Name a sea.", "completions": given}
    fine = [{**one, "overall_score": None} for one in given]
    assert read("ranking", [row, {**row, "completions": fine}]) == [
        ("Name a sea.", ["a", "c"], [1, 2]),
        ("Name a sea.", ["a", "b", "c"], [2, 1, 3]),
    ]


@pytest.mark.parametrize(
    ("row", "bad"),
    [
        ({**PKU[0], "ranks": 0}, {"ranks": 7}),
        (TLDR[0], {"choice": 5}),
        (HELPSTEER2[0], {"preference_strength": -100}),
        (SHP[0], {"labels": 3}),
        (ARENA[0], {"winner": None}),
    ],
    ids=["pku", "tldr", "helpsteer2", "shp", "arena"],
)
def test_a_choice_that_does_not_exist_is_no_tie(row, bad, caplog):
    assert len(read("ranking", [row, {**row, **bad}])) == 1
    assert "1 no order" in caplog.text


def test_the_first_row_may_be_empty():
    for rows in (ULTRAFEEDBACK, NECTAR, REWARD_BENCH, STEPWISE):
        kind = "demonstration" if rows is STEPWISE else "ranking"
        lists = {name: [] for name, value in rows[0].items() if isinstance(value, list)}
        found = read(kind, [{**rows[0], **lists}, *rows])
        assert [row for row in found if row[1]] == read(kind, rows)


def test_columns_that_the_user_names_replace_those_of_the_shape():
    row = {**ALPACA[1], "gold": "Ruby."}
    named = {"completion": "gold"}
    assert read("demonstration", [row], columns=named) == [("Name a gem.", "Ruby.")]
    row = {**DISTILABEL[0], "votes": [1.0, 2.0, 3.0]}
    (ranking,) = read("ranking", [row], columns={"scores": "votes"})
    assert ranking[2] == [3, 2, 1]
    weighted = Reading(columns={"weight": "score_ratio"})
    assert load_rankings(Dataset.from_list(SHP), reading=weighted)["weight"][:] == [7.75, 7.75]


def test_prompts_need_no_choice_between_responses():
    assert read("prompt", PKU) == [("Thaw a pipe?",)]
    assert read("prompt", PAIRWISE) == [("Reed?",)]


def test_a_row_that_is_not_as_published_is_named():
    rows = [{**OASST_FLAT[0], "message_id": None}, *OASST_FLAT]
    with pytest.raises(InputError, match="row 1: the row is not as OASST messages is published"):
        read("ranking", rows)
    short = [{**FACTORY[0], "history": [["Ocean?"]]}, FACTORY[1]]
    with pytest.raises(InputError, match="row 1: the row is not as Alpaca pairs is published"):
        read("pair", short)
    assert len(read("pair", short, on_bad_record="skip")) == 1
    answers = [{"answer": "a", "rank": "good"}, {"answer": "b", "rank": "bad"}]
    with pytest.raises(InputError, match="row 1: the row is not as Nectar is published"):
        read("ranking", [{"prompt": "Ice?", "answers": answers}])
    talk = [{"role": role, "content": [None]} for role in ("user", "assistant")]
    with pytest.raises(InputError, match="row 1: `messages.0.` has a part that is no text"):
        load_demonstrations(Dataset.from_list([{"messages": talk}]))
    talk = [{"role": [role], "content": "a"} for role in ("user", "assistant")]
    with pytest.raises(InputError, match="row 1: `messages.0.` has no text `role`"):
        load_demonstrations(Dataset.from_list([{"messages": talk}]))


def test_dialogues_that_lose_turns_are_counted(caplog):
    read("demonstration", SHAREGPT)
    assert "; left out: 1 no answer; 1 dialogues cut to a question and its reply" in caplog.text


def test_prompts_of_messages_keep_calls_of_tools():
    call = {"type": "function", "function": {"name": "now", "arguments": "{}"}}
    talk = [u("Time?"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    talk += [{"role": "tool", "content": "3"}, u("And now?"), a("4")]
    (prompt,) = load_prompts(Dataset.from_list([{"messages": talk}]))["prompt"][:]
    assert prompt[1]["tool_calls"][0]["function"]["name"] == "now"


def test_splits_of_h4_without_pairs():
    """train_gen has no pair, train_sft only the dialogue."""
    empty = {"chosen": [], "rejected": [], "score_chosen": 0.0, "score_rejected": 0.0}
    rows = [{**H4[0], **empty}, H4[0]]
    assert read("prompt", rows) == [([u("Hi")],)]
    assert read("demonstration", rows[:1]) == [([u("Hi")], [a("Hello")])]
    assert len(read("ranking", rows)) == 1


def test_rated_pairs_beside_their_prompt():
    """The prompt may be messages of its own, which the replies repeat or not."""
    row = {"prompt": [u("Hi")], "chosen": [a("Hello")], "rejected": [a("What")]}
    row |= {"score_chosen": 2.0, "score_rejected": 1.0}
    whole = {**row, "chosen": [u("Hi"), a("Hello")], "rejected": [u("Hi"), a("What")]}
    expected = [([u("Hi")], [a("Hello")], [a("What")])]
    assert read("pair", [row]) == read("pair", [whole]) == expected


def test_answers_of_argilla_that_rank_nothing(caplog):
    row = {**ARGILLA1[0], "stars": [{"user_id": "u", "value": 4, "status": "submitted"}]}
    assert read("ranking", [row]) == [("Fern?", ["Fir.", "Bracken."], [2, 1])]
    assert "1 an answer to `stars`, which ranks nothing" in caplog.text


def rated(labeler, **stars):
    """Argilla's ratings of one person."""
    return {name: [{"user_id": labeler, "value": value}] for name, value in stars.items()}


def test_ratings_of_argilla(caplog):
    """response_1 is no response_10; ratings of the prompt or of one text alone rank nothing."""
    fields = {"prompt": "Fern?", "response_1": "Fir.", "response_10": "Bracken."}
    both = rated("u", response_1_rating=2, rate_response_10=5, prompt_rating=3)
    rows = [
        {"fields": fields, "responses": both},
        {"fields": fields, "responses": rated("v", response_1_rating=2)},
        {"fields": fields, "responses": {**both, **ARGILLA2[0]["responses"]}},
    ]
    rows[2]["responses"]["ranking"] = [{"user_id": "u", "value": ["response_1", "response_10"]}]
    path = Dataset.from_list([json.loads(json.dumps(row)) for row in rows])
    assert read("ranking", path) == [
        ("Fern?", ["Fir.", "Bracken."], [2, 1]),
        ("Fern?", ["Fir.", "Bracken."], [1, 2]),
    ]
    told = caplog.text
    assert "2 an answer to `prompt_rating`, which ranks nothing" in told
    assert "1 a rating of one text alone" in told and "1 ratings beside a ranking" in told


def test_ratings_of_several_tasks_and_within_one():
    """Each task that rates several texts is a ranking; tasks that rate one text make one."""

    def task(data, **stars):
        results = [{"to_name": n, "value": {"rating": value}} for n, value in stars.items()]
        annotation = {"completed_by": 1, "result": results}
        return {"data": {"prompt": "Reed?", **data}, "annotations": [annotation]}

    rows = [
        task({"one": "Sedge.", "two": "Read."}, one=4, two=1),
        task({"one": "Rush.", "two": "Red."}, one=1, two=2),
        task({"one": "Reed."}, one=3),
        task({"one": "Weed."}, one=1),
    ]
    assert read("ranking", rows) == [
        ("Reed?", ["Sedge.", "Read."], [1, 2]),
        ("Reed?", ["Rush.", "Red."], [2, 1]),
        ("Reed?", ["Reed.", "Weed."], [1, 2]),
    ]


def test_calls_of_tools_are_kept():
    """`content` is null beside them, and tables give every message every key."""
    call = {"type": "function", "function": {"name": "now", "arguments": '{"zone": "CET"}'}}
    talk = [u("Time?"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    shown = load_demonstrations(Dataset.from_list([{"messages": talk}]))[0]
    assert shown["completion"][0]["tool_calls"][0]["function"]["name"] == "now"


def test_oasst(tmp_path):
    path = tmp_path / "trees.jsonl"
    path.write_text(json.dumps(tree()) + "\n" + json.dumps(tree("growing")) + "\n")
    root, best = [u("Hi")], [u("Hi"), a("Hello"), u("More?")]
    for source in (str(path), OASST_FLAT):
        assert read("ranking", source) == [
            (root, [[a("Go away")], [a("Hello")], [a("Hey")]], [3, 1, 2])
        ]
        assert read("demonstration", source) == [(root, [a("Hello")]), (best, [a("No.")])]
        assert read("prompt", source) == [(root,), (best,), ([u("Hi"), a("Hey"), u("Who?")],)]


def test_the_user_says_which_target():
    with pytest.raises(
        InputError, match="row 1: .*ranks=better_response_id, or .*safer_response_id"
    ):
        read("ranking", PKU)
    better = read("ranking", PKU, columns={"ranks": "better_response_id"})
    assert [ranks for *_, ranks in better] == [[1, 2], [2, 1]]
    safer = read("pair", PKU, columns={"ranks": "safer_response_id"})
    assert safer == [("Thaw a pipe?", "Hair dryer.", "Torch.")] * 2
    other = read("ranking", ATTRIBUTES, columns={"scores": "correctness"})
    assert [ranks for *_, ranks in other] == [[2, 1], [1, 1]]


def test_the_user_says_which_side():
    with pytest.raises(InputError, match="'right', .*fields are prompt, answer1, answer2.*left="):
        read("ranking", PAIRWISE)
    assert read("ranking", PAIRWISE, columns=SIDES) == [("Reed?", ["Sedge.", "Read."], [2, 1])]
    assert read("ranking", JSON_MIN, columns=SIDES) == [("Reed?", ["Sedge.", "Read."], [1, 2])]


def test_several_ratings_in_one_task():
    tags = [{"to_name": f"answer{n}", "value": {"rating": stars}} for n, stars in ((1, 4), (2, 5))]
    row = {**PAIRWISE[0], "annotations": [{"completed_by": 1, "result": tags}]}
    assert read("ranking", [row]) == [("Reed?", ["Sedge.", "Read."], [2, 1])]


def test_two_lists_that_a_ranker_may_mean():
    data = {**RANKER[0]["data"], "other": [{"id": "x", "body": "B"}, {"id": "y", "body": "A"}]}
    row = {**RANKER[0], "data": data}
    with pytest.raises(InputError, match="lists items, other have. Say which: --columns resp"):
        read("ranking", [row])
    named = {"responses": "other"}
    assert read("ranking", [row], columns=named) == [("Reed?", ["A", "B"], [1, 2])]


def test_pairs_are_no_rankings():
    with pytest.raises(InputError, match="these are pairs; load_pairs reads them"):
        read("ranking", [{"prompt": "2?", "chosen": "4", "rejected": "5"}])


def test_options_of_argilla_that_are_no_fields():
    row = {**ARGILLA2[0], "fields": {"prompt": "Fern?", "one": "Fir.", "two": "Bracken."}}
    with pytest.raises(
        InputError, match="ranks response_2, response_1, but the fields are prompt, one"
    ):
        read("ranking", [row])
    named = {"response_1": "one", "response_2": "two"}
    assert read("ranking", [row], columns=named)[0] == ("Fern?", ["Bracken.", "Fir."], [1, 2])


def test_buckets_of_a_ranker():
    value = {"ranker": {"good": ["x"], "bad": ["y"]}}
    row = {**RANKER[0], "annotations": [{"completed_by": 1, "result": [{"value": value}]}]}
    with pytest.raises(InputError, match="several buckets"):
        read("ranking", [row])


def test_labelers_are_kept():
    assert load_rankings(Dataset.from_list(ARGILLA2))["labeler"][:] == ["u", "v"]
    assert load_rankings(Dataset.from_list(RANKER))["labeler"][:] == ["2"]


def test_a_line_says_how_a_file_was_read(caplog):
    read("demonstration", ALPACA)
    read("pair", WEBGPT)
    assert [record.message for record in caplog.records if "read as" in record.message] == [
        "the given Dataset: read as Alpaca: 3 rows give 2 demonstrations; left out: "
        "1 an empty reply",
        "the given Dataset: read as WebGPT comparisons: 4 rows give 3 rankings; left out: "
        "1 an empty reply",
    ]


def test_an_odd_role_names_the_row(tmp_path):
    row = {"conversations": [{"from": "narrator", "value": "Once"}, {"from": "gpt", "value": "B"}]}
    path = tmp_path / "talks.jsonl"
    path.write_text(f"{json.dumps(SHAREGPT[0])}\n\n{json.dumps(row)}\n")
    with pytest.raises(InputError, match=r"talks\.jsonl, line 3: .*role 'narrator'; one of system"):
        load_demonstrations(path)


def test_a_winner_that_nobody_knows():
    with pytest.raises(InputError, match="`winner` is str 'both'"):
        read("ranking", [{**ARENA[0], "winner": "both"}])


def test_what_a_shape_does_not_hold():
    with pytest.raises(InputError, match="SHP: 2 rows give 0 demonstrations.*holds demonst"):
        read("demonstration", SHP)
    with pytest.raises(
        InputError, match="read as TRL's stepwise supervision: 2 rows give 0 rankings"
    ):
        read("ranking", STEPWISE)


def test_faults_after_a_reading_name_the_line(tmp_path):
    path = tmp_path / "alpaca.jsonl"
    rows = [ALPACA[2], ALPACA[0], {"instruction": "Sum", "output": "3", "input": ["1", "2"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    demonstrations = load_demonstrations(path)
    assert demonstrations["prompt"][:] == ["Past tense?\nswim"]


@pytest.mark.parametrize("streaming", [False, True])
def test_streams_of_published_shapes(tmp_path, streaming):
    path = tmp_path / "alpaca.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ALPACA))
    found = [row["completion"] for row in load_demonstrations(path, streaming=streaming)]
    assert found == ["swam", "Opal."]
    path.write_text("".join(json.dumps(row) + "\n" for row in ATTRIBUTES))
    if streaming:
        with pytest.raises(InputError, match="lie in several rows: that cannot be streamed"):
            load_rankings(path, streaming=True)


def test_a_stream_of_pairs_is_not_loaded_whole(tmp_path, monkeypatch):
    path = tmp_path / "shp.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SHP))
    load, asked = sources.load_dataset, []

    def spy(*given, streaming, **options):
        asked.append(streaming)
        return load(*given, streaming=streaming, **options)

    monkeypatch.setattr(sources, "load_dataset", spy)
    found = [row["chosen"] for row in load_pairs(path, streaming=True)]
    assert (found, asked) == (["Let it rest.", "Bad luck."], [True])


def test_our_own_fields_are_read_as_they_are():
    """Columns of published shapes beside ours do not matter."""

    def shape_read(rows, kind):
        return conversion.read(Dataset.from_list(rows), "train", False, kind, AS_PUBLISHED)[2]

    ranking = {"prompt": "2?", "responses": ["4", "5"], "ranks": [2, 1]}
    beside = {"instruction": "x", "response_1": "y", "response_2": "z", "preference_strength": 1}
    assert shape_read([ranking | beside], "ranking") is None
    shown = {"prompt": "2?", "completion": "4", "instruction": "x", "output": "y", "label": "sums"}
    assert shape_read([shown], "demonstration") is None
    asked = {"prompt": "2?", "instruction": "x", "output": "y"}
    assert shape_read([asked], "prompt") is None
    labelled = {"instruction": "x", "output": "y", "label": 1}
    for kind, row in (("ranking", ranking), ("prompt", {"prompt": "2?"})):
        assert shape_read([row | labelled], kind) is None
    pair = {"prompt": "2?", "chosen": "4", "rejected": "5", "input": "x"}
    assert shape_read([pair], "ranking") is None


def test_other_columns_of_prompts_reach_the_reward():
    prompts = load_prompts(Dataset.from_list([{**ALPACA[0], "level": 3}]))
    assert prompts[0] == {**ALPACA[0], "level": 3, "prompt": "Past tense?\nswim"}


def test_what_a_path_says_of_a_value():
    assert _holds({"answers": [{"rank": 1}]}, "answers[].rank")
    assert _holds({"labels": [True]}, "labels[]")
