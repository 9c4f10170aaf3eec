"""Which tokens a reward model reads: the policy's own where they are known, else its text's."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trl_instruct.rewards.combined import Clipped, LengthPenalty, WeightedSum
from trl_instruct.rewards.reward_model import RewardModel
from trl_instruct.rewards.tokens import reward_rows, same_tokenizer

SIZES = {"vocab_size": 259, "eos_token_id": 257, "pad_token_id": 258}
PAIR, EOS = 256, 257
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
# As Qwen3's: the last answer opens with thoughts that the generation prompt does not hold.
THINKING = TEMPLATE.replace("':' +", "':' + ('<think>' if m['role'] == 'assistant' else '') +")
# As Llama-3's, and as R1's: thoughts of earlier turns are left out.
TRIMMING = TEMPLATE.replace("m['content']", "m['content'] | trim")
FORGETTING = TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1]")
# The answer's role stands there otherwise than in the generation prompt.
SHOUTING = TEMPLATE.replace("m['role'][0] +", "m['role'][0].replace('a', 'A') +")


def merging_tokenizer(template=None):
    """The byte-level tokenizer of the other tests with one merge: "ab" is a token, 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: index for index, char in enumerate([*alphabet, "ab"])}
    core = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<eos>", "<pad>"])
    tokens = {"eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **tokens)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def merging():
    return merging_tokenizer()


@pytest.fixture
def scored(make_trainer, make_policy, make_reward_model, merging):
    """scored(completions, wrap, **PPOConfig options): PPO's scores of these token ids behind prompt
    0, and what its reward model gives the same ids; `wrap` makes the reward of the reward model."""

    def run(completions, wrap=lambda reward: reward, **options):
        judge = make_reward_model(seed=1, **SIZES)
        trainer = make_trainer(
            processing_class=merging,
            model=make_policy(**SIZES),
            value_model=make_reward_model(seed=2, **SIZES),
            reward_model=wrap(RewardModel(judge, merging_tokenizer())),
            **options,
        )
        rows = [0] * len(completions)
        width = max(map(len, completions))
        padded = [ids + [EOS] * (width - len(ids)) for ids in completions]
        rollout = trainer.sample(rows)._replace(
            completion_ids=torch.tensor(padded),
            completion_lengths=torch.tensor([len(ids) for ids in completions]),
            ended=torch.tensor([ids[-1] == EOS for ids in completions]),
        )
        with torch.no_grad():
            own = [judge(torch.tensor([trainer.prompts[0] + ids])) for ids in completions]
        return trainer.score(rollout, rows).scores, torch.cat([o.logits[0] for o in own])

    return run


@pytest.fixture
def spellings(merging):
    """ "cab" in the tokenizer's tokens and in others, both ended."""
    a, b, c = (merging(letter)["input_ids"][0] for letter in "abc")
    assert merging("cab")["input_ids"] == [c, PAIR]
    return [[c, PAIR, EOS], [c, a, b, EOS]]


def assert_same(scores, expected):
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


def as_plain(reward):
    """The reward, given texts alone."""
    return lambda prompts, completions: reward(prompts, completions)


@pytest.mark.slow
def test_the_ids_of_the_policy_have_the_score_of_their_text(scored, merging):
    texts = ["yes<eos>", "about a cab<eos>", "<eos>"]
    completions = [merging(text)["input_ids"] for text in texts]
    scores, of_ids = scored(completions)
    assert_same(scores, of_ids)
    of_texts, _ = scored(completions, as_plain)
    assert_same(scores, of_texts)
    assert of_ids.std() > 0.1


def test_a_completion_without_end_is_read_with_one(scored, merging):
    whole, _ = scored([merging("a cab<eos>")["input_ids"]])
    cut, _ = scored([merging("a cab")["input_ids"]])
    assert_same(cut, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [
        lambda reward: reward,
        lambda reward: WeightedSum([Clipped(reward, low=-99.0)]),
        lambda reward: WeightedSum([reward, LengthPenalty(0.0)]),
    ],
)
def test_what_the_policy_wrote_is_read_and_not_written_anew(scored, spellings, wrap):
    scores, of_ids = scored(spellings, wrap)
    assert_same(scores, of_ids)
    assert abs(of_ids[0] - of_ids[1]) > 0.01


@pytest.mark.slow
def test_a_reward_that_takes_no_ids_reads_the_text(scored, spellings):
    scores, of_ids = scored(spellings, as_plain)
    assert scores.tolist() == pytest.approx([float(of_ids[0])] * 2, abs=1e-5)


def test_without_its_stop_string_a_completion_is_read_as_text(scored, spellings, merging):
    """Both end in "b", the stop string: what is left, "ca", has the score of "ca" alone."""
    ca = [*merging("ca")["input_ids"], EOS]
    scores, of_ids = scored([*spellings, ca], stop_strings=["b"])
    assert scores.tolist() == pytest.approx([float(of_ids[2])] * 3, abs=1e-5)


def test_a_cut_prompt_is_read_whole(scored, spellings):
    """Two of the prompts are longer than 12 tokens; prompt 0 is not."""
    scores, of_ids = scored(spellings, max_prompt_length=12)
    assert_same(scores, of_ids)


def test_one_by_one_as_together(scored, spellings, merging):
    """A reward that fails on one completion is asked for each alone."""

    def failing(reward):
        def judge(prompts, completions, completion_ids):
            if "no" in completions:
                raise ValueError("no")
            return reward(prompts, completions, completion_ids)

        judge.parts = [reward]

        return judge

    no = merging("no<eos>")["input_ids"]
    scores, of_ids = scored([*spellings, no], failing, on_error="skip")
    assert scores[2].isnan()
    assert_same(scores[:2], of_ids[:2])


def spelt(tokenizer, text):
    """Tokens that are not those of the text: every letter by itself."""
    return [token for letter in text for token in tokenizer(letter)["input_ids"]]


def test_ids_of_another_text_are_not_read(merging):
    expected = [merging("one cab<eos>")["input_ids"]]
    for other in ("cat", "ca", "cabaa"):
        assert reward_rows(["one "], ["cab"], merging, [spelt(merging, other)]) == expected


def test_only_a_reward_model_with_the_same_tokenizer_reads_ids(
    make_reward_model, merging, tokenizer
):
    judge = RewardModel(make_reward_model(seed=1, **SIZES), merging_tokenizer())
    given = ["one "], ["cab"], [spelt(merging, "cab")]
    of_text = judge(*given[:2])
    assert judge(*given) == of_text  # nobody has said whose they are
    judge.ids_are_of(merging)
    assert judge(*given) != pytest.approx(of_text, abs=1e-3)
    judge.ids_are_of(tokenizer)
    assert judge(*given) == of_text


def test_each_completion_for_itself(merging):
    start, ids = merging("one ")["input_ids"], [merging("cab")["input_ids"], spelt(merging, "cab")]
    rows = reward_rows(["one "] * 2, ["cab", "cab"], merging, ids)
    assert rows == [merging("one cab<eos>")["input_ids"], [*start, *spelt(merging, "cab"), EOS]]
    assert reward_rows([], [], merging, []) == []


@pytest.mark.parametrize("end", [[], [EOS]])
def test_what_ended_a_completion_may_be_among_its_ids(merging, end):
    (row,) = reward_rows(["one "], ["cab"], merging, [[*spelt(merging, "cab"), *end]])
    assert row == [*merging("one ")["input_ids"], *spelt(merging, "cab"), EOS]


def row_of(template, text, ids=None, role="assistant", before=()):
    """What a reward model reads of one message behind "hi", and its tokenizer."""
    tokenizer = merging_tokenizer(template)
    prompt = [{"role": "user", "content": "hi"}]
    ids = spelt(tokenizer, text) if ids is None else ids
    (row,) = reward_rows([prompt], [[*before, {"role": role, "content": text}]], tokenizer, [ids])
    return row, tokenizer


def test_messages_are_closed_by_the_template():
    row, tokenizer = row_of(TEMPLATE, "cab")
    assert tokenizer.decode(row) == "u:hi<eos>\na:cab<eos>\n"
    assert PAIR not in row


@pytest.mark.parametrize(
    ("template", "text", "read"),
    [
        (THINKING, "cab", "u:hi<eos>\na:<think>cab<eos>\n"),
        (TRIMMING, " cab ", "u:hi<eos>\na:cab<eos>\n"),
        (FORGETTING, "hm</think>cab", "u:hi<eos>\na:cab<eos>\n"),
    ],
)
def test_a_template_that_shows_a_completion_otherwise(template, text, read):
    row, tokenizer = row_of(template, text)
    assert row == tokenizer(read)["input_ids"]
    assert PAIR in row


def test_a_template_that_opens_a_policys_turn_differently():
    """The policy wrote after "a:", so that is what the reward model reads, and SFT trains on."""
    row, tokenizer = row_of(SHOUTING, "cab")
    assert tokenizer.decode(row) == "u:hi<eos>\na:cab<eos>\n"
    assert PAIR not in row


def test_more_than_the_assistants_message():
    system = {"role": "system", "content": "ab"}
    for changed in ({"role": "user"}, {"before": [system]}):
        row, tokenizer = row_of(TEMPLATE, "cab", **changed)
        opening = "u:hi<eos>\n" + ("s:ab<eos>\na:" if "before" in changed else "u:")
        assert row == tokenizer(f"{opening}cab<eos>\n")["input_ids"]


def test_special_tokens_that_the_text_does_not_show(scored, merging):
    pad = merging.pad_token_id
    shown = merging("cab")["input_ids"]
    scores, of_ids = scored([[*shown, EOS], [*shown, pad, pad, EOS]])
    assert scores.tolist() == pytest.approx([float(of_ids[0])] * 2, abs=1e-5)
    assert abs(of_ids[0] - of_ids[1]) > 0.01


def test_a_tokenizer_that_ends_every_text_with_eos(merging):
    """The EOS that it appends to a prompt is left out: it would end the completion."""
    ending = merging_tokenizer()
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "$A <eos>", special_tokens=[("<eos>", EOS)]
    )
    assert ending("one ")["input_ids"][-1] == EOS
    (row,) = reward_rows(["one "], ["cab"], ending, [spelt(merging, "cab")])
    assert row == [*merging("one ")["input_ids"], *spelt(merging, "cab"), EOS]


def test_which_tokenizers_are_the_same(merging, tokenizer, tmp_path):
    merging.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    again(["a", "long one"], padding=True, truncation=True, max_length=2)
    assert same_tokenizer(merging, merging)
    again.pad_token = "<eos>"  # no text or message has any
    assert same_tokenizer(merging, again)
    assert not same_tokenizer(merging, tokenizer)
    again.chat_template = TEMPLATE
    assert not same_tokenizer(merging, again)
    again.chat_template = None
    assert same_tokenizer(merging, again)
    again.bos_token = "<eos>"
    assert not same_tokenizer(merging, again)
    again.bos_token = None
    again.add_tokens(["new"])
    assert not same_tokenizer(merging, again)
