"""candidates and evaluate take prompts in every form that ppo takes."""

import json

import pytest
from test_recipes import QUICK_PPO, chat, write

from trl_instruct import cli
from trl_instruct.recipes.ppo import ppo

ROWS = [{"question": f"Q{i}", "review": "long ago"} for i in range(2)]
SHARES = [
    {"conversations": [{"from": "human", "value": f"Q{i}"}, {"from": "gpt", "value": "A"}]}
    for i in range(2)
]
FORMS = {
    "columns": (ROWS, ["--columns", "prompt=question"], ["Q0", "Q1"]),
    "template": (
        ROWS,
        ["--prompt_template", r"{question}?\n", "--prompt_suffix", "A:"],
        ["Q0?\nA:", "Q1?\nA:"],
    ),
    "openings": (ROWS, ["--columns", "text=review", "--opening_length", "4"], ["long", "long"]),
    "published": (
        [{"instruction": f"Q{i}", "input": "", "output": "A"} for i in range(2)],
        [],
        ["Q0", "Q1"],
    ),
    "messages": (SHARES, [], [chat({"prompt": f"Q{i}"})["prompt"] for i in range(2)]),
}


@pytest.fixture
def asked(monkeypatch):
    """The prompts that are rendered, by whichever command."""
    from trl_instruct.generation import sampling

    seen, render = [], sampling.render_prompts

    def spy(prompts, *given, **options):
        seen.extend(prompts)
        return render(prompts, *given, **options)

    monkeypatch.setattr(sampling, "render_prompts", spy)
    return seen


@pytest.fixture
def policy(saved_policy, chat_tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(saved_policy).save_pretrained(tmp_path / "policy")
    chat_tokenizer.save_pretrained(tmp_path / "policy")
    return str(tmp_path / "policy")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_prompts_of_a_file(form, policy, tmp_path, asked, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, options, expected = FORMS[form]
    path = str(write(tmp_path / "prompts.jsonl", rows))
    given = ["--dataset_name", path, *options]
    stage = [*given, "--response_length", "3", "--use_cpu", "true", "--output_dir"]
    commands = {
        "candidates": ["--model_name_or_path", policy, *stage, "c"],
        "evaluate": ["--models", policy, *stage, "e", "--best_of_n", "1"],
    }
    for command, arguments in commands.items():
        asked.clear()
        cli.main([command, *arguments])
        assert asked == expected, command
    written = [json.loads(line) for line in (tmp_path / "c" / "train.jsonl").open()]
    assert [row["prompt"] for row in written] == expected
    named = dict(zip(options[::2], options[1::2], strict=True))
    renamed = {name.strip("-"): value for name, value in named.items()}
    if "columns" in renamed:
        renamed["columns"] = [renamed["columns"]]
    if "opening_length" in renamed:
        renamed["opening_length"] = int(renamed["opening_length"])
    asked.clear()
    ppo(
        policy, lambda prompts, completions: [0.0] * len(prompts), path, "p", **QUICK_PPO, **renamed
    )
    assert asked == expected
