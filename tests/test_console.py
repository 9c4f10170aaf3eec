"""What a terminal or a model card gets of texts that come from elsewhere."""

import ast
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from trl_instruct import cli
from trl_instruct.configs import SFTConfig
from trl_instruct.console import brief, in_markdown, one_line, plural, progress_bar, say, table
from trl_instruct.data.records import load_demonstrations, load_prompts
from trl_instruct.errors import InputError, located
from trl_instruct.models.tokenizers import load_tokenizer
from trl_instruct.recipes.publishing import model_card

PACKAGE = Path(cli.__file__).parent
# Clears the screen, sets its title, begins a sequence in one byte, turns the direction of writing.
HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp.\u2066\r\x00"


SPEAKING = ("print", "tqdm.write", "sys.stdout.write", "sys.stderr.write", "logging.getLogger")


def is_harmless(text):
    return all(c.isprintable() or c == "\n" for c in text)


def test_there_is_one_way_to_the_terminal():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            assert called not in SPEAKING or path.name == "console.py", f"{called} in {path}"


@pytest.mark.parametrize("kind", [InputError, ValueError, OSError])
def test_every_exception_of_a_command(kind, monkeypatch, capsys):
    def command(arguments):
        with located(HOSTILE):
            raise kind(f"{HOSTILE} and http://me:pw@host/")

    monkeypatch.setitem(cli.COMMANDS, "sft", command)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["sft"])
    told = capsys.readouterr().err
    assert stopped.value.code == (2 if kind is InputError else 1)
    assert is_harmless(told) and "\\x1b[2J" in told and "\\u202e" in told
    assert "http://***@host/" in told


def test_an_unknown_command_and_a_missing_file(capsys):
    for arguments in ([HOSTILE], ["sft", "--config", HOSTILE], ["sft", f"--{HOSTILE}=1"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert is_harmless(capsys.readouterr().err)


def test_names_in_data_and_models(tmp_path, caplog, capsys):
    """Column names, message keys, roles, file names, a model's type; what is logged of them."""
    file = tmp_path / "\x1b[2Jrows.jsonl"
    records = [
        {HOSTILE: "a", "prompt": 1, "completion": "b"},
        {HOSTILE: "a"},
        {"messages": [{HOSTILE: "user", "content": "a"}]},
        {"messages": [{"role": HOSTILE, "content": "a"}]},
    ]
    told = []
    for record in records:
        file.write_text(json.dumps(record))
        for load in (load_demonstrations, load_prompts):
            try:
                load(file)[0]
            except InputError as error:
                told.append(str(error))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": HOSTILE}))
    with pytest.raises(InputError) as fault:
        load_tokenizer(str(tmp_path))
    assert len(told) == 7 and all(map(is_harmless, [*told, str(fault.value)]))
    assert len(caplog.messages) == 3 and all(map(is_harmless, caplog.messages))


def test_what_is_said_and_drawn(capsys):
    say(HOSTILE)
    rows = table([["", f"a{HOSTILE}"], ["base", "1"]])
    with progress_bar(HOSTILE, 1) as bar:
        assert is_harmless(bar.desc)
    assert is_harmless(capsys.readouterr().out) and all(map(is_harmless, rows))
    assert table([["a\nb", "c"]]) == ["a b  c"]


def test_a_message_of_megabytes_is_cut():
    assert len(str(InputError("a" * 500_000))) < 11_000


NAMES = [
    "<script>alert(1)</script>",
    "[text](javascript:alert(1))",
    "![](http://x/y.png)",
    "a|b | c",
    "`a` **b** _c_ ~~d~~ $e$",
    "a\n\n# b\n---\nlicense: mit",
    "a\\|b &lt;i&gt; &#60;",
    HOSTILE,
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_a_model_card_stays_a_name(tmp_path, name):
    def card(name):
        """Its text, and the tags of the page that it is shown as."""
        folder = tmp_path / name.replace("/", "").replace("\x00", "")
        config = SFTConfig(output_dir=str(folder), use_cpu=True, dataset_name=name)
        folder.mkdir()
        metrics = {f"eval_{name}": 0.5, "eval_accuracy": 1.0}
        card = model_card(folder, folder.name, "sft", config, name, metrics)
        card.save(folder / "README.md")
        assert ModelCard.load(folder / "README.md").data.to_dict() == {
            "library_name": "transformers",
            "license": "unknown",
            "pipeline_tag": "text-generation",
            "tags": ["trl-instruct", "trl", "sft"],
        }
        text = (folder / "README.md").read_text()
        body = text.split("---\n", 2)[2]
        return text, re.findall("<[^>]*>", MarkdownIt("commonmark").enable("table").render(body))

    text, tags = card(name)
    assert is_harmless(text) and "| eval_accuracy | 1 |" in text
    assert tags == card("calm one")[1]


def test_a_plain_name_is_not_changed():
    assert in_markdown("runs/sft-1_2 (eval_accuracy: 5%)") == "runs/sft-1_2 (eval_accuracy: 5%)"


def test_texts_on_a_line_of_their_own():
    assert one_line("An owl.\nA crow.\t\n") == "An owl. | A crow."
    assert brief("0123456789\n", most=4) == "0123..."
    assert in_markdown("a|<b>_c_") == "a&#124;&#60;b&#62;&#95;c&#95;"
    assert table([["", "mean"], ["base", "0.5"]]) == ["      mean", "base  0.5"]
    assert (plural(1, "tie"), plural(1200, "tie")) == ("1 tie", "1,200 ties")
