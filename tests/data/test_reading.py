"""What a user says about files: columns, templates, mixtures, faulty records."""

import json

import pytest
from conftest import byte_tokenizer
from datasets import Dataset, DatasetDict
from trl.scripts.utils import DatasetConfig

from trl_instruct.configs import PPOConfig, SFTConfig
from trl_instruct.data.pairs import load_pairs
from trl_instruct.data.preferences import load_preferences
from trl_instruct.data.rankings import RankingCounts, load_rankings
from trl_instruct.data.reading import Reading
from trl_instruct.data.records import load_demonstrations, load_prompts, load_texts, prompts_of
from trl_instruct.data.sources import load_records
from trl_instruct.errors import InputError

TEMPLATE = "{instruction}\n\n{input}\n\n### Response:\n"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows(*given):
    return Dataset.from_list(list(given))


def test_columns_are_renamed():
    votes = {"question": "2?", "answers": ["4", "5"], "votes": [9.0, 1.0], "who": "ann"}
    names = {"prompt": "question", "responses": "answers", "scores": "votes", "labeler": "who"}
    ranking = load_rankings(rows(votes), reading=Reading(columns=names))[0]
    assert (ranking["prompt"], ranking["labeler"]) == ("2?", "ann")
    assert ranking["ranks"] == [1, 2]
    texts = load_texts(rows({"review": "Fine."}), reading=Reading(columns={"text": "review"}))
    assert texts["text"][:] == ["Fine."]
    pair = {"question": "2?", "good": "4", "bad": "5"}
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert load_pairs(rows(pair), reading=Reading(columns=names))["chosen"][:] == ["4"]


def test_columns_that_are_not_there():
    reading = Reading(columns={"prompt": "question"})
    with pytest.raises(InputError, match="prompt=question, but there is no column 'question'.*: q"):
        load_prompts(rows({"q": "2?"}), reading=reading)
    with pytest.raises(InputError, match="prompt=question, but there is a column 'prompt' too"):
        load_prompts(rows({"question": "2?", "prompt": "3?"}), reading=reading)
    assert load_prompts(rows({"prompt": "3?"}), reading=reading.of_another())["prompt"][:] == ["3?"]


def test_columns_may_change_places():
    reading = Reading(columns={"prompt": "completion", "completion": "prompt"})
    read = load_demonstrations(rows({"prompt": "4", "completion": "2?"}), reading=reading)
    assert read[0] == {"prompt": "2?", "completion": "4"}


def test_a_template_writes_prompts_of_every_shape():
    reading = Reading(prompt_template=TEMPLATE)
    alpaca = [
        {"instruction": "Past tense?", "input": "swim", "output": "swam"},
        {"instruction": "Gem?", "input": "", "output": "Opal."},
        {"instruction": "Ore?", "input": None, "output": "Iron."},
    ]
    expected = ["Past tense?\n\nswim\n\n### Response:\n", "Gem?\n\n### Response:\n"]
    expected += ["Ore?\n\n### Response:\n"]
    assert load_demonstrations(rows(*alpaca), reading=reading)["prompt"][:] == expected
    prompts = load_prompts(rows(*alpaca), reading=reading)
    assert prompts["prompt"][:] == expected
    ours = {"prompt": "x", "completion": "y", "instruction": "Gem?", "input": ""}
    assert load_demonstrations(rows(ours), reading=reading)["prompt"][:] == expected[1:2]


def test_a_prompt_is_written_once():
    """What candidates wrote with the template, or the suffix, is read by rm with the same."""
    written = {"prompt": "Q: Gem?\nA:", "responses": ["a", "b"], "ranks": [1, 2]}
    reading = Reading(prompt_template="Q: {prompt}\nA:")
    for prompt in (written, {**written, "prompt": "Gem?"}):
        assert load_rankings(rows(prompt), reading=reading)["prompt"][:] == ["Q: Gem?\nA:"]
    reading = Reading(prompt_template="Q: {question}\nA:")  # no such column is left
    assert load_rankings(rows(written), reading=reading)["prompt"][:] == ["Q: Gem?\nA:"]
    reading = Reading(prompt_suffix="\nA:")
    for text in ("Q: Gem?", "Q: Gem?\nA:"):
        assert load_prompts(rows({"prompt": text}), reading=reading)["prompt"][:] == ["Q: Gem?\nA:"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{question}", r"has \{question\}, but there is no column 'question'.*prompt, level"),
        ("{prompt", "cannot be read: expected '}'"),
        ("{level}{prompt}", "`level` is int 3; prompt_template takes text"),
        ("{}", r"has \{\}, but there is no column ''"),
    ],
)
def test_templates_that_do_not_fit(template, message):
    with pytest.raises(InputError, match=message):
        load_prompts(
            rows({"prompt": "Gem?", "level": 3}), reading=Reading(prompt_template=template)
        )


def test_a_suffix_is_for_text():
    talk = {"prompt": [{"role": "user", "content": "Gem?"}]}
    with pytest.raises(InputError, match="row 1: `prompt` is list .*; prompt_suffix is for text"):
        load_prompts(rows(talk), reading=Reading(prompt_suffix="\n"))
    whole = {"messages": [*talk["prompt"], {"role": "assistant", "content": "Opal."}]}
    with pytest.raises(InputError, match="row 1: `prompt` is .*; prompt_suffix is for text"):
        load_demonstrations(rows(whole), reading=Reading(prompt_suffix="\n"))


def test_a_column_beside_the_prompt_is_not_lost_in_silence(caplog):
    load_demonstrations(rows({"prompt": "Add.", "input": "2 and 3", "completion": "5"}))
    assert "`input` stands beside `prompt` and is not read" in caplog.text
    caplog.clear()
    load_demonstrations(rows({"prompt": "Add 2 and 3.", "input": "2 and 3", "completion": "5"}))
    assert "beside" not in caplog.text


GOOD = {"prompt": "2?", "completion": "4"}


@pytest.mark.parametrize("streaming", [False, True])
def test_faulty_records_are_left_out_and_counted(tmp_path, caplog, streaming):
    path = write(tmp_path / "d.jsonl", [GOOD, {**GOOD, "completion": ""}, {**GOOD, "prompt": "3?"}])
    with pytest.raises(InputError, match="line 2: `completion` is empty"):
        list(load_demonstrations(path, streaming=streaming))
    reading = Reading(on_bad_record="skip")
    kept = load_demonstrations(path, streaming=streaming, reading=reading)
    assert [row["prompt"] for row in kept] == ["2?", "3?"]
    assert streaming or "faulty records left out: 1" in caplog.text


def test_faulty_rankings_and_pairs_are_left_out():
    reading, counts = Reading(on_bad_record="skip"), RankingCounts()
    good = {"prompt": "2?", "responses": ["4", "5"], "ranks": [1, 2]}
    data = rows({**good, "ranks": [1]}, good, {**good, "responses": ["4", ""]})
    assert load_rankings(data, reading=reading, counts=counts)["responses"][:] == [["4", "5"]]
    assert (counts.records, counts.pairs) == (1, 1)
    pair = {"prompt": "2?", "chosen": "4", "rejected": "5"}
    kept = load_pairs(rows({**pair, "chosen": None}, pair), reading=reading)
    assert kept["chosen"][:] == ["4"]
    with pytest.raises(InputError, match="all 1 records are faulty"):
        load_prompts(rows({"prompt": ""}), reading=reading)


def test_every_fault_is_listed(tmp_path):
    faults = []
    path = write(tmp_path / "d.jsonl", [{**GOOD, "prompt": ""}, GOOD, {**GOOD, "completion": None}])
    load_demonstrations(path, reading=Reading(faults=faults))
    assert [fault.split("`")[0] for fault in faults] == [f"{path}, line 1: ", f"{path}, line 3: "]


def test_where_records_lie_after_some_are_left_out(tmp_path):
    bad = {"instruction": "Sum?", "output": ""}
    good = {"instruction": "Gem?", "output": "Opal."}
    path = write(tmp_path / "d.jsonl", [bad, good, bad, good])
    reading = Reading(found=[])
    assert len(load_demonstrations(path, reading=reading)) == 2
    assert reading.source.where(1) == f"{path}, line 4"
    path = write(tmp_path / "e.jsonl", [{**GOOD, "prompt": ""}, GOOD, {**GOOD, "prompt": ""}, GOOD])
    reading = Reading(on_bad_record="skip", found=[])
    load_demonstrations(path, reading=reading)
    assert reading.source.where(1) == f"{path}, line 4"


@pytest.fixture
def files(tmp_path):
    talks = [{"instruction": f"Q{i}?", "output": f"{i}."} for i in range(6)]
    ours = [{"prompt": f"P{i}?", "completion": f"{i}!", "level": i} for i in range(4)]
    return write(tmp_path / "alpaca.jsonl", talks), write(tmp_path / "ours.jsonl", ours)


def test_mixtures_of_shapes(files):
    alpaca, ours = files
    mixture = [
        {"path": alpaca, "split": "train[:2]"},
        {"path": ours, "columns": ["prompt", "completion"]},
    ]
    read = load_demonstrations(mixture)
    assert read["prompt"][:] == ["Q0?", "Q1?", "P0?", "P1?", "P2?", "P3?"]
    assert set(read.column_names) == {"prompt", "completion"}


def test_fractions_are_shares_of_the_mixture(files):
    """As in TRL: 3 of 4 parts from 6 rows, 1 of 4 from 4 rows; no row twice, so 8 in all."""
    alpaca, ours = files
    mixture = [{"path": alpaca, "fraction": 0.75}, {"path": ours, "fraction": 0.25}]
    read = load_demonstrations(mixture)
    assert read["prompt"][:] == [*(f"Q{i}?" for i in range(6)), "P0?", "P1?"]
    assert read["level"][:] == [None] * 6 + [0, 1]


def test_faulty_mixtures(files):
    alpaca, ours = files
    for mixture, message in (
        ([], "datasets is an empty list"),
        ([{"file": alpaca}], "entry dict {'file': .*unexpected keyword"),
        (["text"], "entry str 'text'; a path and options are needed"),
        ([3], "entry int 3; a path"),
        ([{"path": 3}], "path and split are text"),
        ([{"path": alpaca, "fraction": 0.5}, {"path": ours}], "fraction: give it for each"),
        ([{"path": ours, "columns": ["prompt", "reply"]}], "no column 'reply'; there are prompt"),
    ):
        with pytest.raises(InputError, match=message):
            load_demonstrations(mixture)
    with pytest.raises(InputError, match="datasets and dataset_name were both given"):
        SFTConfig(use_cpu=True, datasets=[{"path": ours}], dataset_name=ours)
    with pytest.raises(InputError, match="dataset_train_split is not read beside datasets"):
        SFTConfig(use_cpu=True, datasets=[{"path": ours}], dataset_train_split="test")


def test_preferences_from_a_mixture(tmp_path):
    from trl_instruct.configs import RewardConfig

    shp = {"history": "Dough?", "human_ref_A": "Rest.", "human_ref_B": "Luck.", "labels": 1}
    ours = {"prompt": "2?", "responses": ["4", "5"], "ranks": [2, 1]}
    paths = [write(tmp_path / "shp.jsonl", [shp]), write(tmp_path / "ours.jsonl", [ours])]
    config = RewardConfig(use_cpu=True, eval_size=0)
    data = load_preferences([{"path": path} for path in paths], None, None, config)
    assert data.train["ranks"][:] == [[1, 2], [2, 1]]
    assert data.counts.records == 2


def test_a_subset_and_data_files_by_name(tmp_path, files):
    config = DatasetConfig("json", data_files=files[1], split="train[:1]")
    assert load_records(config, config.split)["prompt"][:] == ["P0?"]
    folder = tmp_path / "hub"
    (folder / "en").mkdir(parents=True)
    write(folder / "en" / "train.jsonl", [GOOD])
    card = "configs:\n- config_name: en\n  data_files: en/train.jsonl\n"
    card += "- config_name: none\n  data_files: en/train.jsonl\n"
    (folder / "README.md").write_text(f"---\n{card}---\n")
    assert len(load_records(DatasetConfig(str(folder), name="en"))) == 1


def test_prompts_in_every_form():
    reading = Reading(columns={"text": "review"})
    given = rows({"review": "naive film", "level": 1})
    prompts = prompts_of(given, "train", byte_tokenizer(), 3, reading)
    assert prompts[0] == {"text": "naive film", "level": 1, "prompt": "nai"}
    splits = DatasetDict({"test": rows({"prompt": "2?"})})
    assert prompts_of(splits, "test", byte_tokenizer(), None, Reading())["prompt"][:] == ["2?"]


def test_options_of_a_config():
    config = PPOConfig(
        use_cpu=True, columns=["prompt=question"], prompt_suffix="\\nA:", on_bad_record="skip"
    )
    reading = Reading.of(config)
    assert reading.columns == {"prompt": "question"}
    assert (reading.prompt_suffix, reading.skips, reading.strict) == ("\nA:", True, True)
    with pytest.raises(InputError, match="columns has 'question'; field=column is needed"):
        PPOConfig(use_cpu=True, columns=["question"])
