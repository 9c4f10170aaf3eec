"""The shapes of published files: short functions from a file's row to our fields.

A function gives a record, or a list of them, with `prompt` and what else the row holds:
`completion` (a demonstration); `responses` with `ranks` (1 = best; None: no place) or `scores`
(higher = better); `labeler`. A text in place of a record says why there is none. `recognition.py`
tells the shapes apart, `conversion.py` sorts out what a reading cannot use (an empty reply).
docs/bring_your_data.md has the sources.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trl_instruct.data.dialogues import extract_prompt, messages_of, said, split_reply
from trl_instruct.data.orders import number_of
from trl_instruct.data.sources import Record
from trl_instruct.errors import InputError, kind_of

Given = dict[str, Any] | str | list[Any]
PAIR = ("chosen", "rejected")
DIALOGUES = ("conversations", "messages", "context_messages")


def alpaca(row: Record) -> Given:
    """`instruction`, `input`, `output`; LLaMA-Factory adds `system` and `history`. OpenRLHF has
    `question` and `response`, `input` and `output`, or `context_messages`: text or messages.
    """
    prompt, answer = _asked(row), row.get(key_of(row, "output", "response") or "")
    if isinstance(answer, list) and all(isinstance(one, str) for one in answer):
        # Of old versions of LLaMA-Factory: best first.
        return {"prompt": prompt, "responses": answer, "ranks": list(range(1, len(answer) + 1))}
    talks = isinstance(prompt, list) and isinstance(answer, str)
    return {"prompt": prompt, "completion": said(answer) if talks else answer}


def sharegpt(row: Record) -> Given:
    """`conversations` of `from` and `value`; `system` and `tools` beside them."""
    return split_reply(_turns(row)) | ({"tools": row["tools"]} if row.get("tools") else {})


def dialogue(row: Record) -> Given:
    """`messages` as prompts: all before the last reply; of UltraChat the first message."""
    turns = row["messages"] or []
    if any(isinstance(turn.get("content"), list) for turn in turns):
        turns = messages_of("messages", turns)
    asked = [m for m in turns if m["role"] == "user"][:1] if row.get("prompt") else []
    return {"prompt": asked} if asked else split_reply(turns)


def unpaired(rows: Sequence[Record]) -> Given:
    """KTO, `label` or `kto_tag`: good ones are demonstrations, both kinds make a ranking."""
    given = [judged(row) for row in rows]
    labels = [row.get(key_of(row, "label", "kto_tag") or "") for row in rows]
    if odd := [label for label in labels if label not in (None, 0, 1)]:
        raise InputError(f"`label` is {kind_of(odd[0])}; true (a good reply) or false is needed.")
    ranks = [None if label is None else 1 if label else 2 for label in labels]
    ranked = {"responses": [one.get("completion") for one in given], "ranks": ranks}
    shown = [one for one, label in zip(given, labels, strict=True) if label]
    return [{"prompt": given[0]["prompt"], **ranked}, *shown]


def judged(row: Record) -> Any:
    """A row of KTO data: our fields, `messages`, ShareGPT's or Alpaca's."""
    if "completion" in row:
        return {"prompt": row["prompt"], "completion": row["completion"]}
    return sharegpt(row) if {*DIALOGUES} & set(row) else alpaca(row)


def stepwise(row: Record) -> Given:
    """`labels` judge the steps of one answer: it is a demonstration if all are true."""
    steps, labels = row["completions"] or [], row["labels"] or []
    record = {"prompt": row["prompt"], "completion": None}
    if len(steps) != len(labels):
        return {**record, "why": "labels that do not match the steps"}
    if not all(labels):
        return {**record, "why": "a wrong step"}
    return {**record, "completion": "\n".join(steps)}


def pairs(row: Record) -> Given:
    """`chosen` and `rejected`, dialogues that begin alike: HH-RLHF, TRL, OpenRLHF. With ratings,
    and often `prompt`: UltraFeedback binarized (H4, Argilla), distilabel's DPO.
    """
    better, worse = _dialogues(row)
    shown = split_reply(messages_of("messages", row.get("messages") or []))
    prompt = row.get("prompt")
    if not better or not worse:  # a split for generation or SFT
        if shown["prompt"]:
            return shown
        return {"prompt": prompt, "responses": []} if "prompt" in row else "no answer"
    if prompt is None or (isinstance(better, list) and isinstance(prompt, str)):
        prompt, better, worse = extract_prompt({"chosen": better, "rejected": worse}).values()
    return {**shown, **_pair(prompt, better, worse, _rated(row))}


def argilla_pairs(row: Record) -> Given:
    """Argilla's older UltraFeedback: `instruction`, `chosen_response`, `rejected_response`."""
    return _pair(row["instruction"], row["chosen_response"], row["rejected_response"], _rated(row))


def prompted_pairs(row: Record) -> Given:
    """The dialogue of ShareGPT or OpenRLHF, or Alpaca's columns, beside `chosen`, `rejected`."""
    return _pair(_turns(row) if {*DIALOGUES} & set(row) else _asked(row), *_dialogues(row))


def swift_pairs(row: Record) -> Given:
    """ms-swift: `messages`, whose last is the better reply, and the worse one."""
    parts = split_reply(messages_of("messages", row["messages"]))
    worse = said(row.get("rejected_response"))
    if worse is None:
        others = messages_of("rejected_messages", row.get("rejected_messages") or [])
        worse = split_reply(others).get("completion")
    return parts | _pair(parts["prompt"], parts.get("completion"), worse)


def helpsteer2(row: Record) -> Given:
    """`preference_strength` from -3, `response_1` is better, to 3; one file for both splits."""
    if row.get("split") == "validation":
        return "of the split `validation`"
    ranks = _signed(row["preference_strength"])
    return _pair(row["prompt"], row["response_1"], row["response_2"], ranks)


def helpsteer3(row: Record) -> Given:
    """`overall_preference` from -3, `response1` is better, to 3."""
    context = row["context"]
    prompt = context if isinstance(context, str) else messages_of("context", context)
    return _pair(prompt, row["response1"], row["response2"], _signed(row["overall_preference"]))


def pku_safe(row: Record) -> Given:
    """`better_response_id` or `safer_response_id`, as the user says: `ranks=...`."""
    if "ranks" not in row:
        raise InputError(
            "PKU-SafeRLHF says which response is better and which is safer. Choose: --columns "
            "ranks=better_response_id, or --columns ranks=safer_response_id."
        )
    return _pair(row["prompt"], row["response_0"], row["response_1"], _indexed(row["ranks"], 2))


def webgpt(row: Record) -> Given:
    """`score_0` and `score_1`, higher is better; the question is an object."""
    question, scores = row["question"], [row["score_0"], row["score_1"]]
    prompt = question["full_text"] if isinstance(question, Mapping) else question
    return {"prompt": prompt, "responses": [row["answer_0"], row["answer_1"]], "scores": scores}


def tldr(row: Record) -> Given:
    """OpenAI's summaries of posts and news; `choice` is the index of the better one."""
    info = {name: value or "" for name, value in row["info"].items()}
    body = re.sub(r"\n\n+", "\n", info.get("post") or info.get("article") or "")
    if info.get("post"):
        prompt = f"SUBREDDIT: r/{info.get('subreddit')}\n\nTITLE: {info.get('title')}\n\nPOST: "
    else:
        prompt = f"TITLE: {info.get('title')}\n\n"
    texts = [summary["text"] for summary in row["summaries"] or []]
    ranks = _indexed(row["choice"], len(texts))
    return {"prompt": f"{prompt}{body}\n\nTL;DR:", "responses": texts, "ranks": ranks}


def shp(row: Record) -> Given:
    """Stanford's posts: `labels` 1 says that A is better, 0 that B is."""
    ranks = {1: [1, 2], 0: [2, 1]}.get(row["labels"], [None, None])
    return _pair(row["history"], row["human_ref_A"], row["human_ref_B"], ranks)


def arena(row: Record) -> Given:
    """Two conversations; the shared prompt is the first user turn, the rest are the responses."""
    a, b = (messages_of(name, row[name]) for name in ("conversation_a", "conversation_b"))
    start = 1 + next((i for i, message in enumerate(a) if message["role"] == "user"), 0)
    if a[:start] != b[:start]:
        return "two prompts"
    ranks = {"model_a": [1, 2], "model_b": [2, 1], "tie": [1, 1], "tie (bothbad)": [1, 1]}
    if row["winner"] is None:
        return "no order"
    if row["winner"] not in ranks:
        raise InputError(f"`winner` is {kind_of(row['winner'])}; {', '.join(ranks)} are known.")
    return _pair(a[:start], a[start:], b[start:], ranks[row["winner"]])


def ultrafeedback(row: Record) -> Given:
    """OpenBMB's: four completions, each with its score. Their system prompts differ: not read."""
    given = row["completions"] or []
    names = ("scores", "overall_score", "fine-grained_score")
    held = [name for name in names if any(c.get(name) is not None for c in given)]
    scores = [number_of(completion.get(held[0])) if held else None for completion in given]
    texts = [completion["response"] for completion in given]
    return {"prompt": row["instruction"], "responses": texts, "scores": scores}


def nectar(row: Record) -> Given:
    """Seven answers, each with its `rank`, 1 = best."""
    answers = row["answers"] or []
    texts, ranks = [a["answer"] for a in answers], [a.get("rank") for a in answers]
    return {"prompt": row["prompt"], "responses": texts, "ranks": ranks}


def distilabel(row: Record) -> Given:
    """`generations` and their `ratings`, some of which the parser may have lost; QualityScorer's
    `responses` and `scores`; PairRM's `candidates` and `ranks`, whose `ranked_candidates` are a
    wrong permutation: not read.
    """
    names = {"generations": "ratings", "responses": "scores", "candidates": "ranks"}
    texts, order = next(pair for pair in names.items() if set(pair) <= set(row))
    responses, numbers = row[texts] or [], [number_of(number) for number in row[order] or []]
    record = {"prompt": _asked(row), "responses": responses}
    record["ranks" if order == "ranks" else "scores"] = numbers
    matches = len(responses) == len(numbers)
    return record if matches else {**record, "why": f"{order} that do not match the {texts}"}


def reward_bench(row: Record) -> Given:
    """Lists in `chosen`, all rank 1, and `rejected`, all rank 2."""
    better, worse = row["chosen"] or [], row["rejected"] or []
    ranks = [1] * len(better) + [2] * len(worse)
    return {"prompt": row["prompt"], "responses": better + worse, "ranks": ranks}


def helpsteer2_attributes(rows: Sequence[Record]) -> Given:
    """One response a row, scored from 0 to 4; rows of one prompt make a ranking."""
    scores = [row.get("scores", row["helpfulness"]) for row in rows]
    if any(isinstance(score, list) for score in scores):
        raise InputError("`helpfulness` is a list (disagreements/); single scores are needed.")
    texts = [row["response"] for row in rows]
    return {"prompt": rows[0]["prompt"], "responses": texts, "scores": scores}


def oasst_tree(row: Record) -> Given:
    """A tree of messages: rankings of the replies to a prompter, rank 0 = best; the best path."""
    if row.get("tree_state") not in (None, "ready_for_export"):
        return f"a tree in the state {row['tree_state']}"
    return _prompter(row["prompt"], [], best=True)


def oasst_messages(rows: Sequence[Record]) -> Given:
    """The same trees as a table of messages, joined by `parent_id`."""
    nodes = {row["message_id"]: {**row, "replies": []} for row in rows}
    lost = 0
    for node in nodes.values():
        parent = node["parent_id"]
        lost += bool(parent) and parent not in nodes
        nodes.get(parent, {"replies": []})["replies"].append(node)
    roots = [node for node in nodes.values() if not node["parent_id"]]
    trees = [oasst_tree({"prompt": root, "tree_state": root.get("tree_state")}) for root in roots]
    found = [given for tree in trees for given in (tree if isinstance(tree, list) else [tree])]
    return found + ["a message without its parent"] * lost


def _prompter(node: Mapping[str, Any], path: list[Any], *, best: bool) -> list[Any]:
    """Records of a prompter's message and what follows; `best`: the path is the best one."""
    if not _counts(node):
        return []
    prompt = [*path, {"role": "user", "content": node["text"]}]
    replies = [reply for reply in node.get("replies") or [] if _counts(reply)]
    if not replies:
        return [{"prompt": prompt}]
    ranks = [reply.get("rank") for reply in replies]
    first = replies[ranks.index(min((r for r in ranks if r is not None), default=ranks[0]))]
    found = [{"prompt": prompt, "responses": [r["text"] for r in replies], "ranks": ranks}]
    found += [{"prompt": prompt, "completion": said(first["text"])}] * best
    for reply in replies:
        for follower in reply.get("replies") or []:
            on_best = best and reply is first
            found += _prompter(follower, prompt + said(reply["text"]), best=on_best)
    return found


def _counts(node: Mapping[str, Any]) -> bool:
    refused = node.get("review_result") is False
    return not (node.get("deleted") or node.get("synthetic") or refused)


def _pair(prompt: Any, better: Any, worse: Any, ranks: Sequence[Any] = (1, 2)) -> dict[str, Any]:
    return {"prompt": prompt, "responses": [better, worse], "ranks": [*ranks]}


def _signed(strength: Any) -> list[Any]:
    """Ranks of two responses: a negative strength is for the first."""
    if strength is None or abs(strength) > 3:
        return [None, None]
    return [1, 1] if strength == 0 else [1, 2] if strength < 0 else [2, 1]


def _indexed(better: Any, count: int) -> list[Any]:
    """Ranks of responses of which one, by its index from 0, is the best."""
    known = not isinstance(better, bool) and number_of(better) in range(count)
    return [1 if index == int(better) else 2 for index in range(count)] if known else [None] * count


def _rated(row: Record) -> list[int]:
    """Ranks of a pair beside which its ratings stand: equal ones are a tie."""
    ratings = [number_of(row[name]) for name in ratings_of(row)]
    return [1, 1] if None not in ratings and len(set(ratings)) == 1 else [1, 2]


def ratings_of(row: Record) -> list[str]:
    """The two columns in which a pair has its ratings."""
    for form in ("score_{}", "{}-rating", "{}_rating", "{}_score", "{}_avg_rating"):
        names = [form.format(side) for side in PAIR]
        if set(names) <= set(row):
            return names
    return []


def _asked(row: Record) -> Any:
    """Instruction and input as text; as messages if there are system, history or messages."""
    names = ("context_messages", "instruction", "question", "input", "context")  # Dolly's
    asked = [value for name in names if (value := row.get(key_of(row, name) or ""))]
    if asked and isinstance(asked[0], list):
        return with_system(row, asked[0])
    text = "\n".join(asked)
    if key_of(row, "system", "system_prompt", "history") is None:
        return text
    turns: list[dict[str, str]] = []
    for question, answer in row.get("history") or []:
        turns += [{"role": "user", "content": question}, *(said(answer) or ())]
    return with_system(row, [*turns, {"role": "user", "content": text}])


def _turns(row: Record) -> list[dict[str, str]]:
    """The dialogue, with the text of a system column."""
    name = next(name for name in DIALOGUES if name in row)
    return with_system(row, messages_of(name, row[name] or []))


def with_system(row: Record, turns: Any) -> Any:
    """Messages, with the text of `system` or `system_prompt` unless they begin with such a turn."""
    text = row.get(key_of(row, "system", "system_prompt") or "")
    head = turns[0] if isinstance(turns, list) and turns else None
    if not text or not isinstance(head, Mapping) or head.get("role") in (None, "system"):
        return turns
    if not isinstance(text, str):
        raise InputError(f"`system` is {kind_of(text)}; text is needed.")
    content = [{"type": "text", "text": text}] if isinstance(head.get("content"), list) else text
    return [{"role": "system", "content": content}, *turns]


def with_system_message(row: Record) -> dict[str, Any]:
    """The same of a record's `messages`, or of both sides of a pair that holds its prompt."""
    names = ("messages",) if {*DIALOGUES} & set(row) else PAIR
    return {name: with_system(row, row[name]) for name in names if name in row}


def _dialogues(row: Record) -> list[Any]:
    """`chosen` and `rejected`, their messages, or the one, in our form."""
    given = [[row[name]] if isinstance(row[name], Mapping) else row[name] for name in PAIR]
    return [messages_of("chosen", one) if isinstance(one, list) else one for one in given]


def key_of(row: Record, *names: str) -> str | None:
    """The column with one of the names, in any case."""
    return next((key for key in row if key.lower() in names), None)
