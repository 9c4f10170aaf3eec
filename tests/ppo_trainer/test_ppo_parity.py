"""Our PPO and TRL's own, the same completions: every number of at least three iterations.

Where TRL's trainer is as ours: completions of one length, one minibatch, pad != eos, no clipping of
gradients, a constant learning rate (our schedules are one step ahead: none begins at 0). Behind
completions of different length TRL counts one token more; what that changes, and what it does not,
stands at the end. The models are float64, so that rounding stays far below the tolerance on any
processor.
"""

import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import Dataset
from transformers import TrainerCallback

import trl_instruct.ppo_trainer.trainer as ours
import trl_instruct.recipes.ppo as stage
from trl_instruct.data.rendering import render_prompts
from trl_instruct.generation import sampling
from trl_instruct.generation.logits import spread
from trl_instruct.padding import completion_lengths, right_padded_mask
from trl_instruct.ppo_trainer import micro_batch
from trl_instruct.ppo_trainer.advantages import gae, masked_whiten
from trl_instruct.ppo_trainer.roles import load_roles
from trl_instruct.scalar_head import keep_shift

try:
    theirs = importlib.import_module("trl.experimental.ppo.ppo_trainer")
except ImportError:
    theirs = None
with_trl_ppo = pytest.mark.skipif(
    theirs is None, reason=f"TRL {trl.__version__} has no PPOTrainer; 1.12.0 is the last that has"
)

WIDTH, EOS, PAD = 6, 256, 257
ASKED = [f"{'long ' * (row % 3)}prompt {row}: " for row in range(8)]
QUICK = {
    "use_cpu": True,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_mini_batches": 1,
    "response_length": WIDTH,
    "max_steps": 4,
    "max_grad_norm": 0.0,
    "warmup_steps": 0,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "report_to": "none",
}


def letters(prompts, completions, **columns):
    return [0.1 * len(p) + text.count("e") for p, text in zip(prompts, completions, strict=True)]


def prompt_data():
    return Dataset.from_dict({"prompt": ASKED, "number": list(range(len(ASKED)))})


@pytest.fixture
def shifted_reward_model(tmp_path, make_reward_model, tokenizer):
    """Folder of a reward model whose demonstrations scored 0.7."""
    model = make_reward_model(seed=1)
    keep_shift(model, 0.7, 1.0)
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    return tmp_path / "rm"


def sampled(*, full, seed=0):
    """Completions of every prompt in every iteration: (iterations, prompts, WIDTH), pad behind EOS.

    All fill the width, some with an EOS as their last token; or, not `full`, end anywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (QUICK["max_steps"], len(ASKED))
    ids = torch.randint(0, 256, (*shape, WIDTH), generator=generator)
    shortest = WIDTH if full else 1
    ends = torch.randint(shortest, WIDTH + 2, shape, generator=generator).unsqueeze(-1)
    columns = torch.arange(1, WIDTH + 1)
    return torch.where(columns == ends, EOS, torch.where(columns > ends, PAD, ids))


class Watch(TrainerCallback):
    """What an engine computed, an entry an iteration; rows stand in the order of `ASKED`."""

    def __init__(self, completions, tokenizer):
        self.completions = completions
        self.rows = {tuple(ids): row for row, ids in enumerate(render_prompts(ASKED, tokenizer))}
        self.rollouts, self.updates, self.weights, self.metrics = [], [], [], []

    def rows_of(self, prompts):
        """Which prompts these token lists are, whatever they are padded with."""
        return [self.rows[tuple(i for i in ids if i != PAD)] for ids in prompts.tolist()]

    def sample(self, rows):
        return self.completions[len(self.rollouts)][rows]

    def note(self, entries, rows, **fields):
        back = torch.tensor(rows).argsort()
        entries.append({n: field.detach()[back].float().clone() for n, field in fields.items()})

    def on_step_end(self, args, state, control, model, **kwargs):
        value = getattr(model, "value_model", None) or model.value.model
        parts = {"policy": model.policy, "value": value}
        names = {
            f"{part}.{name}": weight.detach().float().clone()
            for part, module in parts.items()
            for name, weight in module.named_parameters()
        }
        self.weights.append(names)

    def on_log(self, args, state, control, logs, **kwargs):
        self.metrics.append(logs)


def watch_theirs(monkeypatch, watch):
    """Read the local variables of TRL's `train` where it calls functions of its module."""

    def batch_generation(model, queries, size, pad, config):
        rows = torch.cat([queries, watch.sample(watch.rows_of(queries))], dim=1)
        logits = theirs.forward(model, rows, pad).logits[:, queries.shape[1] - 1 : -1]
        return rows, logits / (config.temperature)

    def whiten(values, mask, shift_mean=True):
        result = masked(values, mask, shift_mean)
        caller = inspect.currentframe().f_back.f_locals
        if shift_mean:
            watch.queries = watch.rows_of(caller["queries"])
            names = ("logprobs", "ref_logprobs", "kl", "scores", "rewards", "values", "returns")
            fields = {name: caller[name] for name in names}
            watch.note(watch.rollouts, watch.queries, **fields, advantages=result)
        return result

    def mean(values, mask, axis=None):
        caller = inspect.currentframe().f_back.f_locals
        if values is caller.get("pg_loss_max"):
            watch.note(
                watch.updates,
                [watch.queries[i] for i in caller["micro_batch_inds"]],
                logprobs=caller["new_logprobs"],
                policy_loss=values,
                value_loss=0.5 * caller["vf_loss_max"],
            )
        return averaged(values, mask, axis)

    masked, averaged = theirs.masked_whiten, theirs.masked_mean
    monkeypatch.setattr(theirs, "batch_generation", batch_generation)
    monkeypatch.setattr(theirs, "masked_whiten", whiten)
    monkeypatch.setattr(theirs, "masked_mean", mean)


def watch_ours(monkeypatch, watch):
    """Take what passes between the phases of our trainer."""

    def generate(policy, prompts, sampling, **options):
        ids = watch.sample([watch.rows[tuple(prompt)] for prompt in prompts])
        return ids, *completion_lengths(ids, [EOS])

    def rows_of(rollout):
        pairs = zip(rollout.prompt_ids, rollout.prompt_lengths, strict=True)
        return [watch.rows[tuple(ids[-length:].tolist())] for ids, length in pairs]

    def advantages(self, rollout, rewards):
        result, returns = original.advantages(self, rollout, rewards)
        kl = rollout.logprobs - rollout.ref_logprobs
        names = ("logprobs", "ref_logprobs", "scores", "values")
        fields = {name: getattr(rollout, name) for name in names}
        fields |= {"kl": kl, "rewards": rewards, "advantages": result, "returns": returns}
        watch.note(watch.rollouts, rows_of(rollout), **fields)
        return result, returns

    def ppo_sums(model, rollout, *given, **options):
        watch.now = SimpleNamespace(rows=rows_of(rollout), mask=rollout.mask)
        return original.ppo_sums(model, rollout, *given, **options)

    def policy_loss(logprobs, *given, **options):
        watch.now.logprobs = logprobs
        found = original.policy_loss(logprobs, *given, **options)
        watch.now.policy_loss = found[0]
        return found

    def value_loss(*given, **options):
        found = original.value_loss(*given, **options)
        now = watch.now
        fields = {"logprobs": now.logprobs, "policy_loss": now.policy_loss, "value_loss": found[0]}
        spread_out = {name: spread(field, now.mask) for name, field in fields.items()}
        watch.note(watch.updates, now.rows, **spread_out)
        return found

    trainer = ours.PPOTrainer
    original = SimpleNamespace(
        advantages=trainer.advantages,
        ppo_sums=ours.ppo_sums,
        policy_loss=micro_batch.policy_loss,
        value_loss=micro_batch.value_loss,
    )
    monkeypatch.setattr(sampling, "generate", generate)
    monkeypatch.setattr(ours, "ppo_sums", ppo_sums)
    monkeypatch.setattr(micro_batch, "policy_loss", policy_loss)
    monkeypatch.setattr(micro_batch, "value_loss", value_loss)
    monkeypatch.setattr(trainer, "advantages", advantages)


def in_double(*arguments):
    """The roles in float64: an optimizer's steps enlarge what float32 rounds, by processor."""
    roles = load_roles(*arguments)
    judge = getattr(roles.reward, "model", None)
    for model in (roles.policy, roles.ref_policy, roles.value, judge):
        if model is not None:
            model.double()
    return roles


@pytest.fixture
def run_both(monkeypatch, saved_policy, shifted_reward_model, tokenizer, tmp_path):
    """run_both(completions, reward, **options): what our engine and TRL's computed of them."""

    def run(completions, reward=None, **options):
        watches = []
        for engine, install in (("trl_instruct", watch_ours), ("trl", watch_theirs)):
            watch = Watch(completions, tokenizer)
            with monkeypatch.context() as patch:
                patch.setattr(stage, "load_roles", in_double)
                install(patch, watch)
                stage.ppo(
                    saved_policy,
                    reward or shifted_reward_model,
                    prompt_data(),
                    tmp_path / engine,
                    engine=engine,
                    callbacks=[watch],
                    **{**QUICK, **options},
                )
            watches.append(watch)
        return watches

    return run


def assert_moved(watch, *parts):
    """The run did something: both models (or those parts) moved, and the KL is not 0."""
    first, last = watch.weights[0], watch.weights[-1]
    for part in parts or ("policy", "value"):
        moved = [(first[n] - last[n]).abs().max() for n in first if n.startswith(part)]
        assert max(moved) > 1e-3
    assert watch.rollouts[-1]["kl"].abs().max() > 1e-2


SGD = {"optim": "sgd", "learning_rate": 0.01}
TWO_EPOCHS = {
    **{"optim": "sgd", "learning_rate": 0.0045, "num_ppo_epochs": 2},
    **{"cliprange": 0.05, "cliprange_value": 0.01},
}
SETTINGS = {
    "adamw": {"learning_rate": 1e-3, "adam_epsilon": 1e-5},
    "two epochs, clipped": {**TWO_EPOCHS, "temperature": 1.25},
    "whitened rewards": {**SGD, "learning_rate": 0.007, "whiten_rewards": True},
    "function, discount": {**SGD, "gamma": 0.9, "lam": 0.8, "missing_eos_penalty": 0.5},
}


@with_trl_ppo
@pytest.mark.parametrize("name", SETTINGS)
def test_both_engines_agree_token_by_token(name, run_both):
    reward = letters if "function" in name else None
    mine, trls = run_both(sampled(full=True), reward, kl_coef=0.2, **SETTINGS[name])
    assert len(mine.rollouts) == len(mine.weights) == 4
    torch.testing.assert_close(mine.rollouts, trls.rollouts)
    torch.testing.assert_close(mine.updates, trls.updates)
    torch.testing.assert_close(mine.weights, trls.weights)
    assert_moved(mine)


@with_trl_ppo
def test_both_engines_log_the_same(run_both):
    """But for the variance of the ratio, which TRL divides by n - 1."""
    mine, trls = run_both(sampled(full=True), kl_coef=0.2, **TWO_EPOCHS)
    assert max(log["policy/clipfrac"] for log in mine.metrics) > 0
    assert max(log["val/clipfrac"] for log in mine.metrics) > 0
    for log, trl_log in zip(mine.metrics, trls.metrics, strict=True):
        both = (log.keys() & trl_log.keys()) - {"eps", "val/ratio_var"}
        assert trl_log.keys() - both == {"eps", "val/ratio_var", "val/num_eos_tokens"}
        torch.testing.assert_close(
            *({key: torch.tensor(one[key]) for key in both} for one in (log, trl_log))
        )


# ---- completions of different length -------------------------------------------------------------


def real(entries, mask_of, *names):
    """Those fields, with 0 behind the end of each completion."""
    return [
        {name: torch.where(mask_of(index), entry[name], 0.0) for name in names}
        for index, entry in enumerate(entries)
    ]


@with_trl_ppo
def test_with_gamma_and_lambda_1_length_makes_no_difference_to_the_policy(run_both):
    """TRL puts the score on the position behind the last token, and takes a value there.

    With gamma = lambda = 1 an advantage is what is still to come less the value, wherever it comes.
    """
    completions = sampled(full=False)
    lengths = [completion_lengths(ids, [EOS])[0] for ids in completions]
    assert all(WIDTH in row and min(row) < WIDTH for row in lengths)
    settings = {"gamma": 1.0, "lam": 1.0, "vf_coef": 0.0, "kl_coef": 0.2, **SGD}
    mine, trls = run_both(completions, **settings)

    def mask(iteration):
        return right_padded_mask(lengths[iteration], WIDTH)

    names = ("logprobs", "ref_logprobs", "kl", "values", "advantages", "returns")
    fields = [real(one.rollouts, mask, *names) for one in (mine, trls)]
    torch.testing.assert_close(*fields)
    losses = [
        real(one.updates, mask, "logprobs", "policy_loss", "value_loss") for one in (mine, trls)
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(mine.weights, trls.weights)
    assert_moved(mine, "policy")
    for index, (one, other) in enumerate(zip(mine.rollouts, trls.rollouts, strict=True)):
        scores, columns = one["scores"].unsqueeze(1), torch.arange(WIDTH)
        ends = lengths[index].unsqueeze(1)
        at_last = scores * (columns == ends - 1)
        one_later = scores * (columns == ends.clamp(max=WIDTH - 1))
        torch.testing.assert_close(one["rewards"] - at_last, other["rewards"] - one_later)


@with_trl_ppo
def test_trls_advantages_are_our_formula_with_its_one_token_more(run_both):
    completions = sampled(full=False)
    _, trls = run_both(completions, gamma=0.9, lam=0.8, kl_coef=0.2, **SGD)
    for ids, fields in zip(completions, trls.rollouts, strict=True):
        lengths, _ = completion_lengths(ids, [EOS])
        mask, longer = (right_padded_mask(lengths + n, WIDTH) for n in (0, 1))
        advantages, returns = gae(fields["rewards"], fields["values"], longer, gamma=0.9, lam=0.8)
        torch.testing.assert_close(fields["returns"], returns)
        torch.testing.assert_close(fields["advantages"] * mask, masked_whiten(advantages, mask))
