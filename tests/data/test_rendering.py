"""One rendering: tokenizers of every family, templates of every habit, text and messages.

What SFT trains on = what rm trains on (pairs, rankings) = PPO's prompt + completion = what a reward
model scores; and back, the text of what was sampled.
"""

import copy
import json

import pytest
from conftest import CHAT_TEMPLATE, byte_tokenizer
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from trl_instruct.configs import SFTConfig
from trl_instruct.data.rendering import (
    completion_texts,
    render,
    render_prompt,
    render_prompts,
    template_arguments,
)
from trl_instruct.errors import InputError
from trl_instruct.evaluation.measurement import demonstration_tokens
from trl_instruct.recipes.sft import render_demonstrations
from trl_instruct.reward_trainer.batches import tokenize_pair, tokenize_ranking
from trl_instruct.rewards.tokens import reward_rows

WORDS = ("The", "capital", "is", "Rome", "Oslo", "system", "user", "assistant")
CHARACTERS = sorted({chr(code) for code in range(32, 127)} | {"\n"})


# ---- tokenizers ----------------------------------------------------------------------------------


def merges_of(words):
    """Vocabulary and merges that make each word, letter by letter, one token."""
    vocabulary, merges = [], []
    for word in words:
        parts = list(word)
        while len(parts) > 1:
            first, second, *rest = parts
            if (first, second) not in merges:
                merges.append((first, second))
                vocabulary.append(first + second)
            parts = [first + second, *rest]
    return list(dict.fromkeys(vocabulary)), merges


def wrapped(core, post=None):
    core.add_special_tokens(["<s>", "</s>", "<pad>"])
    if post:
        known = [(token, core.token_to_id(token)) for token in ("<s>", "</s>")]
        core.post_processor = processors.TemplateProcessing(single=post, special_tokens=known)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def byte_level(post=None, joining=()):
    """GPT-2's, Qwen's, Llama 3's. `joining`: further words, across spaces and ends of prompts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words, merges = merges_of([*("Ġ" + word for word in WORDS), *joining])
    vocabulary = {token: index for index, token in enumerate([*alphabet, *words])}
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not joining)
    core.decoder = decoders.ByteLevel()
    return wrapped(core, post)


def llama():
    """Llama 2's: a space before every text, which the decoder strips again; a BOS."""
    words, merges = merges_of([f"▁{word}" for word in WORDS])
    characters = ["▁" if c == " " else c for c in CHARACTERS]
    byte_tokens = [f"<0x{number:02X}>" for number in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *characters, *words]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return LlamaTokenizer(vocab=vocabulary, merges=merges, **special)


def unigram(post="$A </s>"):
    """T5's: Unigram, a space before every text, an EOS behind it."""
    pieces = [f"▁{word}" for word in WORDS]
    scores = [("<unk>", 0.0), *((piece, -1.0) for piece in pieces), ("▁", -2.0)]
    scores += [(c, -3.0) for c in CHARACTERS if c != " "]
    core = Tokenizer(models.Unigram(scores, unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    return wrapped(core, post)


def word_piece():
    """BERT's: words and their parts, a token before and one behind every text."""
    parts = [c for c in CHARACTERS if c.strip()]
    tokens = ["[UNK]", *WORDS, *parts, *(f"##{c}" for c in parts)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=False)
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.decoder = decoders.WordPiece()
    return wrapped(core, "<s> $A </s>")


TOKENIZERS = {
    "byte-level": byte_level,
    "byte-level, BOS": lambda: byte_level("<s> $A"),
    "byte-level, EOS": lambda: byte_level("$A </s>"),
    "byte-level, BOS and EOS": lambda: byte_level("<s> $A </s>"),
    "byte-level, tokens across words": lambda: byte_level(joining=("isĠRome", "ĠRome.", ":ĠRome")),
    "Llama 2": llama,
    "Unigram, EOS": unigram,
    "Unigram, BOS": lambda: unigram("<s> $A"),
    "WordPiece": word_piece,
}
LOSSY = ("WordPiece",)  # no line breaks, one space for several


# ---- templates -----------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n"
    "{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "<turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
# The last answer opens with thoughts; earlier ones lose theirs. With enable_thinking=False the
# policy's turn opens with empty thoughts that a dialogue does not show.
QWEN3 = (
    "{% if tools %}[tools: {{ tools | length }}]\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% set said = m['content'].split('</think>')[-1] %}"
    "{% if loop.last and '</think>' in m['content'] %}{{ m['content'] }}"
    "{% else %}{{ said }}{% endif %}{% else %}{{ m['content'] }}{% endif %}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NOT_EOS = CHATML.replace("eos_token", "'<|im_end|>'")
TEMPLATES = {
    "ChatML": CHATML,
    "Llama 3": LLAMA3,
    "Gemma": GEMMA,
    "Mistral": MISTRAL,
    "Qwen 3": QWEN3,
    "generation": GENERATION,
    "no EOS": NOT_EOS,
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return [{"role": "assistant", "content": text}]


ONE_TURN = [user("The capital is")]
TURNS = [user("The capital"), *assistant("is Rome"), user("is")]


def ways(prompt, completion, other, tokenizer, record=()):
    """The ids of a completion in every stage, by name."""
    record = dict(record)
    demonstration = {"prompt": prompt, "completion": completion, **record}
    shown = Dataset.from_list([demonstration])
    sft, _ = render_demonstrations(shown, tokenizer, SFTConfig(max_length=None))
    pair = {"prompt": prompt, "chosen": completion, "rejected": other, **record}
    ranking = {"prompt": prompt, "responses": [other, completion], "ranks": [2, 1], **record}
    ranked = tokenize_ranking(ranking, 0, tokenizer=tokenizer, max_length=None)
    columns = {name: [value] for name, value in record.items()}
    (opening,) = render_prompts([prompt], tokenizer, columns)
    sampled = render(prompt, completion, tokenizer, record).completion
    given = ([prompt], [completion], tokenizer)
    (measured,) = demonstration_tokens(shown, tokenizer, None)
    return {
        "sft": sft["input_ids"][0],
        "rm, pairs": tokenize_pair(pair, 0, tokenizer)["chosen_ids"],
        "rm, rankings": ranked["response_ids"][1],
        "ppo": opening + sampled,
        "scored": reward_rows(*given, columns=columns)[0],
        "scored, sampled ids": reward_rows(*given, [ended(sampled, tokenizer)], columns)[0],
        "measured": [*measured[0], *measured[1]],
    }, sft["completion_mask"][0]


def ended(ids, tokenizer):
    """A completion up to its EOS, as a policy samples it."""
    end = tokenizer.eos_token_id
    return ids[: ids.index(end) + 1] if end in ids else ids


def check(prompt, completion, other, tokenizer, record=()):
    found, mask = ways(prompt, completion, other, tokenizer, record)
    expected = found.pop("sft")
    assert {name: ids for name, ids in found.items() if ids != expected} == {}
    opening = render_prompt(prompt, tokenizer, dict(record))
    assert mask == [0] * len(opening) + [1] * (len(expected) - len(opening))
    assert opening[-1] != tokenizer.eos_token_id or isinstance(prompt, list)
    return expected[len(opening) :]


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    made = TOKENIZERS[request.param]()
    made.family = request.param
    return made


@pytest.mark.parametrize("prompt", ["The capital is", "The capital is ", "Q: The capital\nA:"])
def test_texts_are_the_same_ids_everywhere(tokenizer, prompt):
    for completion, other in ((" Rome.", " Oslo"), ("Rome", "Oslo."), (" Rome is", "x")):
        ids = check(prompt, completion, other, tokenizer)
        assert ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1
        if tokenizer.family not in LOSSY:
            whole = tokenizer.decode(render_prompt(prompt, tokenizer) + ids)
            assert whole.removeprefix("<s>").strip() == f"{prompt}{completion}</s>"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", [ONE_TURN, TURNS], ids=["one turn", "several"])
def test_messages_are_the_same_ids_everywhere(tokenizer, template, prompt):
    tokenizer.chat_template = TEMPLATES[template]
    check(prompt, assistant("Rome."), assistant("Oslo"), tokenizer)


@pytest.mark.parametrize("thinking", [None, False])
def test_thoughts_and_tools_are_the_same_ids_everywhere(tokenizer, thinking):
    tokenizer.chat_template = QWEN3
    tools = [{"type": "function", "function": {"name": "now", "description": None}}]
    record = {"tools": json.dumps(tools)}
    if thinking is not None:
        record["chat_template_kwargs"] = {"enable_thinking": thinking}
    said = assistant("<think>hm</think>Rome" if thinking is None else "Rome")
    check(ONE_TURN, said, assistant("Oslo"), tokenizer, record)
    opening = tokenizer.decode(render_prompt(ONE_TURN, tokenizer, record))
    if tokenizer.family not in LOSSY:
        assert "[tools: 1]" in opening
        assert ("</think>" in opening) is (thinking is False)


@pytest.mark.parametrize("text", [" Rome.", "Rome.", " Rome is", " Oslo"])
def test_the_text_of_what_was_sampled(tokenizer, text):
    """A space that a completion begins with is kept, and the text gives its ids again."""
    prompt = "The capital is"
    rendered = render(prompt, text, tokenizer)
    own = rendered.completion[:-1]
    (back,) = completion_texts([own], tokenizer)
    if tokenizer.family not in LOSSY:
        assert back == text
    assert render(prompt, back, tokenizer).ids == rendered.ids
    assert completion_texts([rendered.completion], tokenizer) == [back]


def test_ids_that_no_text_would_give_are_kept(tokenizer):
    """What the policy spelt otherwise than its tokenizer is read as it was sampled."""
    letters = [tokenizer(c, add_special_tokens=False)["input_ids"][-1] for c in "Rome"]
    (text,) = completion_texts([letters], tokenizer)
    (row,) = reward_rows(["The capital is"], [text], tokenizer, [letters])
    opening = render_prompt("The capital is", tokenizer)
    assert row == [*opening, *letters, tokenizer.eos_token_id]


# ---- what a template refuses ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "messages", "told"),
    [
        (GEMMA, [{"role": "system", "content": "x"}, user("y")], "system, user: System role not"),
        (MISTRAL, [user("x"), user("y")], "user, user: Conversation roles must alternate"),
        (None, [user("x")], "the tokenizer has no chat template"),
    ],
)
def test_messages_that_the_template_refuses(template, messages, told):
    tokenizer = byte_level()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=f"Prompt 2: .*{told}"):
        render_prompts([ONE_TURN if template else "x", messages], tokenizer)


def test_a_template_that_hides_the_reply():
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: hidden\n{% endfor %}"
        "{% if add_generation_prompt %}go on:{% endif %}"
    )
    with pytest.raises(InputError, match="the reply's text is not in it"):
        render(ONE_TURN, assistant("Rome"), tokenizer)


@pytest.mark.parametrize(
    "template",
    [
        "hello",
        "{% for m in messages %}{% if not (loop.last and m.role == 'assistant') %}{{ m.content }}"
        "{% endif %}{% endfor %}assistant\n",
    ],
)
def test_a_template_that_ends_before_the_reply(template):
    """Nothing would be trained on; both responses of a pair would be the same."""
    tokenizer = byte_level()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="the reply's text is not in it"):
        render(ONE_TURN, assistant("Rome"), tokenizer)


@pytest.mark.parametrize(
    ("template", "record", "told"),
    [
        (GEMMA, {"tools": "search, calc"}, "`tools` is a list"),
        (GEMMA, {"chat_template_kwargs": ["x"]}, "`chat_template_kwargs` an object"),
        (GEMMA, {"chat_template_kwargs": {"add_generation_prompt": False}}, "refuses the messages"),
        (GEMMA, {"chat_template_kwargs": {"continue_final_message": True}}, "refuses the messages"),
        ("{{ messages[0]['content'].index('|') }}", {}, "refuses the messages"),
        ({"tool_use": GEMMA}, {}, "refuses the messages"),
    ],
)
def test_what_ended_in_a_traceback(template, record, told):
    tokenizer = byte_level()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=told):
        render(ONE_TURN, assistant("Rome"), tokenizer, record)


def test_what_a_record_gives_its_template():
    tools = [{"name": "a", "parameters": {"b": {"type": "string", "enum": None}}}]
    given = {"tools": tools, "chat_template_kwargs": {"enable_thinking": False, "other": None}}
    expected = [{"name": "a", "parameters": {"b": {"type": "string"}}}]
    assert template_arguments(given) == {"tools": expected, "enable_thinking": False}
    assert template_arguments({"tools": [], "chat_template_kwargs": None}) == {}
    assert template_arguments({"tools": "", "chat_template_kwargs": '{"a": 1}'}) == {"a": 1}


def test_a_prompt_that_ends_with_eos(caplog):
    """Text is refused in training and sampling alike; a template that ends so is told."""
    tokenizer, chat_tokenizer = byte_tokenizer(), byte_tokenizer(chat_template=CHAT_TEMPLATE)
    for call in (
        lambda: render("Hi<eos>", "Hello", tokenizer),
        lambda: render_prompt("Hi<eos>", tokenizer),
        lambda: render_prompts(["Hi", "Hi<eos>"], tokenizer),
    ):
        with pytest.raises(InputError, match="the prompt ends with the EOS token '<eos>'"):
            call()
    assert render_prompt("<eos>", tokenizer) == [256]  # as GPT-2 begins a text
    render_prompts([[{"role": "user", "content": "Hi"}]], chat_tokenizer)
    assert not caplog.text
    bare = copy.copy(chat_tokenizer)
    bare.chat_template = "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    render_prompts([[{"role": "user", "content": "Hi"}]], bare)
    assert "1 prompts end with EOS" in caplog.text


def test_keywords_of_the_template_without_nulls():
    given = {"tools": '[{"name": "now"}]', "chat_template_kwargs": {"a": 1, "b": None}}
    assert template_arguments(given) == {"tools": [{"name": "now"}], "a": 1}
