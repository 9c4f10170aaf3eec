import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from trl_instruct.errors import InputError
from trl_instruct.rewards.classifier import ClassifierReward
from trl_instruct.rewards.load import load_reward

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "good", "bad", "film", "the", "was"]
LABELS = {0: "NEGATIVE", 1: "NEUTRAL", 2: "POSITIVE"}
PROMPTS = ["the film ", "the ", "the film was bad bad "]
COMPLETIONS = ["was good", "film was bad", "good"]


@pytest.fixture(scope="module")
def words():
    """An encoder's tokenizer: [CLS] ... [SEP], no EOS, 12 tokens at most."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=12,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, words):
    """A tiny BERT with three labels."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert",
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.5,
        id2label=LABELS,
    )
    path = tmp_path_factory.mktemp("classifier")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    words.save_pretrained(path)
    return path


def plain(folder, words, texts):
    """Logits of plain transformers, a text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return torch.cat([model(**words(text, return_tensors="pt")).logits for text in texts])


def test_the_measures_of_a_label(folder, words):
    texts = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    logits = plain(folder, words, texts)
    p = logits.softmax(-1)[:, 2]
    assert p.std() > 0.01
    expected = {"logit": logits[:, 2], "probability": p, "log_odds": (p / (1 - p)).log()}
    for measure, values in expected.items():
        reward = ClassifierReward(str(folder), "POSITIVE", measure=measure, batch_size=2)
        assert reward(PROMPTS, COMPLETIONS) == pytest.approx(values.tolist(), rel=1e-4)
    assert reward.__name__ == f"{folder} POSITIVE"


def test_the_measures_of_the_only_label(folder, words):
    config = AutoConfig.from_pretrained(folder, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config)
    given = {"model": model, "labels": "LABEL_0", "tokenizer": words}
    logits = torch.tensor(ClassifierReward(**given)(PROMPTS, COMPLETIONS), dtype=torch.float64)
    assert logits.std() > 0.01
    odds = ClassifierReward(**given, measure="log_odds")(PROMPTS, COMPLETIONS)
    assert odds == pytest.approx(logits.tolist())
    chance = ClassifierReward(**given, measure="probability")(PROMPTS, COMPLETIONS)
    assert chance == pytest.approx(logits.sigmoid().tolist())


def test_several_labels_weighted_and_the_completion_alone(folder, words):
    weights = {"POSITIVE": 1.0, "NEGATIVE": -0.5}
    reward = ClassifierReward(str(folder), weights, with_prompt=False)
    logits = plain(folder, words, COMPLETIONS)
    expected = (logits[:, 2] - 0.5 * logits[:, 0]).tolist()
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, rel=1e-4)


def test_labels_that_do_not_exclude_each_other(folder, words):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.problem_type = "multi_label_classification"
    given = {"tokenizer": words, "with_prompt": False}
    (logit,) = plain(folder, words, ["good"])[:, 2].tolist()
    expected = {"logit": logit, "log_odds": logit, "probability": 1 / (1 + math.exp(-logit))}
    for measure, value in expected.items():
        reward = ClassifierReward(model, "POSITIVE", measure=measure, **given)
        assert reward([""], ["good"]) == pytest.approx([value], rel=1e-4)


def test_a_sure_classifier_has_finite_log_odds(folder, words):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([-200.0, -300.0, 200.0])
    reward = ClassifierReward(model, "POSITIVE", measure="log_odds", tokenizer=words)
    assert reward([""], ["good"]) == pytest.approx([400.0])


def test_long_texts_lose_their_beginning_and_are_counted(folder, words):
    reward = ClassifierReward(str(folder), "POSITIVE")
    scores = reward(["bad " * 20, "the "], ["good", "film"])
    assert reward.truncated == 1
    kept = plain(folder, words, ["bad " * 9 + "good", "the film"])[:, 2]
    assert scores == pytest.approx(kept.tolist(), rel=1e-4)
    assert words.truncation_side == "right"


def test_messages_are_read_one_under_the_other(folder):
    reward = ClassifierReward(str(folder), "POSITIVE")
    prompt, reply = [{"role": "user", "content": "the"}], [{"role": "assistant", "content": "film"}]
    assert reward([prompt], [reply]) == pytest.approx(reward(["the\n"], ["film"]))


def test_a_decoder_without_a_pad_token(make_reward_model, eos_padded_tokenizer):
    model = make_reward_model("gpt2", id2label=LABELS, pad_token_id=None)
    reward = ClassifierReward(model, {"POSITIVE": 1, "NEUTRAL": 2}, tokenizer=eos_padded_tokenizer)
    alone = [reward([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(alone, rel=1e-4)
    ids = eos_padded_tokenizer(PROMPTS[0] + COMPLETIONS[0], return_tensors="pt")
    with torch.no_grad():
        logits = model(**ids).logits[0]
    assert alone[0] == pytest.approx(float(logits[2] + 2 * logits[1]), rel=1e-4)


def test_a_label_or_measure_that_is_not_there(folder):
    with pytest.raises(InputError, match="labels NEGATIVE, NEUTRAL, POSITIVE; given: 'positive"):
        ClassifierReward(str(folder), "positive")
    with pytest.raises(InputError, match="given: none"):
        ClassifierReward(str(folder), {})
    with pytest.raises(InputError, match="measure is 'odds'; one of probability, logit, log_odds"):
        ClassifierReward(str(folder), "POSITIVE", measure="odds")


def test_a_scalar_encoder_is_a_reward_model(folder, words, tmp_path):
    config = AutoConfig.from_pretrained(folder, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    texts = [prompt + completion for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    expected = plain(tmp_path, words, texts).flatten().tolist()
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for reward in (load_reward(tmp_path), load_reward(loaded), load_reward(model, words)):
        assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected)
