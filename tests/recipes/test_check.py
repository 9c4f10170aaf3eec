"""The dry run: every fault, nothing trained, nothing left behind."""

import json
import re

import pytest
from conftest import CHAT_TEMPLATE
from datasets import Dataset
from test_recipes import DEMONSTRATIONS, PROMPTS, QUICK, QUICK_PPO, RANKINGS, chat, write
from transformers import AutoTokenizer

from trl_instruct import cli
from trl_instruct.data.rendering import Rendered
from trl_instruct.errors import InputError
from trl_instruct.recipes.chain import check_format
from trl_instruct.recipes.dry_run import shown_tokens
from trl_instruct.recipes.ppo import ppo
from trl_instruct.recipes.rm import rm
from trl_instruct.recipes.sft import sft


def check(stage, model, path, folder, capsys, *arguments, quick=QUICK):
    options = {"model_name_or_path": model, "dataset_name": path, "output_dir": folder, **quick}
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    code = 0
    try:
        cli.main(["check", stage, *given, *map(str, arguments)])
    except SystemExit as ended:
        code = ended.code
    return code, capsys.readouterr().out


def test_tokens_with_their_mask(tokenizer):
    record = Rendered(tokenizer("a\n")["input_ids"], [*tokenizer(" b")["input_ids"], 256], None)
    assert shown_tokens(record, tokenizer) == r"a|\n[ ][b][<eos>]"
    long = tokenizer("a" * 50 + "b" * 7 + "c" * 50)["input_ids"]
    shown = [*"a" * 50, " ... 7 more ... ", *"c" * 50]
    assert shown_tokens(Rendered(long, [], None), tokenizer) == "|".join(shown)


@pytest.mark.slow
def test_sft(saved_policy, tmp_path, capsys):
    rows = [*DEMONSTRATIONS, {"prompt": "", "completion": "x"}, {"prompt": "p" * 128}]
    rows += [{"prompt": "p" * 128, "completion": "y"}, {"prompt": "Q", "completion": None}]
    path = write(tmp_path / "d.jsonl", rows)
    held_out = write(tmp_path / "e.jsonl", [DEMONSTRATIONS[0], {"prompt": "Q", "completion": ""}])
    given = ("--eval_dataset_name", held_out)
    code, told = check("sft", saved_policy, path, tmp_path / "x", capsys, *given)
    assert code == 2
    faults = [line.partition(": ")[2] for line in told.splitlines() if line.startswith("fault")]
    assert [fault.split(": ")[0] for fault in faults] == [
        *(f"{path}, line {line}" for line in (9, 10, 12)),
        f"{held_out}, line 2",
        f"{path}, line 11",
    ]
    assert "the prompt alone is 128 tokens" in faults[-1]
    assert "sft: record 1, 4 + 9 tokens: Q|0|:| [a][n][s][w][e][r][ ][0][<eos>]" in told
    assert "demonstrations: 13 to 13 tokens, median 13; the limit is 128, 0 of 8 exceed" in told
    assert "sft: 8 rows in batches of 4: 2 optimizer steps a pass, 2 optimizer steps" in told
    assert "policy" in told  # its memory
    assert told.splitlines()[-1] == "check: 5 faults"
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--lr_scheduler_type", "warmup_stable_decay"), "argument: 'num_decay_steps'"),
        (("--adam_beta1", 2), "Invalid beta parameter at index 0: 2.0"),
        (("--optim", "galore_adamw"), "You need to install `galore_torch`"),
    ],
)
def test_what_an_optimizer_or_a_scheduler_refuses(saved_policy, tmp_path, capsys, option, message):
    path, said = write(tmp_path / "d.jsonl", DEMONSTRATIONS), "These options cannot be used: "
    code, told = check("sft", saved_policy, path, tmp_path / "x", capsys, *option)
    (fault,) = (line for line in told.splitlines() if line.startswith("fault"))
    assert code == 2 and fault.startswith(f"fault 1: {said}") and message in fault
    options = {**QUICK, option[0].removeprefix("--"): option[1]}
    with pytest.raises(InputError, match=f"{said}.*{re.escape(message)}"):
        sft(saved_policy, path, tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_rm(saved_policy, tmp_path, capsys):
    rows = [*RANKINGS, {**RANKINGS[0], "ranks": [1, 2]}]
    path = write(tmp_path / "r.jsonl", rows)
    shown = write(tmp_path / "d.jsonl", [DEMONSTRATIONS[0], {"prompt": "Q", "completion": ""}])
    quick = {**QUICK, "per_device_train_batch_size": 64, "max_steps": -1, "num_train_epochs": 1}
    given = ("--demonstrations_name", shown, "--eval_size", 0.25)
    code, told = check("rm", saved_policy, path, tmp_path / "x", capsys, *given, quick=quick)
    assert code == 2
    assert f"fault 1: {path}, line 9: `ranks` has 2 values for 3 responses" in told
    assert f"fault 2: {shown}, line 2: `completion` is empty" in told
    assert "rm: 6 rows in batches of 64: ONE optimizer step a pass, ONE optimizer step in" in told
    assert "few; lower gradient_accumulation_steps" in told
    assert "rm: record 1, 4 + 4 tokens: Q|" in told


@pytest.mark.slow
def test_ppo_with_its_reward(saved_policy, tmp_path, capsys):
    path = write(tmp_path / "p.jsonl", PROMPTS)
    code = tmp_path / "rewards.py"
    code.write_text(
        "def length(prompts, completions, **columns):\n    return [3.5 for _ in completions]\n"
        "def broken(prompts, completions, **columns):\n    raise RuntimeError('no key')\n"
    )
    given = ("p.jsonl", path, tmp_path / "x", capsys)[1:]
    good = ("--reward_model_path", f"{code}:length")
    result, told = check("ppo", saved_policy, *given, *good, quick=QUICK_PPO)
    assert (result, told.splitlines()[-1]) == (0, "check: no faults")
    assert told.count("ppo: the reward gives 3.5 to '") == 2
    assert "ppo: 8 prompts in batches of 4: 1 iteration, 4 episodes (0.5 passes), ONE opt" in told
    bad = ("--reward_model_path", f"{code}:broken")
    result, told = check("ppo", saved_policy, *given, *bad, quick=QUICK_PPO)
    assert result == 2
    assert "fault 1: Reward 'broken' raised RuntimeError: no key" in told
    result, told = check("ppo", saved_policy, *given, quick=QUICK_PPO)
    assert (result, "ppo needs reward_model_path" in told) == (2, True)
    assert {file.name for file in tmp_path.iterdir()} - {"__pycache__"} == {"p.jsonl", "rewards.py"}


@pytest.mark.slow
def test_an_earlier_run_is_a_fault_and_stays(saved_policy, tmp_path, capsys):
    path = write(tmp_path / "d.jsonl", DEMONSTRATIONS)
    sft(saved_policy, str(path), tmp_path / "x", **QUICK)
    before = {file: file.read_bytes() for file in (tmp_path / "x").iterdir() if file.is_file()}
    code, told = check("sft", saved_policy, path, tmp_path / "x", capsys)
    assert code == 2
    assert "holds another run" in told
    assert "sft: record 1" in told
    overwrite = ("--overwrite_output_dir", "true")
    assert check("sft", saved_policy, path, tmp_path / "x", capsys, *overwrite)[0] == 0
    assert before == {f: f.read_bytes() for f in (tmp_path / "x").iterdir() if f.is_file()}


def test_a_stage_that_has_no_check(capsys):
    for given in ([], ["evaluate"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(["check", *given])
        assert ended.value.code == 2
        told = capsys.readouterr().err
        assert "stage" in told and told.count("\n") == 1


@pytest.mark.slow
def test_the_tiny_base_is_not_trained_by_a_check(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, told = check("sft", "tiny", "tiny:demonstrations", "runs/sft", capsys)
    assert (code, "sft trains it" in told) == (2, True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_bad_records_are_left_out_in_all_stages(saved_policy, tmp_path, capsys):
    """Empty ones, overlong ones, and those that the template refuses."""
    tokenizer = AutoTokenizer.from_pretrained(saved_policy)
    refused = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = refused + CHAT_TEMPLATE

    def with_faults(rows):
        rows = [chat(row) for row in rows]
        system = [{"role": "system", "content": "Be kind."}]
        long = [{"role": "user", "content": "p" * 200}]
        more = [{**rows[0], "prompt": system + rows[0]["prompt"]}, {**rows[0], "prompt": []}]
        return Dataset.from_list([*more, {**rows[0], "prompt": long}, *rows])

    skip = {"on_bad_record": "skip", "processing_class": tokenizer}
    policy = sft(saved_policy, with_faults(DEMONSTRATIONS), tmp_path / "sft", **QUICK, **skip)
    reward = rm(policy, with_faults(RANKINGS), tmp_path / "rm", eval_size=0.25, **QUICK, **skip)
    aligned = ppo(policy, reward, with_faults(PROMPTS), tmp_path / "ppo", **QUICK_PPO, **skip)
    told = capsys.readouterr().out
    assert "sft: 8 rows" in told and "ppo: 8 prompts" in told
    assert reward.metrics["data"]["records"] == 10  # of the template's refusal it is not told
    assert aligned.metrics["cut_prompts"] == 0


@pytest.mark.slow
def test_what_sft_read_is_what_the_others_read(saved_policy, tmp_path):
    """Names of columns, template and suffix, unless told otherwise."""
    asked = [{"ask": f"Q{i}", "say": f"answer {i % 3}"} for i in range(8)]
    given = {"columns": ["completion=say"], "prompt_template": "{ask}?", "prompt_suffix": "\\nA:"}
    policy = sft(saved_policy, Dataset.from_list(asked), tmp_path / "sft", **QUICK, **given)
    rankings = [{"ask": f"Q{i}", "responses": ["bad", "good"], "ranks": [2, 1]} for i in range(8)]
    reward = rm(policy, Dataset.from_list(rankings), tmp_path / "rm", eval_size=0, **QUICK)
    seen = []

    def spy(prompts, completions, **columns):
        seen.extend(prompts)
        return [1.0] * len(prompts)

    prompts = Dataset.from_list([{"ask": f"Q{i}"} for i in range(4)])
    ppo(reward.path.parent / "sft", spy, prompts, tmp_path / "ppo", **QUICK_PPO)
    assert set(seen) == {f"Q{i}?\nA:" for i in range(4)}
    seen.clear()
    plain = Dataset.from_list([{"prompt": "Hm"}])
    with pytest.raises(InputError, match=r"has \{ask\}, but there is no column 'ask'.*'' for none"):
        ppo(policy, spy, plain, tmp_path / "plain", **QUICK_PPO)
    none = {"prompt_template": "", "prompt_suffix": ""}
    ppo(policy, spy, plain, tmp_path / "plain", **QUICK_PPO, **none)
    assert set(seen) == {"Hm"}


def finished(folder, form):
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "metrics.json").write_text(json.dumps({"stage": "sft", "format": form}))
    return folder


def test_prompts_of_another_form_than_the_models(tmp_path, chat_tokenizer):
    """Text that holds the template's own tokens is written as messages already."""
    policy, reward = finished(tmp_path / "p", "messages"), finished(tmp_path / "r", "text")
    text, talk = Dataset.from_list(PROMPTS), Dataset.from_list([chat(row) for row in PROMPTS])
    with pytest.raises(InputError, match="`prompt` is text, but the policy .*p was trained on mes"):
        check_format(text, chat_tokenizer, policy=policy, reward_model=reward)
    with pytest.raises(InputError, match="`prompt` is messages, but the reward model .*r was trai"):
        check_format(talk, chat_tokenizer, policy=policy, reward_model=reward)
    written = Dataset.from_list([{"prompt": "u:Hi<eos>a:"}])
    check_format(written, chat_tokenizer, policy=policy)
    check_format(talk, chat_tokenizer, policy=policy, reward_model=len)
    check_format(text, chat_tokenizer, policy=tmp_path / "nowhere", reward_model=[reward])


@pytest.mark.slow
@pytest.mark.parametrize("skip", [False, True])
def test_ppo_reads_held_out_prompts_before_it_trains(saved_policy, tmp_path, capsys, skip):
    """`compare` reads them after the training."""
    path, held_out = write(tmp_path / "p.jsonl", PROMPTS), tmp_path / "e.jsonl"
    write(held_out, [PROMPTS[0], {"prompt": ""}, {"prompt": "p" * 125}][: 2 if skip else 3])
    code = tmp_path / "rewards.py"
    code.write_text(
        "def one(prompts, completions, **columns):\n    return [1.0 for _ in prompts]\n"
    )
    given = ("--reward_model_path", f"{code}:one", "--eval_dataset_name", held_out)
    skips = ("--on_bad_record", "skip") if skip else ()
    named = {"model_name_or_path": saved_policy, "dataset_name": path, **QUICK_PPO}
    flags = [text for name, value in named.items() for text in (f"--{name}", str(value))]
    arguments = ["ppo", *flags, *map(str, given), *skips, "--output_dir", str(tmp_path / "x")]
    if skip:
        cli.main(arguments)
        assert "1 test prompts, one completion each" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert "e.jsonl, line 2: `prompt` is empty" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert check("ppo", saved_policy, path, tmp_path / "x", capsys, *given, quick=QUICK_PPO)[0] == 2
