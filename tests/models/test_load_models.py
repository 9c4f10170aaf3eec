import json
import math
import shutil
from functools import partial

import pytest
import torch
from conftest import byte_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import ModelConfig

from trl_instruct.errors import InputError
from trl_instruct.models.adapters import is_adapter, peft_config_of
from trl_instruct.models.load import load_policy, load_reward_model, needs_base, reference_of
from trl_instruct.models.properties import accepted, context_length, disable_dropout, model_name
from trl_instruct.models.tokenizers import check_tokenizer, install_chat_template, load_tokenizer
from trl_instruct.ppo_trainer.rollouts import ValueModel
from trl_instruct.scalar_head import score_head

PLAIN = ModelConfig()
LORA = ModelConfig(use_peft=True, lora_r=4)
ARCHITECTURES = ["llama", "qwen3", "gpt_neox", "gpt2", "opt"]


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapter(model, folder, task_type="CAUSAL_LM", **options):
    """A LoRA adapter with weights that do something."""
    config = LoraConfig(task_type=task_type, target_modules="all-linear", r=4, **options)
    adapted = get_peft_model(model, config)
    torch.manual_seed(5)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapted.save_pretrained(folder)
    return adapted.eval()


def logits(model, ids=(72, 105, 33, 256)):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits


# ---- tokenizer -----------------------------------------------------------------------------------


def test_a_tokenizer_without_pad_gets_eos(tmp_path):
    save_to = byte_tokenizer(pad_token=None)
    assert save_to.pad_token is None
    save_to.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<eos>", "left")


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"'{tmp_path}' has no EOS token.*Set one"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="'mine' has no EOS token"):
        check_tokenizer(tokenizer, "mine")


def test_special_tokens_that_are_named_replace_the_tokenizers_own(tmp_path):
    tokenizer = byte_tokenizer(pad_token=None)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path, special_tokens={"eos_token": "a"})
    assert (loaded.eos_token, loaded.pad_token) == ("a", "a")
    loaded = load_tokenizer(tmp_path, special_tokens={"eos_token": "a", "pad_token": "b"})
    assert (loaded.eos_token_id, loaded.pad_token) == (loaded.encode("a")[0], "b")
    with pytest.raises(InputError, match="pad_token is '<gone>', but the tokenizer of 'mine' has"):
        check_tokenizer(byte_tokenizer(), "mine", {"pad_token": "<gone>"})


def test_no_tokenizer_there(tmp_path):
    with pytest.raises(InputError, match=f"No tokenizer could be loaded from '{tmp_path}'") as told:
        load_tokenizer(tmp_path)
    assert "no such folder" not in str(told.value)
    absent = r"'runs/nowhere': there is no such folder \(looked in .*\), and as a Hub id: .*Give a"
    with pytest.raises(InputError, match=absent):
        load_tokenizer("runs/nowhere")


def test_a_tokenizer_that_needs_a_library(tmp_path, monkeypatch):
    def lacks_a_package(*args, **kwargs):
        raise ImportError("\n requires the protobuf library.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lacks_a_package)
    with pytest.raises(InputError, match="No tokenizer could be loaded.*requires the protobuf"):
        load_tokenizer(tmp_path)


def test_chat_templates(tmp_path, tokenizer):
    tokenizer = byte_tokenizer()
    (tmp_path / "x.jinja").write_text("{{ messages }}")
    install_chat_template(tokenizer, str(tmp_path / "x.jinja"))
    assert tokenizer.chat_template == "{{ messages }}"
    install_chat_template(tokenizer, "org/model")  # the trainer's to take over
    with pytest.raises(InputError, match="there is no such file"):
        install_chat_template(tokenizer, str(tmp_path / "y.jinja"))


# ---- loading -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_reward_model_from_a_language_model(kind, make_policy, tokenizer, tmp_path):
    policy = make_policy(kind)
    folder = save(policy, tokenizer, tmp_path)
    torch.manual_seed(0)
    for source in (folder, policy):
        model = load_reward_model(source, PLAIN, fresh_head=True)
        assert score_head(model).out_features == 1
        state = policy.base_model.state_dict()
        torch.testing.assert_close(dict(model.base_model.state_dict()), dict(state))
        assert logits(model).shape == (1, 1)


@pytest.mark.slow
def test_the_fresh_head_has_the_papers_scale(make_policy):
    torch.manual_seed(0)
    model = make_policy()
    heads = [score_head(load_reward_model(model, PLAIN, fresh_head=True)).weight for _ in range(64)]
    assert torch.cat(heads).std().item() == pytest.approx(1 / math.sqrt(17), rel=0.1)


def test_reward_models_keep_their_head(reward_model, saved_reward_model):
    assert load_reward_model(reward_model, PLAIN) is reward_model
    torch.testing.assert_close(
        logits(load_reward_model(saved_reward_model, PLAIN)),
        logits(AutoModelForSequenceClassification.from_pretrained(saved_reward_model)),
    )


def test_weights_are_float32_unless_asked_for(saved_policy):
    assert load_policy(saved_policy, PLAIN).dtype == torch.float32
    assert load_policy(saved_policy, ModelConfig(dtype="bfloat16")).dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_is_no_policy(make_reward_model, tokenizer, tmp_path, tied):
    folder = save(make_reward_model(tie_word_embeddings=tied), tokenizer, tmp_path)
    with pytest.raises(InputError, match=f"'{tmp_path}' (lacks weights|holds a reward model)"):
        load_policy(folder, PLAIN)


def test_a_policy_is_no_reward_model(saved_policy, policy, reward_model):
    with pytest.raises(InputError, match="lacks weights .*score.weight"):
        load_reward_model(saved_policy, PLAIN)
    with pytest.raises(InputError, match="LlamaForCausalLM has no scalar head"):
        load_reward_model(policy, PLAIN)
    with pytest.raises(InputError, match="A LlamaForSequenceClassification was given"):
        load_policy(reward_model, PLAIN)


def test_a_classifier_of_several_labels_is_no_reward_model(policy, tokenizer, tmp_path):
    config = policy.config
    config.num_labels = 3
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(InputError, match="no scalar head"):
        load_reward_model(model, PLAIN)
    with pytest.raises(InputError, match="No model could be loaded"):
        load_reward_model(save(model, tokenizer, tmp_path), PLAIN)


def test_options_that_cannot_be_had(saved_policy, monkeypatch):
    with pytest.raises(InputError, match="dtype is 'float12'; auto, float32"):
        load_policy(saved_policy, ModelConfig(dtype="float12"))

    def lacks_a_package(*args, **kwargs):
        raise ImportError("FlashAttention2 is not installed.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lacks_a_package)
    with pytest.raises(InputError, match="No model could be loaded.* FlashAttention2 is not inst"):
        load_policy(saved_policy, ModelConfig(attn_implementation="flash_attention_2"))


def test_nothing_there(tmp_path):
    for load in (load_policy, load_reward_model):
        with pytest.raises(InputError, match="No model could be loaded from .*Give a Hub id"):
            load(tmp_path / "nowhere", PLAIN)
        with pytest.raises(InputError, match="nowhere': there is no such folder"):
            load(tmp_path / "nowhere", PLAIN)
        with pytest.raises(InputError, match="No model could be loaded from 'no/such-model'"):
            load("no/such-model", PLAIN)


def test_corrupt_weights(saved_policy, tmp_path, tokenizer):
    folder = save(AutoModelForCausalLM.from_pretrained(saved_policy), tokenizer, tmp_path)
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(InputError, match="No model could be loaded"):
        load_policy(folder, PLAIN)


@pytest.mark.parametrize(
    "config, told",
    [
        ("[1, 2]", ""),
        ({"hidden_size": "wide"}, "expected int, got str"),
        ({"num_attention_heads": 0}, ""),
        ({"vocab_size": 100}, ""),
        ({"hidden_size": 24}, "weights have other shapes than its config.json says"),
    ],
)
def test_a_broken_config(saved_policy, tmp_path, config, told):
    shutil.copytree(saved_policy, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    held = json.loads(path.read_text())
    path.write_text(config if isinstance(config, str) else json.dumps({**held, **config}))
    with pytest.raises(InputError, match=f"No model could be loaded from .*model'.*{told}"):
        load_policy(tmp_path / "model", PLAIN)


@pytest.mark.parametrize("content", ["[1]", "{", '{"eos_token": 3}', None])
def test_a_broken_tokenizer(saved_policy, tmp_path, content):
    shutil.copytree(saved_policy, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
        if content is not None:
            (tmp_path / "model" / name).write_text(content)
    told = ".*" if content else ".*backend tokenizer from one of: .*Give a Hub id"
    with pytest.raises(InputError, match=f"No tokenizer could be loaded from .*model'{told}"):
        load_tokenizer(tmp_path / "model")


def test_a_file_is_no_model(saved_policy):
    for load in (load_tokenizer, partial(load_policy, model_config=PLAIN)):
        with pytest.raises(InputError, match=r"config.json': it is a file, not a folder\. Give"):
            load(saved_policy / "config.json")


# ---- adapters ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_adapters_are_merged_on_loading(saved_policy, saved_reward_model, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(saved_policy)
    adapted = adapter(base, tmp_path / "policy")
    assert is_adapter(tmp_path / "policy") and not is_adapter(saved_policy)
    loaded = load_policy(tmp_path / "policy", PLAIN)
    torch.testing.assert_close(logits(loaded), logits(adapted))
    assert all(weight.requires_grad for weight in loaded.parameters())

    base = AutoModelForSequenceClassification.from_pretrained(saved_reward_model)
    adapted = adapter(base, tmp_path / "rm", "SEQ_CLS", modules_to_save=["score"])
    loaded = load_reward_model(tmp_path / "rm", PLAIN)
    torch.testing.assert_close(logits(loaded), logits(adapted))
    assert all(weight.requires_grad for weight in loaded.parameters())
    loaded = load_reward_model(adapted, PLAIN)
    torch.testing.assert_close(logits(loaded), logits(adapted))
    assert all(weight.requires_grad for weight in loaded.parameters())


def test_an_adapter_of_the_other_kind_is_refused(saved_policy, saved_reward_model, tmp_path):
    adapter(AutoModelForCausalLM.from_pretrained(saved_policy), tmp_path / "policy")
    with pytest.raises(InputError, match="an adapter for CAUSAL_LM; one for SEQ_CLS is needed"):
        load_reward_model(tmp_path / "policy", PLAIN)
    model = AutoModelForSequenceClassification.from_pretrained(saved_reward_model)
    adapter(model, tmp_path / "rm", "SEQ_CLS")
    with pytest.raises(InputError, match="an adapter for SEQ_CLS; one for CAUSAL_LM is needed"):
        load_policy(tmp_path / "rm", PLAIN)


def test_a_reward_model_starts_from_a_policys_adapter(saved_policy, tmp_path):
    adapted = adapter(AutoModelForCausalLM.from_pretrained(saved_policy), tmp_path)
    expected = {k: v.clone() for k, v in adapted.merge_and_unload().base_model.state_dict().items()}
    model = load_reward_model(tmp_path, PLAIN, fresh_head=True)
    torch.testing.assert_close(dict(model.base_model.state_dict()), expected)


def test_the_base_of_a_new_adapter(saved_policy, policy, tmp_path):
    """What has a place of its own stays there; what was made in memory is saved."""
    base = AutoModelForCausalLM.from_pretrained(saved_policy)
    assert not needs_base(saved_policy, LORA)
    assert not needs_base(base, LORA)  # it names the folder it came from
    adapter(base, tmp_path / "adapter")
    for config in (PLAIN, LORA):
        assert not needs_base(tmp_path / "adapter", config)
    assert not needs_base(policy, PLAIN)
    assert needs_base(policy, LORA)


def test_peft_defaults():
    assert peft_config_of(PLAIN) is None
    assert peft_config_of(LORA).target_modules == "all-linear"
    reward = peft_config_of(LORA, "SEQ_CLS")
    assert (reward.task_type, list(reward.modules_to_save)) == ("SEQ_CLS", ["score"])
    chosen = ModelConfig(use_peft=True, lora_target_modules=["q_proj", "v_proj"])
    assert set(peft_config_of(chosen).target_modules) == {"q_proj", "v_proj"}


# ---- roles ---------------------------------------------------------------------------------------


def test_the_reference_is_a_frozen_copy(policy):
    reference = reference_of(policy)
    assert not any(p.requires_grad for p in reference.parameters())
    with torch.no_grad():
        policy.lm_head.weight.add_(1.0)
    assert not torch.equal(reference.lm_head.weight, policy.lm_head.weight)
    assert all(p.requires_grad for p in policy.parameters())


def test_a_lora_policys_base_is_its_reference(policy):
    assert reference_of(get_peft_model(policy, peft_config_of(LORA))) is None


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_values_at_the_last_token_are_the_classifiers_score(kind, make_reward_model):
    model = make_reward_model(kind).eval()
    ids = torch.tensor([[72, 105, 33, 10]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        values = ValueModel(model)(ids, mask, mask.cumsum(1) - 1)
    assert values.shape == (1, 4)
    torch.testing.assert_close(values[:, -1:], logits(model, ids[0].tolist()))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_dropout_is_off(kind, make_policy):
    rates = ("attention_dropout", "dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop")
    known = make_policy(kind).config.to_dict()
    model = make_policy(kind, **{name: 0.5 for name in rates if name in known}).train()
    ids = torch.arange(20)[None]
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    disable_dropout(model)
    torch.testing.assert_close(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_context_length(kind, make_policy):
    assert context_length(make_policy(kind)) == 128


def test_names(policy, saved_policy):
    assert model_name(saved_policy) == str(saved_policy)
    assert model_name(AutoModelForCausalLM.from_pretrained(saved_policy)) == str(saved_policy)
    assert model_name(policy) == "LlamaForCausalLM"


def test_only_known_arguments_are_passed(make_policy):
    given = {"input_ids": 1, "position_ids": 2, "nonsense": 3}
    assert accepted(make_policy("llama"), **given) == {"input_ids": 1, "position_ids": 2}
