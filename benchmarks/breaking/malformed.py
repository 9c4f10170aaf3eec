"""Malformed inputs, made from valid ones: data files, options, models, folders, reward files.

Each must end with exit code 2, one line that names what was given, and nothing left behind.
"""

import copy
import gzip
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import world as w
import yaml
from forks import Outcome, command, fork, log_folder, remove

LIMIT = 60  # seconds until a case counts as hung
LONGEST = 1200  # characters of one clear line


class Case(NamedTuple):
    """A command on malformed input.

    `make(folder)` writes the input there and gives the command's arguments. `names`: texts of
    which the error must hold one of each group. `harmless`: it may also run.
    """

    kind: str
    name: str
    make: Callable[[Path], list[Any]]
    names: tuple[tuple[str, ...], ...] = ()
    harmless: bool = False


# ---- records -------------------------------------------------------------------------------------

PAIRED = {"chosen": "good", "rejected": "bad"}
TALK = w.messages("hi") + w.messages("hello", "assistant")
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {
        "text": {"prompt": "2+2=", "completion": "4"},
        "messages": {"messages": TALK},
        "prompt of messages": {"prompt": TALK[:1], "completion": TALK[1:]},
        "Alpaca": {"instruction": "Add.", "input": "2 2", "output": "4"},
        "ShareGPT": {
            "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
        },
        "KTO": {"prompt": "2+2=", "completion": "4", "label": True},
        "stepwise": {"prompt": "2+2=", "completions": ["It is", "4"], "labels": [True, True]},
    },
    "rm": {
        "ranks": {"prompt": "2+2=", "responses": ["5", "4", "?"], "ranks": [2, 1, 3]},
        "scores": {"prompt": "2+2=", "responses": ["5", "4", "?"], "scores": [0.5, 1.0, 0.0]},
        "best first": {"prompt": "2+2=", "responses": ["4", "5"]},
        "pairs": {"prompt": "2+2=", **PAIRED},
        "rated pairs": {"prompt": "2+2=", **PAIRED, "score_chosen": 2.0, "score_rejected": 1.0},
        "HH": {
            "chosen": "\n\nHuman: hi\n\nAssistant: hello",
            "rejected": "\n\nHuman: hi\n\nAssistant: go",
        },
        "UltraFeedback": {
            "instruction": "Add.",
            "completions": [
                {"response": "4", "overall_score": 9.0},
                {"response": "5", "overall_score": 1.0},
            ],
        },
        "Nectar": {
            "prompt": "2+2=",
            "answers": [{"answer": "4", "rank": 1}, {"answer": "5", "rank": 2}],
        },
        "HelpSteer2": {
            **{"prompt": "2+2=", "response_1": "4", "response_2": "5"},
            "preference_strength": -2,
        },
        "SHP": {"history": "2+2=", "human_ref_A": "4", "human_ref_B": "5", "labels": 1},
        "TL;DR": {
            "info": {"post": "A long story.", "title": "T", "subreddit": "s"},
            "summaries": [{"text": "short"}, {"text": "shorter"}],
            "choice": 1,
        },
        "Arena": {
            "conversation_a": TALK,
            "conversation_b": [TALK[0], *w.messages("go", "assistant")],
            "winner": "model_a",
        },
        "OASST": {
            "message_tree_id": "t",
            "prompt": {
                "role": "prompter",
                "text": "hi",
                "replies": [
                    {"role": "assistant", "text": "hello", "rank": 0, "replies": []},
                    {"role": "assistant", "text": "go", "rank": 1, "replies": []},
                ],
            },
        },
    },
    "ppo": {
        "text": {"prompt": "2+2="},
        "messages": {"prompt": TALK[:1]},
        "with a column": {"prompt": "2+2=", "answer": 4},
    },
    "candidates": {"text": {"prompt": "2+2="}},
    "evaluate": {"text": {"prompt": "2+2="}},
    "pretrain": {"text": {"text": "a text of a few words " * 4}},
}
VALUES: dict[str, Any] = {
    "null": None,
    "empty text": "",
    "blanks": " \n\t",
    "a number": 7,
    "a huge number": 10**30,
    "infinity": float("inf"),
    "NaN": float("nan"),
    "true": True,
    "an empty list": [],
    "a list of null": [None],
    "a list of numbers": [1, 2.5],
    "a list of lists": [["a"], []],
    "an empty object": {},
    "an object": {"role": 1, "content": []},
    "control characters": "\x1b[2J\x1b]0;owned\x07\x00\x08",
    "half a surrogate pair": "\ud83d",
    "a long text": "word " * 40_000,
    "text for a number": "very good",
}
ROWS = 6  # of a malformed file; one of them is faulty


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all fields in a record, outer ones first."""
    children = value.items() if isinstance(value, dict) else ()
    children = enumerate(value) if isinstance(value, list) else children
    for key, child in children:
        yield (*path, key)
        yield from paths_in(child, (*path, key))


def changed(record: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy of a record with another value at a path; `...` removes it."""
    new = copy.deepcopy(record)
    place: Any = new
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return new


def field_cases(world: Path, rng: random.Random, each: int) -> Iterator[Case]:
    """One field of one record has a wrong value: the first record, a later one, or all."""
    for stage, shapes in SHAPES.items():
        for shape, record in shapes.items():
            every = [
                (path, what, value, rows)
                for path in paths_in(record)
                for what, value in {**VALUES, "removed": ...}.items()
                for rows in ("first", "later", "all")
            ]
            for path, what, value, rows in rng.sample(every, min(each, len(every))):
                bad = changed(record, path, value)
                where = {"first": [0], "later": [ROWS - 2], "all": range(ROWS)}[rows]
                lines = [bad if row in where else record for row in range(ROWS)]
                lines = [one if one is bad else _numbered(one, r) for r, one in enumerate(lines)]
                text = "\n".join(json.dumps(line) for line in lines) + "\n"
                yield Case(
                    f"field of {stage}",
                    f"{shape}: {'.'.join(map(str, path))} is {what} ({rows})",
                    lambda folder, s=stage, t=text: data_file(world, folder, s, t),
                    (("data.jsonl", "Prompt "),),
                    harmless=True,
                )


def _numbered(record: dict[str, Any], row: int) -> dict[str, Any]:
    """A record whose prompt is its own, so that records differ as in real files."""
    new = copy.deepcopy(record)
    for name in ("prompt", "instruction", "history"):
        if isinstance(new.get(name), str):
            new[name] += f" {row}"
    return new


def data_file(
    world: Path, folder: Path, stage: str, content: str | bytes, name: str = "data.jsonl"
) -> list[Any]:
    """Write a data file; the arguments of a stage that reads it."""
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    (folder / name).write_bytes(raw)
    model = {} if stage == "pretrain" else {"model_name_or_path": world / "chat_policy"}
    model |= {"reward_model_path": [world / "chat_reward"]} if stage == "ppo" else {}
    model = {"models": [world / "chat_policy"]} if stage == "evaluate" else model
    return arguments(world, folder, stage, dataset_name=name, **model)


def arguments(world: Path, folder: Path, stage: str, **options: Any) -> list[Any]:
    """The arguments of a stage: valid options but for those given."""
    given = w.options(stage, world, **options)
    return [stage, "--config", w.write_options(folder / "case.yaml", given).name]


# ---- files ---------------------------------------------------------------------------------------


def broken_files(text: str) -> dict[str, bytes]:
    """Contents that are no valid .jsonl, from one that is."""
    raw, lines = text.encode(), text.splitlines()
    middle = len(lines) // 2
    return {
        "empty": b"",
        "blank": b"  \n\n \n",
        "cut at a quarter": raw[: len(raw) // 4],
        "cut before its last brace": raw.rstrip()[:-1],
        "cut inside a character": raw.replace(b"2", "ü".encode())[:-1] + "ü".encode()[:1],
        "zeros at the end": raw[: len(raw) // 2] + bytes(len(raw) // 2),
        "zeros": bytes(200),
        "random bytes": random.Random(0).randbytes(300),
        "latin-1": raw.replace(b'"2', '"ü'.encode("latin-1")).replace(b'"hi', b'"\xfc'),
        "utf-16": text.encode("utf-16"),
        "a list": json.dumps([1, 2, 3]).encode(),
        "lists": b"[1]\n[2]\n",
        "a number": b"42\n",
        "null": b"null\n" * 3,
        "a null line": "\n".join([*lines[:middle], "null", *lines[middle:]]).encode(),
        "text": b"Dear reader,\nthis is no JSON.\n",
        "python": text.replace('"', "'").encode(),
        "a comma too many": text.replace("}\n", ",}\n").encode(),
        "a comment": f"// data\n{text}".encode(),
        "html": b"<!DOCTYPE html><html><body>404</body></html>\n",
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "a png": b"\x89PNG\r\n\x1a\n" + bytes(50),
        "gzip under another name": gzip.compress(raw),
        "nested a thousand deep": b'{"prompt": ' + b"[" * 1000 + b"]" * 1000 + b"}\n",
        "one line of all": " ".join(lines).encode(),
        "a control character": text.replace(" ", "\x00", 1).encode(),
        "an empty object": b"{}\n",
        "other columns": b'{"colour": "red", "size": 3}\n' * 4,
        "columns with escapes": b'{"\\u001b[31mprompt": "a"}\n' * 4,
        "a key twice": b'{"prompt": "a", "prompt": 3}\n' * 4,
        "a number of 400 digits": b'{"prompt": 1' + b"0" * 400 + b"}\n",
    }


def file_cases(world: Path, rng: random.Random, each: int) -> Iterator[Case]:
    """Files that are cut, of another kind, in another encoding; in each format."""
    for stage, shapes in SHAPES.items():
        for shape, record in list(shapes.items())[:2]:
            lines = [_numbered(record, row) for row in range(ROWS)]
            text = "\n".join(json.dumps(line) for line in lines) + "\n"
            for what, raw in rng.sample(list(broken_files(text).items()), each):
                for name in ("data.jsonl", rng.choice(["data.json", "data.csv", "data.parquet"])):
                    yield Case(
                        f"file of {stage}",
                        f"{shape}, {name}: {what}",
                        lambda folder, s=stage, r=raw, n=name: data_file(world, folder, s, r, n),
                        ((name,),),
                        harmless=True,
                    )


TABLES: dict[str, bytes] = {
    "a header alone": b"prompt,completion\n",
    "semicolons": b"prompt;completion\na;b\n",
    "a quote that is not closed": b'prompt,completion\n"a,b\nc,d\n',
    "too many cells": b"prompt,completion\na,b,c,d\ne,f\n",
    "too few cells": b"prompt,completion\na\nb,c\n",
    "a column twice": b"prompt,prompt\na,b\n",
    "no header": b"2+2=,4\n3+3=,6\n",
    "an empty header": b",\na,b\n",
    "a list that is none": b"prompt,responses\na,[1\n",
    "zeros": b"prompt,completion\na,\x00\x00\n",
    "latin-1": b"prompt,completion\n\xfc,\xe4\n",
    "a row of megabytes": b"prompt,completion\na," + b"x" * 3_000_000 + b"\n",
}


def place_cases(world: Path) -> Iterator[Case]:
    """Tables, names and places of data."""

    def table(raw: bytes, stage: str) -> Callable[[Path], list[Any]]:
        return lambda folder: data_file(world, folder, stage, raw, "data.csv")

    for stage in ("sft", "rm"):
        for what, raw in TABLES.items():
            yield Case("table", f"{stage}: {what}", table(raw, stage), (("data.csv",),), True)

    def at(name: str, prepare: Callable[[Path], Any], **options: Any) -> Any:
        def make(folder: Path) -> list[Any]:
            prepare(folder)
            return arguments(world, folder, "sft", dataset_name=name, **options)

        return make

    good = (world / "demonstrations.jsonl").read_bytes()
    zipped = gzip.compress(good)
    places: dict[str, tuple[str, Callable[[Path], Any]]] = {
        "missing": ("gone.jsonl", lambda f: None),
        "missing, in a folder": ("./gone/data.jsonl", lambda f: None),
        "not on the Hub": ("nobody/nothing", lambda f: None),
        "a name with control characters": ("\x1b[31mred", lambda f: None),
        "a name with a zero": ("a\x00b.jsonl", lambda f: None),
        "a long name": ("x" * 5000 + ".jsonl", lambda f: None),
        "an empty name": ("", lambda f: None),
        "an address": ("http://127.0.0.1:9/data.jsonl", lambda f: None),
        "a folder of that name": ("data.jsonl", lambda f: (f / "data.jsonl").mkdir()),
        "an empty folder": ("data", lambda f: (f / "data").mkdir()),
        "a folder of other things": ("data", lambda f: _with(f / "data" / "notes.md", b"hi")),
        "a folder with a broken file": ("data", lambda f: _with(f / "data" / "a.jsonl", b"{")),
        "a saved dataset, cut": ("data", lambda f: _with(f / "data" / "state.json", b"{")),
        "a saved dataset without data": ("data", lambda f: _with(f / "data/state.json", b"{}")),
        "a saved dict, cut": ("data", lambda f: _with(f / "data" / "dataset_dict.json", b"{")),
        "another extension": ("data.txt", lambda f: _with(f / "data.txt", good)),
        "no extension": ("data", lambda f: _with(f / "data", good)),
        "a link to nothing": ("data.jsonl", lambda f: (f / "data.jsonl").symlink_to("gone")),
        "a link to itself": ("data.jsonl", lambda f: (f / "data.jsonl").symlink_to("data.jsonl")),
        "a pipe": ("data.jsonl", lambda f: os.mkfifo(f / "data.jsonl")),
        "a device": ("/dev/null", lambda f: None),
        "gzip, cut": ("data.jsonl.gz", lambda f: _with(f / "data.jsonl.gz", zipped[:-12])),
        "gzip that is none": ("data.jsonl.gz", lambda f: _with(f / "data.jsonl.gz", good)),
        "gzip, a bit flipped": (
            "data.jsonl.gz",
            lambda f: _with(f / "data.jsonl.gz", zipped[:40] + b"\xff" + zipped[41:]),
        ),
        "tiny: of another name": ("tiny:nothing", lambda f: None),
    }
    for what, (name, prepare) in places.items():
        shown = name.strip("./").partition("\x00")[0][:30].replace("\x1b", "") or "dataset_name"
        yield Case("place", f"data: {what}", at(name, prepare), ((shown.split("[31m")[-1],),))
    data = str(world / "demonstrations.jsonl")
    for split in ("test", "train[:200%]", "train[5:2]", "train[", "", "train+test", "train[a:b]"):
        yield Case(
            "place",
            f"split {split!r}",
            at(data, lambda f: None, dataset_train_split=split),
            ((split or "split",),),
        )
    for entry in ({}, {"path": 3}, {"path": "gone.jsonl"}, {"path": data, "weight": 1}, "text", 3):
        yield Case(
            "place",
            f"datasets: {entry}",
            lambda folder, e=entry: arguments(
                world, folder, "sft", dataset_name=None, datasets=[e]
            ),
            (("datasets", "gone.jsonl", "path"),),
        )
    columns = ("prompt", "prompt=", "=x", "prompt=gone", "nothing=prompt", "prompt=prompt=a")
    for column in columns:
        made = at(data, lambda f: None, columns=[column])
        yield Case("place", f"columns {column}", made, (("column", "Column"),), True)
    for template in (
        "{",
        "{gone}",
        "{prompt",
        "}",
        "{0}",
        "{prompt.__class__}",
        "{prompt!r:>999999999}",
    ):
        yield Case(
            "place",
            f"template {template}",
            at(data, lambda f: None, prompt_template=template),
            (("template", template),),
            True,
        )


def _with(path: Path, raw: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return path


# ---- options -------------------------------------------------------------------------------------

WRONG: dict[str, Any] = {
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "2**63": 2**63,
    "400 digits": 10**400,
    "1e400": float("inf"),
    "-inf": float("-inf"),
    "nan": float("nan"),
    "text": "nonsense",
    "empty": "",
    "control characters": "\x1b[2J",
    "true": True,
    "null": None,
    "a list": [1, "a", None],
    "an object": {"a": {"b": 1}},
}
# They reach for the Hub, other machines, or the whole machine's settings.
NOT_TRIED = {"output_dir", "deepspeed", "fsdp_config", "push_to_hub", "use_cpu", "max_steps"}


def option_cases(world: Path, rng: random.Random, each: int) -> Iterator[Case]:
    """Each field of each stage's options with values of each type, in YAML and as flags."""
    from trl import ModelConfig

    from trl_instruct import configs
    from trl_instruct.recipes.options import field_types

    classes = {
        "pretrain": configs.PretrainConfig,
        "sft": configs.SFTConfig,
        "rm": configs.RewardConfig,
        "ppo": configs.PPOConfig,
        "candidates": configs.CandidatesConfig,
        "evaluate": configs.EvaluateConfig,
    }
    for stage, kind in classes.items():
        own = sorted(set(field_types(kind)) | set(field_types(ModelConfig)))
        every = [(n, what) for n in own if n not in NOT_TRIED for what in WRONG]
        for name, what in rng.sample(every, each):
            value, flag = WRONG[what], rng.random() < 0.3

            def make(folder: Path, s=stage, n=name, v=value, as_flag=flag) -> list[Any]:
                if not as_flag:
                    given = {**w.options(s, world), n: v}
                    return [s, "--config", w.write_options(folder / "case.yaml", given).name]
                text = "null" if v is None else json.dumps(v) if isinstance(v, list | dict) else v
                return [*arguments(world, folder, s, **{n: None}), f"--{n}", text]

            where = "flag" if flag else "YAML"
            shown = (name, str(value)[:20])
            yield Case(f"option of {stage}", f"{name}: {what} ({where})", make, (shown,), True)


CONFIGS: dict[str, bytes] = {
    "empty": b"",
    "a list": b"- a\n- b\n",
    "text": b"hello\n",
    "a tab": b"learning_rate:\n\t1e-5\n",
    "not closed": b"columns: [a, b\n",
    "a python object": b"learning_rate: !!python/object/apply:os.system ['true']\n",
    "binary": bytes(range(256)),
    "latin-1": "dataset_name: f\xfcr.jsonl\n".encode("latin-1"),
    "an unknown option": b"learning_rat: 1e-5\n",
    "a numbered option": b"3: 4\n",
    "a null option": b"null: 4\n",
    "a list as option": b"? [a]\n: 4\n",
    "an anchor that is missing": b"learning_rate: *a\n",
    "an anchor of itself": b"columns: &a [*a]\n",
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "json, cut": b'{"seed": 1,',
    "env that is none": b"env: 3\n",
    "env of numbers": b"env: {A: 3}\n",
}


def command_cases(world: Path) -> Iterator[Case]:
    """The command line itself and its YAML file."""
    stages = ("pretrain", "sft", "rm", "ppo", "candidates", "evaluate")
    for number, (what, raw) in enumerate(CONFIGS.items()):
        stage = stages[number % len(stages)]
        yield Case(
            "config file",
            f"{stage}: {what}",
            lambda folder, s=stage, r=raw: [s, "--config", _with(folder / "case.yaml", r).name],
            (("case.yaml", "output_dir", "columns", "env", "dataset"),),
        )
    lines: dict[str, list[Any]] = {
        "no such command": ["sfft"],
        "an option in its place": ["--seed", "1"],
        "no options": ["sft"],
        "no file after --config": ["sft", "--config"],
        "a config that is missing": ["sft", "--config", "gone.yaml"],
        "a config that is a folder": ["sft", "--config", "."],
        "no value": ["sft", "--learning_rate"],
        "an argument too many": ["sft", "stray", "--output_dir", "out"],
        "an option twice": ["sft", "--seed", "a", "--seed", "b"],
        "an option with an escape": ["sft", "--\x1b[31mred", "1"],
        "report of nothing": ["report"],
        "merge of nothing": ["merge"],
        "merge into a file": ["merge", world / "adapter", world / "texts.jsonl"],
        "merge of a model": ["merge", world / "policy", "out"],
        "serve nothing": ["serve-reward"],
        "serve a file": ["serve-reward", "--reward_model_path", world / "texts.jsonl"],
        "serve on no port": ["serve-reward", "--reward_model_path", "tiny", "--port", "99999999"],
        "serve on no host": [
            *("serve-reward", "--reward_model_path", "tiny", "--host", "no.such.host.invalid"),
        ],
        "serve with weights that do not fit": [
            *("serve-reward", "--reward_model_path", "tiny", "--reward_weights", "1", "2"),
        ],
        "check of no stage": ["check", "merge"],
        "evaluate of nothing": ["evaluate", "--dataset_name", world / "prompts.jsonl"],
    }
    for what, line in lines.items():
        yield Case("command line", what, lambda folder, given=line: list(given))


# ---- models --------------------------------------------------------------------------------------


def model_cases(world: Path) -> Iterator[Case]:
    """Folders of models, tokenizers and adapters that are cut, mixed up or of another kind."""

    def edit(name: str, file: str, change: Callable[[Path], Any]) -> Callable[[Path], Path]:
        def prepare(folder: Path) -> Path:
            shutil.copytree(world / name, folder / "model")
            change(folder / "model" / file)
            return folder / "model"

        return prepare

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def flip(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[3] ^= 0xFF
        path.write_bytes(bytes(raw))

    def write(raw: bytes) -> Callable[[Path], Any]:
        return lambda path: path.write_bytes(raw)

    def keys(**given: Any) -> Callable[[Path], Any]:
        def change(path: Path) -> None:
            held = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps({**held, **given}), encoding="utf-8")

        return change

    def folder_instead(path: Path) -> None:
        path.unlink()
        path.mkdir()

    config, weights, tokens = "config.json", "model.safetensors", "tokenizer.json"
    changes: dict[str, tuple[str, Callable[[Path], Any]]] = {}
    for file in (config, weights, tokens, "tokenizer_config.json"):
        changes |= {
            f"{file} missing": (file, Path.unlink),
            f"{file} empty": (file, write(b"")),
            f"{file} cut": (file, cut),
            f"{file} a list": (file, write(b"[1, 2]")),
            f"{file} zeros": (file, write(bytes(500))),
            f"{file} not UTF-8": (file, write(b'{"a": "\xff\xfe"}')),
            f"{file} a folder": (file, folder_instead),
            f"{file} a Git LFS pointer": (file, write(b"version https://git-lfs\noid sha256:0\n")),
        }
    changes |= {
        "weights with a flipped bit": (weights, flip),
        "of no known type": (config, keys(model_type="nonsense")),
        "of a type that is a number": (config, keys(model_type=3)),
        "without a type": (config, keys(model_type=None)),
        "of another type": (config, keys(model_type="gpt2")),
        "an encoder": (config, keys(model_type="bert", architectures=["BertModel"])),
        "of another width": (config, keys(hidden_size=24)),
        "of width 0": (config, keys(hidden_size=0)),
        "of a negative width": (config, keys(hidden_size=-8)),
        "of a width in words": (config, keys(hidden_size="wide")),
        "of null heads": (config, keys(num_attention_heads=None)),
        "of no heads": (config, keys(num_attention_heads=0)),
        "of another vocabulary": (config, keys(vocab_size=100)),
        "of more layers": (config, keys(num_hidden_layers=5)),
        "with code from nowhere": (config, keys(auto_map={"AutoConfig": "gone.Config"})),
        "of no known dtype": (config, keys(dtype="float7")),
        "of a quantization from nowhere": (config, keys(quantization_config={"a": 1})),
        "a tokenizer of no class": ("tokenizer_config.json", keys(tokenizer_class="Nothing")),
        "a tokenizer without EOS": ("tokenizer_config.json", keys(eos_token=None)),
        "an EOS that is a number": ("tokenizer_config.json", keys(eos_token=3)),
        "an EOS that is not there": ("tokenizer_config.json", keys(eos_token="<gone>")),
        "a template that is broken": ("chat_template.jinja", write(b"{% for m in %}")),
        "a stage that has not finished": ("config.yaml", write(b"stage: sft\n")),
        "a foreign config.yaml": ("config.yaml", write(b"defaults:\n  - base\n")),
        "a config.yaml that is none": ("config.yaml", write(b"\x00\x01")),
        "metrics.json cut": ("metrics.json", write(b'{"stage": ')),
        "metrics.json a list": ("metrics.json", write(b"[1]")),
    }
    for what, (file, change) in changes.items():
        for stage in ("sft", "ppo"):
            yield _model_case(
                world, stage, "model_name_or_path", what, edit("policy", file, change)
            )
        rewarding = edit("reward", file, change)
        yield _model_case(world, "ppo", "reward_model_path", what, rewarding)
    places = {
        "a file": lambda folder: world / "texts.jsonl",
        "a weights file": lambda folder: world / "policy" / weights,
        "missing": lambda folder: folder / "gone",
        "an empty folder": lambda folder: _made(folder / "model"),
        "not on the Hub": lambda folder: "nobody/nothing",
        "a bare name": lambda folder: "nothing-of-that-name",
        "no valid name": lambda folder: "a b/c d/e",
        "a long name": lambda folder: "x" * 5000,
        "a name with an escape": lambda folder: "\x1b[31mred",
        "an empty name": lambda folder: "",
        "a python file": lambda folder: world / "rewards.py",
        "a function that is missing": lambda folder: f"{world}/rewards.py:gone",
        "a file that is missing": lambda folder: "gone.py:score",
        "a data folder": lambda folder: _made(folder / "data.jsonl"),
        "the other kind": lambda folder: world / "reward",
    }
    for what, place in places.items():
        for option in ("model_name_or_path", "reward_model_path", "value_model_path"):
            if what == "the other kind" and option != "model_name_or_path":
                continue
            yield _model_case(world, "ppo", option, what, place)
        for stage in ("rm", "candidates"):
            yield _model_case(
                world, stage, "model_name_or_path", what, place, what == "the other kind"
            )
    adapted = "adapter_config.json"
    adapters: dict[str, tuple[str, Callable[[Path], Any]]] = {
        "without weights": ("adapter_model.safetensors", Path.unlink),
        "with weights that are cut": ("adapter_model.safetensors", cut),
        "with empty weights": ("adapter_model.safetensors", write(b"")),
        "with a config that is cut": (adapted, cut),
        "with an empty config": (adapted, write(b"")),
        "with a list as config": (adapted, write(b"[]")),
        "of no base": (adapted, keys(base_model_name_or_path=None)),
        "of a base that is gone": (adapted, keys(base_model_name_or_path="gone/base")),
        "of a base that is a number": (adapted, keys(base_model_name_or_path=3)),
        "of no known kind": (adapted, keys(peft_type="NOTHING")),
        "of another kind": (adapted, keys(peft_type="IA3")),
        "of another task": (adapted, keys(task_type="SEQ_CLS")),
        "of another rank": (adapted, keys(r=7)),
        "of rank 0": (adapted, keys(r=0)),
        "of a rank in words": (adapted, keys(r="many")),
        "of modules that are not there": (adapted, keys(target_modules=["nothing"])),
        "with an unknown key": (adapted, keys(wonder=1)),
        "of the base itself": (adapted, keys(base_model_name_or_path="model")),
    }
    for what, (file, change) in adapters.items():
        for stage, option in (("sft", "model_name_or_path"), ("ppo", "reward_model_path")):
            yield _model_case(
                world, stage, option, f"an adapter {what}", edit("adapter", file, change)
            )
        made = edit("adapter", file, change)
        yield Case(
            "model",
            f"merge of an adapter {what}",
            lambda folder, p=made: ["merge", p(folder).name, "out"],
            (("model", "gone/base"),),
            True,
        )


def _model_case(
    world: Path, stage: str, option: str, what: str, place: Any, harmless: bool = True
) -> Case:
    def make(folder: Path) -> list[Any]:
        named = place(folder)
        inside = isinstance(named, Path) and named.is_relative_to(folder)
        given = str(named.relative_to(folder) if inside else named)
        value = [given] if option == "reward_model_path" else given
        return arguments(world, folder, stage, **{option: value})

    return Case("model", f"{stage}, {option}: {what}", make, (), harmless)


def _made(path: Path) -> Path:
    path.mkdir()
    return path


REWARDS = {
    "a syntax error": "def f(:\n",
    "an error at its import": "1 / 0\n",
    "a missing import": "import nothing_of_that_name\n",
    "an exit at its import": "import sys\nsys.exit(0)\n",
    "no function": "f = 3\n",
    "no argument": "def f():\n    return [0.0]\n",
    "an error": "def f(prompts, completions, **columns):\n    raise KeyError('x')\n",
    "an exit": "import sys\ndef f(prompts, completions, **columns):\n    sys.exit(0)\n",
    "None": "def f(prompts, completions, **columns):\n    return None\n",
    "one number": "def f(prompts, completions, **columns):\n    return 1.0\n",
    "too few": "def f(prompts, completions, **columns):\n    return [1.0]\n",
    "text": "def f(prompts, completions, **columns):\n    return ['good'] * len(prompts)\n",
    "NaN": "def f(prompts, completions, **columns):\n    return [float('nan')] * len(prompts)\n",
    "a dict": "def f(prompts, completions, **columns):\n    return {'a': 1.0}\n",
    "0-d tensor": "import torch\ndef f(prompts, completions, **c):\n    return torch.tensor(1.0)\n",
    "matrix": "import torch\ndef f(prompts, completions, **c):\n    return torch.ones(9, 2)\n",
    "lists": "def f(prompts, completions, **columns):\n    return [[1.0]] * len(prompts)\n",
    "a huge int": "def f(prompts, completions, **columns):\n    return [10**400] * len(prompts)\n",
    "complex": "def f(prompts, completions, **columns):\n    return [1j] * len(prompts)\n",
    "an escape": "def f(prompts, completions, **c):\n    raise ValueError('\\x1b[2J\\n' * 99)\n",
}


def reward_cases(world: Path) -> Iterator[Case]:
    """Reward functions that are broken."""
    for what, code in REWARDS.items():

        def make(folder: Path, text: str = code) -> list[Any]:
            (folder / "mine.py").write_text(text, encoding="utf-8")
            return arguments(world, folder, "ppo", reward_model_path=["mine.py:f"])

        yield Case("reward", what, make, (("mine", "reward", "Reward"),))


# ---- folders for report --------------------------------------------------------------------------


def report_cases(world: Path, finished: Path) -> Iterator[Case]:
    """`report` on folders that are cut, of others, or linked in a circle."""

    def edit(change: Callable[[Path], Any]) -> Callable[[Path], list[Any]]:
        def make(folder: Path) -> list[Any]:
            shutil.copytree(finished, folder / "run")
            change(folder / "run")
            return ["report", "run"]

        return make

    def put(name: str, raw: bytes) -> Callable[[Path], Any]:
        return lambda run: (run / name).write_bytes(raw)

    config = yaml.safe_load((finished / "config.yaml").read_text(encoding="utf-8"))
    metrics = json.loads((finished / "metrics.json").read_text(encoding="utf-8"))
    state = json.loads((finished / "trainer_state.json").read_text(encoding="utf-8"))
    changes: dict[str, Callable[[Path], Any]] = {
        "config.yaml missing": lambda run: (run / "config.yaml").unlink(),
        "metrics.json missing": lambda run: (run / "metrics.json").unlink(),
        "trainer_state.json missing": lambda run: (run / "trainer_state.json").unlink(),
        "a chain to a folder that is gone": lambda run: (run / "config.yaml").write_text(
            yaml.safe_dump({**config, "model_name_or_path": "gone/sft"})
        ),
        "a chain to itself": lambda run: (run / "config.yaml").write_text(
            yaml.safe_dump({**config, "model_name_or_path": "run", "dataset_name": "run/x.jsonl"})
        ),
        "a chain to a long name": lambda run: (run / "config.yaml").write_text(
            yaml.safe_dump({**config, "model_name_or_path": "x" * 5000})
        ),
        "a chain to a zero": lambda run: (run / "config.yaml").write_text(
            yaml.safe_dump({**config, "model_name_or_path": "a\x00b"})
        ),
    }
    broken = {
        "empty": b"",
        "cut": b'{"stage": "sft", ',
        "a list": b"[1, 2]",
        "text": b"hello",
        "null": b"null",
        "zeros": bytes(50),
        "not UTF-8": b"\xff\xfe\xfd",
        "foreign": b'{"defaults": ["base"], "trainer": {"gpus": 8}}',
    }
    for name in ("config.yaml", "metrics.json", "trainer_state.json", "train_metrics.json"):
        changes |= {f"{name} {what}": put(name, raw) for what, raw in broken.items()}
    wrong = (None, "text", [1], {"a": 1}, True, -1, 1e308, "\x1b[2J<script>")
    rng = random.Random(0)
    for name in sorted(metrics):
        for value in rng.sample(wrong, 2):
            raw = json.dumps({**metrics, name: value}).encode()
            changes[f"metrics.json: {name} is {value!r}"] = put("metrics.json", raw)
    for name in sorted(config):
        raw = yaml.safe_dump({**config, name: rng.choice(wrong)}).encode()
        changes[f"config.yaml: {name} is of another type"] = put("config.yaml", raw)
    logs = state["log_history"]
    states = {
        "log_history null": {**state, "log_history": None},
        "log_history text": {**state, "log_history": "a"},
        "logs of numbers": {**state, "log_history": [1, 2]},
        "logs without steps": {
            **state,
            "log_history": [{k: v for k, v in log.items() if k != "step"} for log in logs],
        },
        "steps of text": {**state, "log_history": [{**log, "step": "one"} for log in logs]},
        "values of text": {
            **state,
            "log_history": [{k: "a" if "/" in k else v for k, v in log.items()} for log in logs],
        },
        "values of null": {
            **state,
            "log_history": [{k: None if "/" in k else v for k, v in log.items()} for log in logs],
        },
        "no logs": {**state, "log_history": []},
    }
    for what, content in states.items():
        changes[what] = put("trainer_state.json", json.dumps(content).encode())
    for what, change in changes.items():
        yield Case("report", what, edit(change), (("run",),), True)
    places = {
        "missing": lambda folder: "gone",
        "an empty folder": lambda folder: _made(folder / "run").name,
        "a file": lambda folder: _with(folder / "run", b"x").name,
        "a data file": lambda folder: world / "texts.jsonl",
        "a model": lambda folder: world / "policy",
        "a name with an escape": lambda folder: "\x1b[31mred",
        "a name with a zero": lambda folder: "a\x00b",
        "a long name": lambda folder: "x" * 5000,
        "an empty name": lambda folder: "",
    }
    for what, place in places.items():
        yield Case("report", what, lambda folder, p=place: ["report", p(folder)])
    for what, raw in {**broken, "of no models": b'{"models": 3, "judges": 4, "points": 5}'}.items():

        def judged(folder: Path, r: bytes = raw) -> list[Any]:
            shutil.copytree(finished, folder / "run")
            _with(folder / "evaluation.json", r)
            return ["report", "run", "--evaluation", "evaluation.json"]

        yield Case("report", f"an evaluation: {what}", judged, (("evaluation",),))
    output = ["--output_file", "/proc/nothing/report.html"]
    yield Case(
        "report",
        "an output file that cannot be",
        lambda folder: [*edit(lambda run: None)(folder), *output],
        (("/proc/nothing",),),
    )


# ---- running -------------------------------------------------------------------------------------


def judge(case: Case, outcome: Outcome, left: list[str]) -> dict[str, Any]:
    """What a case came to: one clear line, or what it should not be.

    clear: exit code 2, one line that names what was given. accepted: it ran, and may. swallowed: it
    ran, and should not. unclear, traceback, hang; killed: by a signal, not by us.
    """
    lines = [line for line in re.split(r"[\r\n]+", outcome.err) if line.strip()]
    last = lines[-1] if lines else ""
    told = last if outcome.code == 2 else outcome.err[-3000:]
    found = re.fullmatch(r"[a-z-]+: error: (.*)", last)
    if outcome.hung:
        verdict = "hang"
    elif outcome.code is None:
        verdict = "killed"
    elif outcome.code == 0:
        verdict, told = ("accepted" if case.harmless else "swallowed"), outcome.out[-300:]
    elif "Traceback (most recent call last)" in outcome.err or outcome.code != 2:
        verdict = "traceback"
    else:
        printable = not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", last)
        whole = found and found[1].strip() and not found[1].rstrip().endswith(":")
        named = all(any(name in last for name in group) for group in case.names)
        short = len(last) <= LONGEST
        verdict = "clear" if whole and printable and short and named else "unclear"
    left = left if outcome.code != 0 else []
    good = verdict in ("clear", "accepted") and not left
    shown = {"kind": case.kind, "name": case.name, "verdict": verdict, "good": good, "left": left}
    return {**shown, "told": told, "seconds": round(outcome.seconds, 1)}


def snapshot(folder: Path) -> dict[str, int]:
    """The files and folders below a folder, with the times of their last change."""
    return {
        path.relative_to(folder).as_posix(): path.lstat().st_mtime_ns
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """Run a case in a new folder, and remove it."""
    remove(folder)
    folder.mkdir(parents=True)
    given = case.make(folder)
    before = snapshot(folder)
    outcome = fork(command(*given), folder, limit=LIMIT)
    after = snapshot(folder)
    left = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    shutil.rmtree(log_folder(folder), ignore_errors=True)
    remove(folder)
    return judge(case, outcome, left)


def cases(world: Path, finished: Path, seed: int, scale: float) -> list[Case]:
    """All cases of a seed, shuffled."""
    rng = random.Random(seed)
    every = [
        *command_cases(world),
        *place_cases(world),
        *report_cases(world, finished),
        *reward_cases(world),
        *model_cases(world),
        *file_cases(world, rng, max(1, round(12 * scale))),
        *field_cases(world, rng, max(1, round(20 * scale))),
        *option_cases(world, rng, max(1, round(60 * scale))),
    ]
    rng.shuffle(every)  # a run that is cut short has tried some of each kind
    return every
