"""What an error says: a place in front, a reason behind, no secrets, one printable line."""

import pytest

from trl_instruct.errors import InputError, explained, harmless, located, printable, redact, summary


def test_a_place_stands_in_front():
    with pytest.raises(InputError, match=r"^Prompt 3: `prompt` is empty\.$"), located("Prompt 3"):
        raise InputError("`prompt` is empty.")


def test_content_that_is_not_as_expected_is_explained():
    told = r"^The row is not as Nectar is published \(KeyError: 'answers'\)\.$"
    with pytest.raises(InputError, match=told), explained("The row is not as Nectar is published"):
        {}["answers"]


def test_a_first_line_that_announces_others_brings_them_along():
    announced = ValueError("None could be loaded from one of: \n(1) a file\n(2) the Hub")
    assert summary(announced) == "None could be loaded from one of: (1) a file (2) the Hub"
    assert summary(ValueError("It is empty.\nTraceback")) == "It is empty."


def test_what_no_message_holds():
    assert printable("a\x1b[2J\nb\u202e") == "a\\x1b[2J\nb\\u202e"
    assert harmless("0123456789", most=4) == "01 ... 89"
    given = {"reward": "http://me:pw@host/score?api_key=k", "token": "t", "pad_token": "<p>"}
    shown = {"reward": "http://***@host/score?api_key=***", "token": "***", "pad_token": "<p>"}
    assert redact(given) == shown
