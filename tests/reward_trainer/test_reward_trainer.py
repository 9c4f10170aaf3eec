"""The ranking trainer: the paper's batch element gives what the pairs of each prompt give."""

import pytest
import torch
import trl
from conftest import byte_tokenizer
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from torch.nn.attention import flex_attention
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations import flex_attention as transformers_flex

from trl_instruct.configs import RewardConfig
from trl_instruct.data.pairs import rankings_to_pairs
from trl_instruct.errors import InputError
from trl_instruct.reward_trainer import prefix, prefix_scores
from trl_instruct.reward_trainer.batches import RankingCollator
from trl_instruct.reward_trainer.trainer import RankingRewardTrainer
from trl_instruct.rewards.reward_model import RewardModel

ASKED = "what would you answer to that, or to this? "
RANKINGS = [
    {"prompt": f"a: {ASKED}", "responses": ["yes", "no way", "maybe so"], "ranks": [1, 3, 2]},
    {"prompt": f"a longer one: {ASKED * 2}", "responses": ["x", "y z"], "ranks": [2, 1]},
    {"prompt": f"tied: {ASKED}", "responses": ["p", "q", "r r", "s"], "ranks": [1, 1, 2, 3]},
]
PAIRS = [{"prompt": ASKED, "chosen": "yes", "rejected": f"no{' no' * n}"} for n in range(5)]
FORWARDS = ["shared_prefix", "grouped", "pairs"]
KINDS = ["llama", "qwen3", "gpt_neox", "gpt2", "opt"]


def trainer_for(model, folder, rankings=RANKINGS, tokenizer=None, evals=None, **options):
    given = {n: options.pop(n) for n in ("forward", "peft_config") if n in options}
    config_class = options.pop("config_class", RewardConfig)
    settings = {
        **{"output_dir": str(folder), "per_device_train_batch_size": 4, "max_length": 128},
        **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, **options},
        **{"save_strategy": "no", "report_to": "none", "disable_tqdm": True},
    }
    config = config_class(**settings)
    return RankingRewardTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rankings) if isinstance(rankings, list) else rankings,
        eval_dataset=evals,
        processing_class=tokenizer or byte_tokenizer(),
        **given,
    )


def batch_of(trainer):
    return next(iter(trainer.get_train_dataloader()))


def loss_and_gradients(trainer):
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.item(), {name: p.grad for name, p in named if p.grad is not None}


def assert_alike(results):
    """The same loss and gradients, which are large enough for that to mean something."""
    (loss, gradients), *others = results
    assert max(g.abs().max() for g in gradients.values()) > 0.05
    for other_loss, other_gradients in others:
        assert other_loss == pytest.approx(loss, abs=1e-5)
        assert other_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(other_gradients[name], gradient, atol=1e-5, rtol=1e-5)


@pytest.fixture
def forwards(monkeypatch):
    """The shapes of the shared rows that models were given, `(B, S)`."""
    seen = []
    real = prefix_scores._forward_shared

    def spy(model, bare, shared, *given):
        seen.append(tuple(shared.input_ids.shape))
        return real(model, bare, shared, *given)

    monkeypatch.setattr(prefix_scores, "_forward_shared", spy)
    return seen


@pytest.fixture
def split(monkeypatch):
    """Prompts are shared without a mask, in short rows too."""
    monkeypatch.setattr(prefix_scores, "SPLIT_FROM", 0)
    monkeypatch.setattr(prefix, "prefix_mask", None)


def score_alone(model, tokenizer, prompt, response):
    ids = tokenizer(prompt + response + tokenizer.eos_token, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits.item()


def log_sigmoid(x):
    return torch.nn.functional.logsigmoid(torch.tensor(x)).item()


# ---- the three forwards --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_three_forwards_give_the_same_loss_and_gradients(
    make_reward_model, tmp_path, forwards, kind, pad
):
    results = []
    for forward in FORWARDS:
        tokenizer = byte_tokenizer(pad)
        tokenizer.padding_side = "right" if forward == "grouped" else "left"
        options = {"forward": forward, "tokenizer": tokenizer}
        trainer = trainer_for(make_reward_model(kind), tmp_path, **options)
        results.append(loss_and_gradients(trainer))
        assert trainer.forward == forward
    assert len(forwards) == 2  # the check at the start, and the batch
    assert forwards[1][0] == 3
    assert_alike(results)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [False, True])
def test_without_a_mask_too(make_reward_model, tmp_path, split, forwards, kind, lora):
    """With gradient checkpointing, where layers run again after the forward pass, and adapters."""
    results = []
    for forward in ("grouped", "shared_prefix"):
        options = {"forward": forward, "gradient_checkpointing": True}
        if lora:
            options["peft_config"] = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")
        torch.manual_seed(0)
        trainer = trainer_for(make_reward_model(kind), tmp_path, **options)
        results.append(loss_and_gradients(trainer))
        assert trainer.forward == forward
    assert [shape[0] for shape in forwards] == [1, 3]  # the check at the start, and the batch
    assert_alike(results)


def test_long_rows_need_no_mask(reward_model, tmp_path, monkeypatch):
    """By default, and though with a mask it would pay to compute these responses apart."""
    monkeypatch.setattr(prefix, "prefix_mask", None)
    rankings = [{"prompt": ASKED, "responses": [c * 80 for c in "xyz"], "ranks": [1, 2, 3]}]
    trainers = [trainer_for(reward_model, tmp_path, rankings, forward=f) for f in FORWARDS[:2]]
    losses = [t.compute_loss(t.model, batch_of(t)).item() for t in trainers]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert trainers[0].forward == "shared_prefix"
    assert trainers[0].model.config._attn_implementation == prefix_scores.SPLIT


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """FlexAttention by its plain formula, with the backward pass that its kernels lack on CPU."""

    def formula(query, key, value, training=False, **kwargs):
        return flex_attention.flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda query, key, value: None)
    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", formula)
    monkeypatch.setattr(prefix, "prefix_mask", None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "opt"])
def test_with_flex_attention_too(make_reward_model, tmp_path, flex_on_cpu, forwards, kind):
    """Also where what the mask hides would be too much to compute first."""
    long = {"prompt": ASKED, "responses": [c * 80 for c in "xyz"], "ranks": [1, 2, 3]}
    for rankings, rows in ((RANKINGS, 3), ([long], 1)):
        results = []
        for attention, forward in (("sdpa", "grouped"), ("flex_attention", "shared_prefix")):
            model = make_reward_model(kind)
            model.set_attn_implementation(attention)
            trainer = trainer_for(model, tmp_path, rankings, forward=forward)
            results.append(loss_and_gradients(trainer))
            assert trainer.forward == forward
        assert len(forwards) == 2  # the check at the start, and the batch
        assert forwards.pop()[0] == rows
        forwards.clear()
        assert_alike(results)


@pytest.mark.parametrize("forward", FORWARDS)
def test_the_loss_is_that_of_each_text_scored_alone(reward_model, tokenizer, tmp_path, forward):
    trainer = trainer_for(reward_model, tmp_path, forward=forward)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer)).item()
    per_prompt = []
    for record in RANKINGS:
        scored = [
            (rank, score_alone(reward_model, tokenizer, record["prompt"], response))
            for rank, response in zip(record["ranks"], record["responses"], strict=True)
        ]
        pairs = [(a, b) for rank, a in scored for other, b in scored if rank < other]
        per_prompt.append(sum(-log_sigmoid(a - b) for a, b in pairs) / len(pairs))
    assert loss == pytest.approx(sum(per_prompt) / 3, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("forward", FORWARDS)
def test_trls_own_trainer_gives_the_same_on_the_pairs(make_reward_model, tmp_path, forward):
    """With as many pairs for every prompt, its mean over pairs is the mean over prompts."""
    rankings = [{**RANKINGS[0], "prompt": ASKED * n} for n in (1, 2)]
    stock = trl.RewardTrainer(
        model=make_reward_model(),
        args=trl.RewardConfig(
            **{"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "report_to": "none"},
            **{"per_device_train_batch_size": 6, "center_rewards_coefficient": 0.05},
        ),
        train_dataset=rankings_to_pairs(Dataset.from_list(rankings)),
        processing_class=byte_tokenizer(),
    )
    options = {"forward": forward, "center_rewards_coefficient": 0.05}
    ours = trainer_for(make_reward_model(), tmp_path, rankings, **options)
    assert_alike([loss_and_gradients(stock), loss_and_gradients(ours)])


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_they_train_alike_with_checkpointing_and_adapters(make_reward_model, tmp_path, lora):
    """As TRL does by default: gradient checkpointing is on."""
    weights = []
    for forward in FORWARDS:
        options = {"forward": forward, "learning_rate": 0.1, "max_steps": 3}
        if lora:
            kinds = {"task_type": "SEQ_CLS", "target_modules": "all-linear"}
            options["peft_config"] = LoraConfig(**kinds, modules_to_save=["score"])
        options |= {"gradient_checkpointing": True, "optim": "sgd", "batch_by_length": False}
        trainer = trainer_for(make_reward_model("gpt2"), tmp_path, RANKINGS * 4, **options)
        start = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
        named = trainer.model.named_parameters()
        weights.append({name: p.detach() for name, p in named if p.requires_grad})
        assert max((p - start[n]).abs().max() for n, p in weights[-1].items()) > 0.01
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("split_from", [0, 256])
def test_in_bfloat16(make_reward_model, tmp_path, forwards, monkeypatch, split_from):
    monkeypatch.setattr(prefix_scores, "SPLIT_FROM", split_from)
    trainers = [
        trainer_for(make_reward_model(), tmp_path, forward=forward, bf16=True)
        for forward in FORWARDS[:2]
    ]
    losses = [trainer.train().training_loss for trainer in trainers]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert trainers[0].forward == "shared_prefix"
    assert len(forwards) > 1


def test_responses_with_nothing_in_common_run_apart(reward_model, tmp_path, forwards):
    rankings = [{"prompt": "", "responses": ["a" * 60, "b" * 60], "ranks": [1, 2]}]
    trainer = trainer_for(reward_model, tmp_path, rankings)
    trainer.compute_loss(trainer.model, batch_of(trainer))
    assert trainer.forward == "shared_prefix"
    assert len(forwards) == 1  # the check only


def test_an_unknown_forward(reward_model, tmp_path):
    with pytest.raises(InputError, match=r"forward='prefix'; one of shared_prefix, grouped, pairs"):
        trainer_for(reward_model, tmp_path, forward="prefix")


# ---- models that cannot share --------------------------------------------------------------------


def classifier(kind, **options):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 1},
        **{"vocab_size": 258, "pad_token_id": 257, "initializer_range": 0.3, **options},
    )
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bloom", "mistral"])
def test_who_cannot_share_says_so_once_and_is_exact(tmp_path, caplog, kind):
    options = (
        {"sliding_window": 20, "intermediate_size": 32, "num_key_value_heads": 2}
        if kind == "mistral"
        else {}
    )
    trainer = trainer_for(classifier(kind, **options), tmp_path)
    results = [loss_and_gradients(trainer)]
    assert trainer.forward == "grouped"
    trainer.compute_loss(trainer.model, batch_of(trainer))
    said = [record.message for record in caplog.records if "shared_prefix" in record.message]
    assert len(said) == 1
    assert type(trainer.model).__name__ in said[0]
    pairs = trainer_for(classifier(kind, **options), tmp_path, forward="pairs")
    assert_alike([*results, loss_and_gradients(pairs)])


@pytest.mark.slow
def test_the_check_uses_the_longest_ranking_of_training_and_evaluation(tmp_path, caplog):
    """A window that is long enough for the training data, and not for what is evaluated later."""
    long = [{**RANKINGS[0], "prompt": ASKED * 2}]
    options = {"sliding_window": 60, "intermediate_size": 32, "num_key_value_heads": 2}
    trainer = trainer_for(classifier("mistral", **options), tmp_path, RANKINGS[:1])
    trainer.compute_loss(trainer.model, batch_of(trainer))
    assert trainer.forward == "shared_prefix"
    measured = trainer.evaluate(Dataset.from_list(long))["eval_loss"]
    assert trainer.forward == "grouped"
    assert "attends to 60 tokens" in caplog.text
    again = trainer_for(classifier("mistral", **options), tmp_path, RANKINGS[:1], forward="pairs")
    assert again.evaluate(Dataset.from_list(long))["eval_loss"] == pytest.approx(measured)
    short = RANKINGS[:1]
    for rankings, evals in ((short, long), (short + long + short, short)):
        given = {"evals": Dataset.from_list(evals), "per_device_train_batch_size": 1}
        trainer = trainer_for(classifier("mistral", **options), tmp_path, rankings, **given)
        trainer.compute_loss(trainer.model, batch_of(trainer))
        assert trainer.forward == "grouped"


def test_the_check_leaves_the_mode_as_it_was(reward_model, tmp_path):
    trainer = trainer_for(reward_model, tmp_path)
    for mode in (True, False):
        trainer._checked = False
        trainer.model.train(mode)
        trainer.compute_loss(trainer.model, batch_of(trainer))
        assert all(module.training is mode for module in trainer.model.modules())


# ---- weights, ties, averages ---------------------------------------------------------------------


@pytest.mark.slow
def test_average_over_pairs_and_weights(reward_model, tokenizer, tmp_path):
    rankings = [{**r, "weight": w} for r, w in zip(RANKINGS, [1.0, 2.0, 5.0], strict=True)]

    def measured(records, **options):
        trainer = trainer_for(reward_model, tmp_path, records, **options)
        return trainer.compute_loss(trainer.model, batch_of(trainer)).item()

    each = [measured([record]) for record in RANKINGS]
    counts, weights = [3, 1, 5], [1, 2, 5]  # of the third ranking's six pairs one is a tie
    weighted = sum(w * x for w, x in zip(weights, each, strict=True)) / sum(weights)
    assert measured(rankings) == pytest.approx(weighted, rel=1e-5)
    over_pairs = sum(n * x for n, x in zip(counts, each, strict=True)) / sum(counts)
    assert measured(RANKINGS, average_over="pairs") == pytest.approx(over_pairs, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"average_over": "pairs"}])
def test_how_a_step_is_cut_changes_nothing(make_reward_model, tmp_path, options):
    rankings = [
        {**r, "weight": w} for r, w in zip(RANKINGS + RANKINGS[:1], [1, 2, 5, 3], strict=True)
    ]
    weights = []
    for size in (4, 1):
        trainer = trainer_for(
            make_reward_model(),
            tmp_path,
            rankings,
            **{"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size},
            **{"optim": "sgd", "learning_rate": 1e-2, "max_steps": 1, **options},
        )
        trainer.train()
        weights.append({n: p.detach() for n, p in trainer.model.named_parameters()})
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("forward", FORWARDS)
def test_ties_can_count_half(make_reward_model, tmp_path, forward):
    tied = [{"prompt": ASKED, "responses": ["yes", "no"], "ranks": [1, 1]}]
    dropped = trainer_for(make_reward_model(), tmp_path, [*RANKINGS, *tied], forward=forward)
    assert len(dropped.train_dataset) == 3
    trainer = trainer_for(make_reward_model(), tmp_path, tied, forward=forward, ties="half")
    loss, _ = loss_and_gradients(trainer)
    better, worse = RewardModel(make_reward_model(), byte_tokenizer())([ASKED] * 2, ["yes", "no"])
    expected = -(log_sigmoid(better - worse) + log_sigmoid(worse - better)) / 2
    assert loss == pytest.approx(expected, rel=1e-5)


# ---- data ----------------------------------------------------------------------------------------


def test_collator_pads_responses_and_ranks():
    batch = RankingCollator(pad_token_id=9, pad_to_multiple_of=4)(
        [
            {"response_ids": [[1, 2], [3]], "ranks": [2, 1], "weight": 0.5},
            {"response_ids": [[4], [5], [6, 7]], "ranks": [1, 2, 3], "weight": 1.5},
        ]
    )
    expected = [[1, 2, 9, 9], [3, 9, 9, 9], [4, 9, 9, 9], [5, 9, 9, 9], [6, 7, 9, 9]]
    assert batch["input_ids"].tolist() == expected
    assert batch["attention_mask"].sum(dim=1).tolist() == [2, 1, 1, 1, 2]
    assert batch["ranks"].tolist() == [[2, 1, 0], [1, 2, 3]]
    assert batch["weight"].tolist() == [0.5, 1.5]


def test_overlong_response_is_left_out_and_counted(reward_model, tmp_path):
    long = {"prompt": "b: ", "responses": ["x", "long " * 40, "y"], "ranks": [1, 2, 3]}
    useless = {"prompt": "c: ", "responses": ["x", "long " * 40], "ranks": [1, 2]}
    trainer = trainer_for(reward_model, tmp_path, [*RANKINGS, long, useless])
    assert trainer.overlong == 2
    assert trainer.train_dataset["ranks"][3] == [1, 3]
    assert len(trainer.train_dataset) == 4


def test_a_prompt_that_is_too_long_loses_its_beginning(reward_model, tokenizer, tmp_path):
    long = {"prompt": "long " * 40, "responses": ["x", "y " * 10, "z" * 199], "ranks": [1, 2, 3]}
    trainer = trainer_for(reward_model, tmp_path, [*RANKINGS, long], truncate_prompt=True)
    assert (trainer.truncated, trainer.overlong) == (1, 1)
    kept = [tokenizer.decode(row) for row in trainer.train_dataset["response_ids"][3]]
    prompt = ("long " * 40)[-107:]  # 107 + 20 + EOS = 128
    assert kept == [prompt + "x<eos>", prompt + "y " * 10 + "<eos>"]


def test_batches_hold_rankings_of_similar_length(reward_model, tmp_path):
    rankings = [
        {"prompt": "p" * (5 * (n % 4)), "responses": ["x", "y"], "ranks": [1, 2]} for n in range(32)
    ]

    def widths(**options):
        trainer = trainer_for(reward_model, tmp_path, rankings, **options)
        lengths = [batch["attention_mask"].sum(dim=1) for batch in trainer.get_train_dataloader()]
        return [len(set(length.tolist())) for length in lengths]

    assert set(widths()) == {1}
    assert max(widths(batch_by_length=False)) > 1
    assert widths(train_sampling_strategy="sequential") == [4] * 8


@pytest.mark.slow
@pytest.mark.parametrize(("train", "pad"), [(RANKINGS, "<pad>"), (PAIRS, "<eos>")])
def test_evaluation_on_rankings_and_pairs(reward_model, tmp_path, train, pad):
    evals = {"rankings": Dataset.from_list(RANKINGS), "pairs": Dataset.from_list(PAIRS)}
    tokenizer = byte_tokenizer(pad)
    options = {"learning_rate": 1e-3, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer = trainer_for(reward_model, tmp_path, train, tokenizer, evals, **options)
    trainer.train()
    found = {name: trainer.evaluate(name, metric_key_prefix=f"eval_{name}") for name in evals}
    logged = [log for log in trainer.state.log_history if "eval_pairs_loss" in log]
    assert len(logged) == 3
    reward = RewardModel(trainer.model, tokenizer)
    prompts = [row["prompt"] for row in PAIRS]
    better = reward(prompts, [row["chosen"] for row in PAIRS])
    worse = reward(prompts, [row["rejected"] for row in PAIRS])
    losses = [-log_sigmoid(a - b) for a, b in zip(better, worse, strict=True)]
    assert found["pairs"]["eval_pairs_loss"] == pytest.approx(sum(losses) / 5, rel=1e-5)
    one = trainer.evaluate(Dataset.from_list(RANKINGS))["eval_loss"]
    assert found["rankings"]["eval_rankings_loss"] == pytest.approx(one)
    assert trainer.evaluate(trainer.eval_dataset["rankings"])["eval_loss"] == pytest.approx(one)


@pytest.mark.slow
def test_rewards_are_logged_over_responses_and_accuracy_over_pairs(make_reward_model, tmp_path):
    """5 responses, 4 pairs; equal scores count one half, as in `evaluate_reward`."""
    model, rankings = make_reward_model(), Dataset.from_list(RANKINGS[:2])
    trainer = trainer_for(model, tmp_path, rankings)
    scores = [
        score_alone(model, byte_tokenizer(), record["prompt"], response)
        for record in RANKINGS[:2]
        for response in record["responses"]
    ]
    logged = trainer.evaluate(rankings)
    names = ("eval_min_reward", "eval_mean_reward", "eval_max_reward")
    expected = [min(scores), sum(scores) / 5, max(scores)]
    assert [logged[name] for name in names] == pytest.approx(expected, rel=1e-5)
    torch.nn.init.zeros_(model.score.weight)
    equal = trainer.evaluate(rankings)
    assert (equal["eval_accuracy"], equal["eval_margin"]) == (0.5, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rankings", "pairs"])
def test_evaluation_is_over_pairs_whatever_the_batch(reward_model, tmp_path, kind):
    """Rankings have 1 to 5 comparisons each; the last batch is smaller."""
    rows = [*RANKINGS, {"prompt": "b", "responses": ["u", "v"], "ranks": [1, 2]}]
    if kind == "pairs":
        rows = PAIRS
    found = []
    for size in (1, 3, 4):
        trainer = trainer_for(reward_model, tmp_path, per_device_eval_batch_size=size)
        found.append(trainer.evaluate(Dataset.from_list(rows)))
        again = trainer.evaluate(Dataset.from_list(rows))
        assert again["eval_accuracy"] == found[-1]["eval_accuracy"]
    names = ("accuracy", "margin", "min_reward", "mean_reward", "max_reward", "loss")
    measured = [[one[f"eval_{name}"] for name in names] for one in found]
    assert measured[1] == pytest.approx(measured[0], abs=1e-5)
    assert measured[2] == pytest.approx(measured[0], abs=1e-5)
    reward = RewardModel(reward_model, byte_tokenizer())
    if kind == "pairs":
        rows = [{**r, "responses": [r["chosen"], r["rejected"]], "ranks": [1, 2]} for r in rows]
    scores = [reward([r["prompt"]] * len(r["responses"]), r["responses"]) for r in rows]
    margins = [
        own[i] - own[j]
        for own, row in zip(scores, rows, strict=True)
        for i, rank in enumerate(row["ranks"])
        for j, other in enumerate(row["ranks"])
        if rank < other
    ]
    every = [score for own in scores for score in own]
    expected = [sum(m > 0 for m in margins) / len(margins), sum(margins) / len(margins)]
    expected += [min(every), sum(every) / len(every), max(every)]
    assert measured[0][:5] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("forward", FORWARDS)
def test_predictions_are_the_scores_of_the_responses(reward_model, tmp_path, forward):
    trainer = trainer_for(reward_model, tmp_path, forward=forward, per_device_eval_batch_size=2)
    given = trainer.predict(trainer.train_dataset).predictions
    assert given.shape == (3, 4)
    for record, scores in zip(RANKINGS, given, strict=True):
        count = len(record["responses"])
        prompts = [record["prompt"]] * count
        expected = RewardModel(reward_model, byte_tokenizer())(prompts, record["responses"])
        assert scores[:count].tolist() == pytest.approx(expected, abs=1e-5)
        assert set(scores[count:].tolist()) <= {-100.0}


@pytest.mark.slow
@pytest.mark.parametrize("records", [RANKINGS, PAIRS], ids=["rankings", "pairs"])
def test_streams_train(reward_model, tmp_path, records):
    def stream():
        yield from records * 4

    options = {"max_steps": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-3}
    trainer = trainer_for(reward_model, tmp_path, IterableDataset.from_generator(stream), **options)
    assert trainer.train().training_loss > 0
    assert trainer.forward == "shared_prefix"


def test_a_stream_does_not_tell_the_number_of_pairs(reward_model, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(RANKINGS))
    with pytest.raises(InputError, match="average_over='pairs' needs the number of all pairs"):
        trainer_for(reward_model, tmp_path, stream, average_over="pairs")


# ---- use -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns_the_order(reward_model, tmp_path):
    options = {"learning_rate": 3e-3, "max_steps": 30, "logging_steps": 1}
    strict = [record for record in RANKINGS if len(set(record["ranks"])) == len(record["ranks"])]
    trainer = trainer_for(reward_model, tmp_path, strict, **options)
    trainer.train()
    history = [log for log in trainer.state.log_history if "accuracy" in log]
    assert history[-1]["accuracy"] == 1.0
    assert history[-1]["loss"] < 0.1 < 0.5 < history[0]["loss"]
    assert {"margin", "min_reward", "mean_reward", "max_reward", "num_tokens"} <= history[0].keys()


@pytest.mark.slow
@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_what_is_trained_is_what_plain_transformers_loads(make_reward_model, tmp_path, pad):
    """The scores of training, of our reward and of a plain classifier are the same numbers."""
    options = {"tokenizer": byte_tokenizer(pad), "learning_rate": 1e-3}
    trainer = trainer_for(make_reward_model("gpt2"), tmp_path, RANKINGS[:1], **options)
    trainer.train()
    trainer.save_model()
    prompts, responses = [RANKINGS[0]["prompt"]] * 3, RANKINGS[0]["responses"]
    expected = torch.tensor(RewardModel(trainer.model, byte_tokenizer(pad))(prompts, responses))
    predicted = trainer.predict(trainer.train_dataset).predictions[0]
    torch.testing.assert_close(torch.tensor(predicted), expected)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    loaded = RewardModel(plain, tokenizer)(prompts, responses)
    torch.testing.assert_close(torch.tensor(loaded), expected)
    alone = [score_alone(plain, tokenizer, p, r) for p, r in zip(prompts, responses, strict=True)]
    torch.testing.assert_close(torch.tensor(alone), expected)
    texts = [p + r + "<eos>" for p, r in zip(prompts, responses, strict=True)]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    batch.pop("token_type_ids", None)
    if pad == "<pad>":
        with torch.no_grad():
            torch.testing.assert_close(plain(**batch).logits.squeeze(-1), expected)
    else:
        with pytest.raises(ValueError, match="no padding token"):
            plain(**batch)


@pytest.mark.slow
def test_trls_own_config_will_do(reward_model, tmp_path):
    trainer = trainer_for(reward_model, tmp_path, config_class=trl.RewardConfig, max_steps=1)
    assert trainer.train().training_loss > 0
    assert trainer.forward == "shared_prefix"
