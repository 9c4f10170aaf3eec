import copy
import json
import math
import shutil
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import normalizers
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig
from trl import ModelConfig

from trl_instruct.data.rendering import render
from trl_instruct.errors import InputError
from trl_instruct.ppo_trainer.roles import load_roles
from trl_instruct.rewards.function import as_completions, call_reward, reward_name
from trl_instruct.rewards.http import HTTPReward
from trl_instruct.rewards.load import load_reward
from trl_instruct.rewards.reward_model import RewardModel
from trl_instruct.rewards.tokens import cut_prompt

PROMPTS = ["one ", "a longer prompt ", "two "]
COMPLETIONS = ["yes", "no, and never again", ""]


def assert_same(scores, expected):
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(expected))


def length(prompts, completions):
    return [float(len(text)) for text in completions]


class Judge:
    def __call__(self, prompts, completions, answer, **columns):
        self.seen = (answer, columns)
        return [1] * len(completions)


def test_a_function_gets_the_columns_that_it_has_parameters_for():
    seen = {}

    def judge(completions, prompts, answer):
        seen.update(prompts=prompts, completions=completions, answer=answer)
        return torch.tensor([1.0, 2.0, 3.0])

    columns = {"answer": [1, 2, 3], "source": ["x", "y", "z"]}
    assert call_reward(judge, PROMPTS, COMPLETIONS, columns) == [1.0, 2.0, 3.0]
    assert seen == {"prompts": PROMPTS, "completions": COMPLETIONS, "answer": [1, 2, 3]}
    taker = Judge()
    call_reward(taker, PROMPTS, COMPLETIONS, columns)
    assert taker.seen == ([1, 2, 3], {"source": ["x", "y", "z"]})


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0], "returned 2 scores for 3 completions"),
        (None, "returned NoneType for 3 completions"),
        (1.0, "returned float for 3 completions"),
        ([1.0, None, 2.0], "gave the score None.*completion 2"),
        ([1.0, 2.0, math.nan], "gave the score nan.*completion 3"),
        ([math.inf, 1.0, 2.0], "gave the score inf.*completion 1"),
        ([1.0, "good", 2.0], "gave the score 'good'.*completion 2"),
        (torch.zeros(3, 2), r"returned Tensor of shape \(3, 2\) for 3 completions"),
    ],
)
def test_a_bad_score_names_the_reward_and_the_completion(result, message):
    def politeness(prompts, completions):
        return result

    with pytest.raises(InputError, match=f"Reward 'politeness' {message}"):
        call_reward(politeness, PROMPTS, COMPLETIONS, {})


def test_parameters_of_other_names_are_refused_before_the_call():
    def length(texts):
        raise AssertionError("called")

    with pytest.raises(InputError, match=r"'length' takes \(texts\); .*\(prompts, completions\)"):
        call_reward(length, ["a"], ["b"], {})


def test_rewards_have_names():
    assert reward_name(length) == "length"
    assert reward_name(Judge()) == "Judge"
    assert reward_name(partial(length)) == "partial"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_scores_are_those_of_the_plain_classifier_one_text_at_a_time(
    make_reward_model, tokenizer, tmp_path, kind
):
    make_reward_model(kind).save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    expected = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        with torch.no_grad():
            expected.append(plain(**tokenizer(prompt + completion + "<eos>", return_tensors="pt")))
    reward = RewardModel(make_reward_model(kind), tokenizer, batch_size=2)
    assert_same(reward(PROMPTS, COMPLETIONS), [output.logits.item() for output in expected])


def test_neither_order_nor_company_nor_a_written_eos_changes_a_score(reward_model, tokenizer):
    reward = RewardModel(reward_model, tokenizer)
    scores = reward(PROMPTS, COMPLETIONS)
    assert len({round(score, 3) for score in scores}) == 3
    assert_same(reward(PROMPTS[::-1], COMPLETIONS[::-1]), scores[::-1])
    assert_same(reward(PROMPTS[:1], COMPLETIONS[:1]), scores[:1])
    assert_same(reward(PROMPTS, [text + "<eos>" for text in COMPLETIONS]), scores)


def test_a_tokenizer_without_a_pad_token_pads_with_eos(make_reward_model, tokenizer):
    """The score stands at the EOS, in every batch alike; the model's config is left as it is."""
    expected = RewardModel(make_reward_model("gpt2"), tokenizer)(PROMPTS, COMPLETIONS)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None
    for pad_token_id in (257, None):
        reward = RewardModel(make_reward_model("gpt2", pad_token_id=pad_token_id), tokenizer)
        assert tokenizer.pad_token == "<eos>"
        assert_same(reward(PROMPTS, COMPLETIONS), expected)
        assert reward.model.config.pad_token_id == pad_token_id


def test_a_model_that_calls_eos_padding_is_read_where_it_was_trained(
    make_reward_model, eos_padded_tokenizer
):
    """As TRL and plain transformers read it: at the token before the EOS."""
    model = make_reward_model("gpt2")
    scores = RewardModel(model, eos_padded_tokenizer)(PROMPTS, COMPLETIONS)
    assert_same(RewardModel(model, eos_padded_tokenizer)(PROMPTS[:1], COMPLETIONS[:1]), scores[:1])
    model.config.pad_token_id = 256
    texts = [p + c + "<eos>" for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    batch = eos_padded_tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        plain = model(**batch).logits.squeeze(-1).tolist()
    early = RewardModel(model, eos_padded_tokenizer)(PROMPTS, COMPLETIONS)
    assert_same(early, plain)
    assert max(abs(a - b) for a, b in zip(early, scores, strict=True)) > 0.1


def test_long_texts_lose_their_beginning_and_are_counted(reward_model, tokenizer):
    reward = RewardModel(reward_model, tokenizer)
    long = reward(["x" * 500, "short "], ["yes", "no"])
    assert reward.truncated == 1
    assert_same(long[:1], reward(["x" * 124], ["yes"]))  # 124 + 3 + EOS = 128


def test_messages_are_scored_through_the_chat_template(reward_model, chat_tokenizer):
    reward = RewardModel(reward_model, chat_tokenizer)
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    scores = reward(prompts, as_completions(prompts, COMPLETIONS))
    for prompt, completion, score in zip(PROMPTS, COMPLETIONS, scores, strict=True):
        text = f"u:{prompt}\na:{completion}<eos>\n"
        with torch.no_grad():
            expected = reward_model(**chat_tokenizer(text, return_tensors="pt")).logits.item()
        assert_same(score, expected)


def test_completions_take_the_form_of_their_prompts():
    assert as_completions(["a"], ["b"]) == ["b"]
    chat = [[{"role": "user", "content": "a"}]]
    assert as_completions(chat, ["b"]) == [[{"role": "assistant", "content": "b"}]]


@pytest.mark.parametrize(
    ("max_length", "lengths"),
    [
        (14, [10, 12, 14]),  # all fit
        (12, [8, 10, 12]),  # all lose 2 bytes of "question: ", though two would fit
        (5, [1, 3, 5]),  # one byte of the prompt stays
        (4, [2, 4, 6]),  # the longest response cannot fit; the others lose 8 bytes, as they need
    ],
)
def test_a_cut_prompt_is_the_same_for_all_responses(tokenizer, max_length, lengths):
    prompt, responses = "question: ", ["", "ab", "abcd"]
    rows = [tokenizer(prompt + response)["input_ids"] for response in responses]
    cut = cut_prompt(rows, tokenizer(prompt)["input_ids"], max_length=max_length)
    assert [len(row) for row in cut] == lengths
    for row, response in zip(cut, responses, strict=True):
        assert (prompt + response).endswith(tokenizer.decode(row))
        assert tokenizer.decode(row).endswith(response)


def test_a_cut_prompt_of_messages(chat_tokenizer):
    prompt, reply = [{"role": "user", "content": "hello"}], [{"role": "assistant", "content": "hi"}]
    rendered = render(prompt, reply, chat_tokenizer)
    (cut,) = cut_prompt([rendered.ids], rendered.prompt, max_length=10)
    assert chat_tokenizer.decode(cut) == "llo\na:hi<eos>\n"


def test_a_reward_model_is_frozen_and_in_eval_mode(reward_model, tokenizer):
    RewardModel(reward_model.train(), tokenizer)
    assert not reward_model.training
    assert not any(parameter.requires_grad for parameter in reward_model.parameters())


# ---- what is taken for a reward ------------------------------------------------------------------


def test_a_list_is_a_weighted_sum(saved_reward_model):
    model = load_reward(saved_reward_model)(PROMPTS, COMPLETIONS)
    both = load_reward([saved_reward_model, length], weights=[0.5, 2])(PROMPTS, COMPLETIONS)
    assert_same(both, [0.5 * m + 2 * len(c) for m, c in zip(model, COMPLETIONS, strict=True)])
    with pytest.raises(InputError, match="2 reward weights were given for 1 rewards"):
        load_reward([length], weights=[1.0, 2.0])
    with pytest.raises(InputError, match="is for a list"):
        load_reward(length, weights=[1.0])
    assert load_reward([length]) is length


def test_a_name_in_a_python_file(tmp_path):
    file = tmp_path / "rules.py"
    file.write_text("def short(prompts, completions):\n    return [-len(c) for c in completions]\n")
    assert load_reward(f"{file}:short")(PROMPTS, COMPLETIONS) == [-3, -19, 0]
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\n"
        "class Constant:\n    value: float\n    def __call__(self, prompts, completions):\n"
        "        return [self.value for _ in prompts]\nalways_two = Constant(2.0)\n"
    )
    assert load_reward(f"{file}:always_two")(PROMPTS, COMPLETIONS) == [2.0, 2.0, 2.0]
    with pytest.raises(InputError, match="defines no function or reward 'long'"):
        load_reward(f"{file}:long")
    with pytest.raises(InputError, match=r"rules.py' is a file; name what is in it: .*py:FUNC"):
        load_reward(str(file))
    with pytest.raises(InputError, match=r"there is no file missing\.py \(looked in"):
        load_reward("missing.py:short")


def test_an_address_is_a_server():
    reward = load_reward("http://127.0.0.1:1/score")
    assert isinstance(reward, HTTPReward)
    assert reward_name(reward) == "http://127.0.0.1:1/score"


def test_a_classifier_needs_to_be_told_which_label(make_reward_model, tokenizer, tmp_path):
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    model = make_reward_model(id2label=labels)
    tokenizer.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    for source in (model, tmp_path, str(tmp_path)):
        with pytest.raises(InputError, match="labels NEGATIVE, POSITIVE .* ClassifierReward"):
            load_reward(source, tokenizer)


def test_a_classifier_on_the_hub_needs_to_be_told_too(
    make_reward_model, tokenizer, tmp_path, monkeypatch
):
    """By the config that the cache holds of it, as after a download."""
    cached = tmp_path / "models--org--classifier"
    folder = cached / "snapshots" / "0"
    tokenizer.save_pretrained(folder)
    make_reward_model(id2label={0: "NEGATIVE", 1: "POSITIVE"}).save_pretrained(folder)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.HF_HUB_CACHE", str(tmp_path), raising=False)
    with pytest.raises(InputError, match="labels NEGATIVE, POSITIVE .* ClassifierReward"):
        load_reward("org/classifier")


OWN_CODE = """from transformers import AutoModel, LlamaConfig, LlamaModel
from transformers import LlamaForSequenceClassification


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddModel(LlamaModel):
    config_class = OddConfig


class OddForSequenceClassification(LlamaForSequenceClassification):
    config_class = OddConfig


AutoModel.register(OddConfig, OddModel)
"""


@pytest.mark.slow
def test_code_of_a_models_own_runs_where_it_is_trusted(
    saved_reward_model, saved_policy, tokenizer, tmp_path, monkeypatch, ppo_config
):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    folder = shutil.copytree(saved_reward_model, tmp_path / "odd")
    (folder / "odd.py").write_text(OWN_CODE)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "OddConfig"}
    names["AutoModelForSequenceClassification"] = "OddForSequenceClassification"
    config |= {"model_type": "odd", "auto_map": {k: f"odd.{v}" for k, v in names.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="trust_remote_code"):
        load_reward(folder)
    expected = load_reward(saved_reward_model)(PROMPTS, COMPLETIONS)
    assert_same(load_reward(folder, trust_remote_code=True)(PROMPTS, COMPLETIONS), expected)
    given = (saved_policy, [folder], None, tokenizer, ppo_config(trust_remote_code=True))
    roles = load_roles(*given, ModelConfig())
    assert type(roles.value).__name__ == "OddForSequenceClassification"
    assert_same(roles.reward(PROMPTS, COMPLETIONS), expected)


def test_a_lora_folder_is_read_with_its_own_tokenizer(saved_reward_model, tokenizer, tmp_path):
    """Not with the policy's: its own one knows no capitals."""
    torch.manual_seed(3)
    config = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False)
    lora = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(saved_reward_model), config
    )
    lora.save_pretrained(tmp_path)
    own = copy.deepcopy(tokenizer)
    own.backend_tokenizer.normalizer = normalizers.Lowercase()
    own.save_pretrained(tmp_path)
    reward = load_reward(tmp_path, tokenizer)
    scores = reward(PROMPTS, [text.upper() for text in COMPLETIONS])
    assert_same(scores, RewardModel(lora, tokenizer)(PROMPTS, COMPLETIONS))
    assert reward_name(reward) == str(tmp_path)  # not its base's


@pytest.mark.slow
def test_lora_and_quantised_reward_models(reward_model, saved_reward_model, tokenizer, tmp_path):
    torch.manual_seed(3)
    config = LoraConfig(
        task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False, r=4
    )
    lora = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(saved_reward_model), config
    )
    lora.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    plain = RewardModel(lora, tokenizer)(PROMPTS, COMPLETIONS)
    for source in (lora, tmp_path):
        assert_same(load_reward(source, tokenizer)(PROMPTS, COMPLETIONS), plain)
    quantised = AutoModelForSequenceClassification.from_pretrained(
        saved_reward_model, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    rough = load_reward(quantised, tokenizer)(PROMPTS, COMPLETIONS)
    exact = RewardModel(reward_model, tokenizer)(PROMPTS, COMPLETIONS)
    assert rough != exact
    assert rough == pytest.approx(exact, abs=0.1)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def short(:\n    pass\n", r"SyntaxError: invalid syntax .*line 1\)"),
        ("a = 1\nimport sys\nsys.exit(0)\n", "line 3, SystemExit: 0"),
        ("\n{}['x']\n", "line 2, KeyError: 'x'"),
        ("raise ValueError('\\x1b[2J' * 2)", r"line 1, ValueError: \\x1b\[2J"),
        ("\x00", "SyntaxError|ValueError"),
    ],
)
def test_a_file_of_rewards_that_cannot_be_run(tmp_path, code, message):
    file = tmp_path / "rules.py"
    file.write_text(code)
    with pytest.raises(InputError, match=f"rules.py cannot be run: .*(?:{message})") as told:
        load_reward(f"{file}:short")
    assert str(told.value).isprintable()
