import pytest
from peft import LoraConfig, get_peft_model
from test_recipes import PROMPTS, chat
from transformers import AutoModelForCausalLM

from trl_instruct.data.reading import AS_PUBLISHED, Reading
from trl_instruct.errors import InputError
from trl_instruct.evaluation import measurement
from trl_instruct.generation.sampling import Sampling
from trl_instruct.labels.comparisons import answers_of

QUICK = Sampling(response_length=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_policy, tokenizer, chat_tokenizer):
    """A plain policy, one with a chat template, and an adapter on the first."""
    root = tmp_path_factory.mktemp("models")
    for name, reader in (("plain", tokenizer), ("chat", chat_tokenizer)):
        make_policy().save_pretrained(root / name)
        reader.save_pretrained(root / name)
    base = AutoModelForCausalLM.from_pretrained(root / "plain")
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    adapted.save_pretrained(root / "adapter")
    tokenizer.save_pretrained(root / "adapter")
    return root


@pytest.fixture
def asked(monkeypatch):
    """The token lists that were sampled from, in order."""
    seen = []
    original = measurement.complete

    def keep(sampler, prompts, *arguments, **options):
        seen.extend(sampler.tokenizer.decode(tokens) for tokens in prompts)
        return original(sampler, prompts, *arguments, **options)

    monkeypatch.setattr(measurement, "complete", keep)
    return seen


@pytest.mark.slow
def test_models_answer_side_by_side(folders):
    models = {"plain": folders / "plain", "lora": folders / "adapter"}
    given = answers_of(models, ["Q1: ", "Q2: "], QUICK)
    assert list(given) == ["plain", "lora"] and set(map(len, given.values())) == {2}
    alone = answers_of({"lora": folders / "adapter"}, ["Q1: ", "Q2: "], QUICK)
    assert alone["lora"] == given["lora"] != given["plain"]


def test_the_seed(folders):
    models = {"plain": folders / "plain"}
    one, same, other = (answers_of(models, ["Q: "] * 3, QUICK, seed=seed) for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.slow
def test_a_typed_text_is_written_as_the_model_was_trained(folders, asked):
    models = {"plain": folders / "plain", "chat": folders / "chat"}
    answers_of(models, ["Hi"], QUICK, typed=AS_PUBLISHED)
    answers_of(models, ["Hi"], QUICK, typed=Reading(prompt_template="{prompt}?\n"))
    answers_of(models, ["Hi"], QUICK)  # a record: as it stands
    assert asked == ["Hi", "u:Hi\na:", "Hi?\n", "Hi?\n", "Hi", "Hi"]


def test_a_prompt_that_is_too_long_is_a_mistake(folders):
    with pytest.raises(InputError, match="Prompt 1 is 130 tokens long"):
        answers_of({"plain": folders / "plain"}, ["x" * 130], QUICK)
    with pytest.raises(InputError, match="no chat template"):
        answers_of({"plain": folders / "plain"}, [chat(PROMPTS[0])["prompt"]], QUICK)
