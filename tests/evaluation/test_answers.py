import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_recipes import PROMPTS, chat, write
from transformers import AutoModelForCausalLM

from trl_instruct import cli
from trl_instruct.errors import InputError
from trl_instruct.evaluation import answers
from trl_instruct.evaluation.answers import AnswerOptions, answer_prompts

QUICK = AnswerOptions(response_length=4)


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
    original = answers.sample_several

    def keep(policy, tokenizer, prompts, *arguments, **options):
        seen.extend(tokenizer.decode(tokens) for tokens in prompts)
        return original(policy, tokenizer, prompts, *arguments, **options)

    monkeypatch.setattr(answers, "sample_several", keep)
    return seen


@pytest.mark.slow
def test_models_answer_side_by_side(folders):
    models = {"plain": folders / "plain", "lora": folders / "adapter"}
    lines = list(answer_prompts(models, ["Q1: ", "Q2: "], QUICK))
    assert [line.split()[0] for line in lines] == [">", "plain", "lora", ">", "plain", "lora"]
    assert lines[0] == "\n> Q1:"
    again = list(answer_prompts({"lora": folders / "adapter"}, ["Q1: ", "Q2: "], QUICK))
    assert again[1].split()[1:] == lines[2].split()[1:]  # alone it says the same


def test_several_completions_and_the_seed(folders):
    models = {"plain": folders / "plain"}
    one, same, other = (
        list(answer_prompts(models, ["Q: "], AnswerOptions(4, num_completions=3, seed=seed)))
        for seed in (1, 1, 2)
    )
    assert len(one) == 1 + 3
    assert one == same != other


@pytest.mark.slow
def test_a_typed_text_is_a_message_to_a_model_with_a_template(folders, asked):
    models = {"plain": folders / "plain", "chat": folders / "chat"}
    list(answer_prompts(models, ["Hi"], QUICK, typed=True, suffix="\n"))
    list(answer_prompts(models, ["Hi"], QUICK, typed=True, suffix="\n", chat=False))
    list(answer_prompts(models, ["Hi"], QUICK))  # a record: as it stands
    assert asked == ["Hi\n", "u:Hi\na:", "Hi\n", "Hi\n", "Hi", "Hi"]


def test_a_prompt_that_is_too_long_is_a_mistake(folders):
    with pytest.raises(InputError, match="Prompt 1 is 130 tokens long"):
        list(answer_prompts({"plain": folders / "plain"}, ["x" * 130], QUICK))
    with pytest.raises(InputError, match="no chat template"):
        rows = [chat(PROMPTS[0])["prompt"]]
        list(answer_prompts({"plain": folders / "plain"}, rows, QUICK))


# ---- the command ---------------------------------------------------------------------------------


def generate(*arguments):
    cli.main(["generate", "--response_length", "4", *map(str, arguments)])


def test_given_prompts(folders, capsys):
    generate("--models", folders / "plain", f"b={folders / 'adapter'}", "--prompts", "Q: ", "R: ")
    told = capsys.readouterr().out.splitlines()
    assert [line for line in told if line.startswith(">")] == ["> Q:", "> R:"]
    assert sum(line.startswith("  plain  ") for line in told) == 2
    assert sum(line.startswith("  b      ") for line in told) == 2


def test_weights_of_half_the_size(folders, monkeypatch):
    loaded, load = [], answers.load_policy
    monkeypatch.setattr(answers, "load_policy", lambda *a: loaded.append(load(*a)) or loaded[0])
    generate("--models", folders / "plain", "--prompts", "Q: ", "--dtype", "bfloat16")
    assert loaded[0].dtype == torch.bfloat16


def test_prompts_of_a_file(folders, tmp_path, capsys, asked):
    file = write(tmp_path / "prompts.jsonl", PROMPTS[:2])
    generate("--models", folders / "plain", "--dataset_name", file)
    assert asked == ["Q0: ", "Q1: "]
    asked.clear()
    generate("--models", folders / "plain", "--dataset_name", file, "--prompt_suffix", "A:\\n")
    assert asked == ["Q0: A:\n", "Q1: A:\n"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "a", "--dataset_name", "b"], "were both given"),
        ([], "prompts and dataset_name are both missing; give one of them."),
        (["--prompts", "a", "--temperature", "0"], "temperature is 0.0; it must be above 0."),
        (["--num_completions", "0"], "num_completions is 0"),
        (["--models", "nowhere", "--prompts", "a"], "No tokenizer could be loaded"),
        (["--modls", "x"], "unrecognized arguments"),
    ],
)
def test_mistakes(folders, arguments, message, capsys):
    with pytest.raises(SystemExit):
        generate("--models", folders / "plain", *arguments)
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


def test_what_a_model_says_cannot_disturb_the_screen(folders, monkeypatch, capsys):
    monkeypatch.setattr(answers, "_complete", lambda *_: [["a\x1b[2J\nb"]])
    generate("--models", folders / "plain", "--prompts", "Q\x1b[2J")
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert "  plain  a\\x1b[2J\n         b\n" in told
