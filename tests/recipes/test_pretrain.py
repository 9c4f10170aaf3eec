import json

import pytest
from datasets import Dataset
from test_recipes import QUICK
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_instruct.configs import PretrainConfig
from trl_instruct.data.sources import name_of
from trl_instruct.errors import InputError
from trl_instruct.recipes import pretrain as recipe
from trl_instruct.recipes.pretrain import (
    EOS,
    pretrain,
    tiny_base,
    tokenize_texts,
    train_tokenizer,
)
from trl_instruct.tiny.splits import END_OF_TEXT

TEXTS = [f"The {noun} is here, 猫 {n}." for n in range(4) for noun in ("cat", "dog", "rose")]
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SMALL = {**QUICK, "vocab_size": 280, "max_length": 64, "architecture_kwargs": LLAMA}


def texts(rows=TEXTS):
    return Dataset.from_dict({"text": rows})


@pytest.mark.slow
def test_a_base_model_from_text(tmp_path):
    result = pretrain(texts(), tmp_path / "base", **{**SMALL, "max_steps": 20})
    assert result.metrics["train_loss"] < 5.5
    model = AutoModelForCausalLM.from_pretrained(result)
    tokenizer = AutoTokenizer.from_pretrained(result)
    assert result.metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.decode(tokenizer("The 猫 \n\t~")["input_ids"]) == "The 猫 \n\t~"
    assert json.loads((result.path / "metrics.json").read_text()) == result.metrics


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox"])
def test_other_architectures(tmp_path, architecture):
    options = {**SMALL, "architecture": architecture, "max_steps": 1}
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    options["architecture_kwargs"] = json.dumps(small)  # as a flag gives it
    result = pretrain(texts(), tmp_path / "base", **options)
    assert AutoModelForCausalLM.from_pretrained(result).config.model_type == architecture


def rows_of(rows, **options):
    config = PretrainConfig(output_dir="x", **{**SMALL, **options})
    tokenizer = train_tokenizer(TEXTS, config.vocab_size, config.max_length)
    return tokenize_texts(texts(rows), tokenizer, config)["input_ids"], tokenizer, config


def test_eos_between_two_documents_of_a_text_is_one_token():
    tokenizer = train_tokenizer(["a rose" + EOS + "Good."] * 10, 300, 64)
    assert "endoftext" not in "".join(set(tokenizer.get_vocab()) - {EOS})
    ids = tokenizer("a rose" + EOS + "Good.")["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert END_OF_TEXT == EOS


def test_one_text_a_row_ends_with_eos():
    rows, tokenizer, config = rows_of(TEXTS, packing=False)
    assert sorted(tokenizer.batch_decode(list(rows))) == sorted(text + EOS for text in TEXTS)
    assert config.train_sampling_strategy == "sequential"


def test_packing_loses_nothing():
    rows, tokenizer, _ = rows_of(TEXTS, packing=True, max_length=16)
    assert {len(row) for row in rows[:-1]} == {16}
    stream = [token for row in rows for token in row]
    assert tokenizer.decode(stream) == "".join(text + EOS for text in TEXTS)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([" ", ""], {}, "all 2 rows have an empty `text`"),
        (TEXTS, {"architecture": "llamma"}, "'llamma' is not a model type of transformers"),
        (
            TEXTS,
            {"architecture": "llamma", "architecture_kwargs": None},
            "'llamma' is not a model type of transformers",
        ),
        (TEXTS, {"architecture_kwargs": '{"hidden_size": '}, "is not a JSON object"),
        (TEXTS, {"architecture_kwargs": "[1]"}, r"is list \[1\]; {field: value} is needed"),
        (TEXTS, {"architecture_kwargs": {"hiden_size": 8}}, "llama has no field 'hiden_size'"),
        (TEXTS, {"architecture_kwargs": {"num_attention_heads": 3}}, "kwargs: .*heads"),
        (TEXTS, {"max_length": 256}, "max_length is 256, but the architecture's context is 64"),
        (TEXTS, {"num_train_epochs": 0, "max_steps": -1}, "num_train_epochs is 0; make it above"),
        (TEXTS, {"packing": False, "max_length": 4}, "Raise max_length, or set packing"),
        (TEXTS, {"vocab": 300}, "Unknown option 'vocab' for PretrainConfig"),
        (TEXTS, {"architecture_kwargs": "nonsense"}, "'nonsense' is not a JSON object"),
    ],
)
def test_bad_input(tmp_path, rows, options, message):
    with pytest.raises(InputError, match=message):
        pretrain(texts(rows), tmp_path / "base", **{**SMALL, **options})
    assert not (tmp_path / "base").exists()


def test_missing_columns_and_data(tmp_path):
    with pytest.raises(InputError, match="`text` missing. Columns found: content"):
        pretrain(Dataset.from_dict({"content": TEXTS}), tmp_path / "base", **SMALL)
    with pytest.raises(InputError, match="No dataset was given"):
        pretrain(None, tmp_path / "base", **SMALL)


@pytest.mark.slow
def test_a_ready_config_takes_an_output_dir_beside_it(tmp_path):
    config = PretrainConfig(output_dir="elsewhere", **{**SMALL, "max_steps": 1})
    assert pretrain(texts(), tmp_path / "base", config=config).path == tmp_path / "base"
    assert config.output_dir == "elsewhere"


def test_the_tiny_base_is_made_once(tmp_path, monkeypatch):
    made = []

    def fake(dataset, **options):
        made.append(options)
        folder = tmp_path / "base"
        folder.mkdir()
        (folder / "metrics.json").write_text("{}")

    monkeypatch.setattr(recipe, "pretrain", fake)
    tiny_base(tmp_path / "base", seed=3)
    assert tiny_base(tmp_path / "base", seed=3).path == tmp_path / "base"
    assert len(made) == 1
    assert made[0]["seed"] == 3
    assert made[0]["overwrite_output_dir"]  # what was cut short is made afresh


def test_names_of_datasets(tmp_path):
    assert name_of("tiny:prompts") == "tiny:prompts"
    assert name_of(tmp_path) == str(tmp_path)
    assert name_of(texts()) is None
