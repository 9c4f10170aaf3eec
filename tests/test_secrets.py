"""Passwords, tokens and keys: in no file and in no line."""

import pytest

from trl_instruct.console import say
from trl_instruct.errors import InputError, redact
from trl_instruct.recipes.options import check_redacted, named_sources
from trl_instruct.rewards.function import reward_name
from trl_instruct.rewards.http import HTTPReward


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:pw@host/score", "http://***@host/score"),
        ("of https://me:p@ss:w@host: no", "of https://***@host: no"),
        ("http://host/?a=1&api_key=k&b=2.", "http://host/?a=1&api_key=***&b=2."),
        ("https://host/v1?key=k#top", "https://host/v1?key=***#top"),
        ("Authorization: Bearer abcdefgh.i", "Authorization: Bearer ***"),
        ('\'{"token": "t", "a": 1\' is no JSON', '\'{"token": "***", "a": 1\' is no JSON'),
        ("dict {'hub-token': 'abcdef...", "dict {'hub-token': '***"),
        (f"Repository of hf_{'a' * 34}", "Repository of ***"),
    ],
)
def test_secrets_in_text(text, shown):
    assert redact(text) == shown
    assert str(InputError(text)) == shown


@pytest.mark.parametrize(
    "text",
    [
        "hf-internal-testing/hf_tiny_model_of_a_long_name_that_is_none",
        "hf://datasets/org/name@main/file.csv",
        "http://host/a@b?eos_token=x&max_tokens=5",
        "Token: {token}, the password: {password}",
        "Set HF_TOKEN, or token=.",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


def test_secrets_in_options():
    options = {"token": "t", "headers": {"X-Auth-Token": "t"}, "secret": None, "pad_token": "<p>"}
    shown = {"token": "***", "headers": {"X-Auth-Token": "***"}, "secret": None, "pad_token": "<p>"}
    assert redact([options]) == [shown]


def test_what_is_printed_and_how_models_are_called(capsys):
    say("served at http://me:pw@host/score")
    assert capsys.readouterr().out == "served at http://***@host/score\n"
    address = "http://host/score?key=k"
    assert named_sources([address], "judges") == {"score?key=***": address}


def test_a_redacted_secret_is_asked_for():
    for value in ("http://host/score?api_key=***", {"token": "***"}, ["ftp://***@host"]):
        with pytest.raises(
            InputError, match="gold is .*: no secret is saved in a config. Give gold"
        ):
            check_redacted({"gold": value})
    check_redacted({"prompt_template": "*** {prompt} ***", "stop_strings": ["***"], "n": 1})


def test_a_reward_is_named_without_its_password():
    reward = HTTPReward("http://127.0.0.1/score?api_key=k")
    assert reward_name(reward) == "http://127.0.0.1/score?api_key=***"
