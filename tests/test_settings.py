"""What follows from the fields of `Settings`: checks, names, the order in which they act, the options of commands."""

import argparse
import math
import re
import sys
from dataclasses import fields
from inspect import signature
from typing import Any, get_args

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama import Llama, LlamaError
from llama.cli.model_options import add_sampling_options, read_settings
from llama.sampling import FUNCTIONS, Context, apply_logits_processors, narrow
from llama.settings import CALL_OPTIONS, NAMES, SETTINGS, Settings, Stage, settings_of_rows

ACTING = ("logits", "narrowing")  # stages whose settings are functions
NUMBERS = [name for name, setting in SETTINGS.items() if "number" in setting.values.description.split()]
RANGE = re.compile(r"a (whole )?number(?: (above|of at least) (\S+)| in ([(\[])(\S+), (\S+)\])?")
DEFAULTS = Settings()
# A value of each acting setting with which it does something to LOGITS after CONTEXT.
VALUES: dict[str, Any] = {
    "logit_bias": {1: 2.0}, "repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.5,
    "no_repeat_ngram_size": 1, "min_gen_len": 9, "logits_processor": lambda tokens, logits: logits + len(tokens),
    "temperature": 0.5, "top_k": 2, "top_p": 0.6, "min_p": 0.3,
}  # fmt: skip
LOGITS = torch.tensor([0.1, 2.0, -1.0, 1.5, 0.3])
CONTEXT = Context([1], [3, 2, 3], {0})


def test_every_field_says_where_it_acts_and_what_it_does() -> None:
    assert [f.name for f in fields(Settings)] == list(SETTINGS)
    for name, setting in SETTINGS.items():
        assert setting.stage in get_args(Stage), name
        assert len(setting.help) > 10 and setting.values.description, name


def test_names_are_those_of_the_fields() -> None:
    assert {f.name for f in fields(Settings)} == NAMES
    listed = {"self", "prompt_tokens", "max_gen_len", "temperature", "top_p", "logprobs", "settings"}
    assert signature(Llama.complete).parameters.keys() - listed == CALL_OPTIONS
    assert settings_of_rows(1, {}, None) == [DEFAULTS]
    for name in NAMES:
        settings_of_rows(1, {name: getattr(DEFAULTS, name)}, None)


def documented(description: str) -> tuple[bool, float, bool, float]:
    """(only integers, the least number, whether it is excluded, the largest), as an error message words it."""
    match = RANGE.fullmatch(description)
    assert match, description
    whole, kind, bound, bracket, low, high = match.groups()
    if high:
        return bool(whole), float(low), bracket == "(", float(high)
    return bool(whole), float(bound) if kind else -math.inf, kind == "above", math.inf


@settings(deadline=None, max_examples=300)
@given(
    name=st.sampled_from(NUMBERS),
    value=st.one_of(
        st.sampled_from([-2.5, -2, -1, 0, 0.0, 1, 1.0, 2, 2.0, 2.5, math.inf, -math.inf, math.nan, True, "1", [1]]),
        st.integers(),
        st.floats(),
        st.floats(-3, 3),
    ),
)
@example(name="top_k", value=10**400)
@example(name="temperature", value=10**400)
def test_the_range_that_is_documented_is_the_one_that_is_enforced(name: str, value: Any) -> None:
    description = SETTINGS[name].values.description
    whole, least, excluded, most = documented(description)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    inside = is_number and (isinstance(value, int) if whole else value == value and abs(value) <= sys.float_info.max)
    inside = inside and (least < value if excluded else least <= value) and value <= most
    if inside:
        assert getattr(Settings(**{name: value}), name) == value
    else:
        with pytest.raises(LlamaError, match=rf"^{name} is .*, expected {re.escape(description)}$"):
            Settings(**{name: value})


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_none_is_a_value_where_it_is_the_default(name: str) -> None:
    if getattr(DEFAULTS, name) is None:
        assert Settings(**{name: None}) == DEFAULTS
    else:
        with pytest.raises(LlamaError, match=f"^{name} is None, expected "):
            Settings(**{name: None})


def test_every_acting_setting_has_one_function() -> None:
    assert FUNCTIONS.keys() == {name for name, setting in SETTINGS.items() if setting.stage in ACTING} == VALUES.keys()


@pytest.mark.parametrize("name", sorted(VALUES))
def test_a_setting_does_what_its_function_does(name: str) -> None:
    """Alone, and nothing with its idle value; `changes_logits` and `narrowing` say so."""
    setting, value = SETTINGS[name], VALUES[name]
    off = Settings(**{name: one.idle for name, one in SETTINGS.items() if one.stage == "narrowing" and one.idle})
    assert not off.changes_logits and torch.equal(apply_logits_processors(LOGITS, off, CONTEXT), LOGITS)
    on = Settings(**{"top_p": 1.0, name: value})
    assert on.changes_logits == (setting.stage == "logits")
    if setting.stage == "logits":
        expected = FUNCTIONS[name](LOGITS, value, CONTEXT)
        assert torch.equal(apply_logits_processors(LOGITS, on, CONTEXT), expected)
    else:
        assert [name for name, _ in on.narrowing] == ["temperature"] + [name] * (name != "temperature")
        cooled = LOGITS if name == "temperature" else FUNCTIONS["temperature"](LOGITS, on.temperature)
        expected = FUNCTIONS[name](cooled, value)
        assert torch.equal(narrow(LOGITS, on.narrowing), expected)
    assert not torch.equal(expected, LOGITS)


def test_settings_act_in_the_order_of_their_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in list(FUNCTIONS):
        monkeypatch.setitem(FUNCTIONS, name, lambda logits, *_, name=name: called.append(name) or logits)
    every = Settings(**VALUES)
    narrow(apply_logits_processors(LOGITS, every, CONTEXT), every.narrowing)
    assert called == [f.name for f in fields(Settings) if f.name in VALUES]


def test_the_command_lines_options_are_those_of_the_fields() -> None:
    parser = argparse.ArgumentParser()
    add_sampling_options(parser)
    with_option = {name for name, setting in SETTINGS.items() if setting.on_command_line}
    assert with_option == {
        "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "max_gen_len"
    }  # fmt: skip
    assert Settings(**read_settings(parser.parse_args([]))) == DEFAULTS
    words = ["--top_k", "3", "--min_p", "0.5", "--stop", "a", "--stop", "b"]
    assert Settings(**read_settings(parser.parse_args(words))) == Settings(top_k=3, min_p=0.5, stop=("a", "b"))
    for name in with_option:
        assert " ".join(SETTINGS[name].help.split()) in " ".join(parser.format_help().split())
