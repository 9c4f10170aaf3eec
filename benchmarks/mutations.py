"""Mutations of the core: each changes a line of it, and a test must then fail.

make mutate
make mutate ARGS="advantages losses"    # only files whose path contains one of these words

Works on a copy of the project. A mutation's tests (and the doctests of its file) run in a process
forked from this one, which has loaded the libraries: most take a few seconds. Before the first
mutation the tests must pass as they are. Survivors are listed at the end, with exit code 1; a text
that does not occur exactly once in its file, or tests that cannot be collected, stop the run.
"""

import importlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 600.0  # seconds; a mutation that never ends is killed, and counts as found
LIBRARIES = (
    *("torch", "pytest", "hypothesis", "hypothesis.strategies", "datasets", "accelerate", "peft"),
    *("transformers.trainer", "transformers.models.llama.modeling_llama", "safetensors.torch"),
    *("trl.trainer.reward_trainer", "trl.trainer.sft_trainer"),
)
TRAINER = "ppo_trainer/test_ppo_trainer.py"
RESUME = "recipes/test_checkpoints.py::test_resuming_is_bit_identical[full-1]"
TWO = "test_processes.py::test_two_processes_with_half_the_batch_each_do_what_one_does"

# File of trl_instruct, tests (arguments of pytest, in the folder tests), old and new texts.
MUTATIONS: list[tuple[str, str, list[tuple[str, str]]]] = [
    (
        "ppo_trainer/advantages.py",
        "ppo_trainer/test_advantages.py test_padding.py",
        [
            (".sum() / mask.sum().clamp(min=1)", ".sum() / mask.numel()"),
            (".sum() / mask.sum().clamp(min=1)", ".sum() / mask.sum()"),
            (" * count / (count - 1).clamp(min=1)", ""),
            ("(count - 1).clamp(min=1)", "(count - 1)"),
            ("masked_mean((values - mean) ** 2, mask)", "masked_mean(values**2, mask)"),
            ("torch.rsqrt(variance + 1e-8)", "torch.rsqrt(variance)"),
            ("torch.rsqrt(variance + 1e-8)", "1 / (variance + 1e-8)"),
            ("    if not shift_mean:", "    if shift_mean:"),
            ("return torch.where(mask, whitened, 0.0)", "return whitened"),
            ("        return -log_ratio", "        return log_ratio"),
            ("        return -log_ratio", "        return (-log_ratio).clamp(min=0)"),
            ("log_ratio.exp() - 1 - log_ratio", "log_ratio.exp() - 1 + log_ratio"),
            ("log_ratio.exp() - 1 - log_ratio", "0.5 * log_ratio**2"),
            ("columns == (lengths - 1).unsqueeze(1)", "columns == lengths.unsqueeze(1)"),
            ("< lengths.unsqueeze(1)", "<= lengths.unsqueeze(1)"),
            ("< lengths.unsqueeze(1)", "< lengths.unsqueeze(1) - 1"),
            ("-kl_coef * kl, 0.0)", "kl_coef * kl, 0.0)"),
            ("min(0.2, max(-0.2, kl / target - 1))", "max(-0.2, kl / target - 1)"),
            ("min(0.2, max(-0.2, kl / target - 1))", "min(0.2, kl / target - 1)"),
            ("(1 + error * episodes / horizon)", "(1 - error * episodes / horizon)"),
            ("(1 + error * episodes / horizon)", "(1 + error / horizon)"),
            ("+ gamma * next_value", "+ next_value"),
            ("delta + gamma * lam * next_advantage", "delta + lam * next_advantage"),
            ("delta + gamma * lam * next_advantage", "delta + gamma * next_advantage"),
            ("return advantages, advantages + values", "return advantages, advantages + rewards"),
            ("    values = torch.where(mask, values, 0.0)\n", ""),
            ("    rewards = torch.where(mask, rewards, 0.0)\n", ""),
            ("        next_value = values[:, t]", "        next_value = rewards[:, t]"),
            ("reversed_advantages[::-1]", "reversed_advantages"),
            ("gamma=gamma, lam=used)", "gamma=gamma, lam=lam)"),
            ("lam=value_lam)[1]", "lam=lam)[1]"),
            ("dim=1), alpha=lam_alpha", "dim=1), alpha=0.05"),
            ("(1 - 1 / (alpha * lengths", "(1 - alpha / (lengths"),
        ],
    ),
    (
        "ppo_trainer/losses.py",
        "ppo_trainer/test_ppo_losses.py generation/test_vllm.py",
        [
            ("(logprobs - sampler_logprobs)", "(sampler_logprobs - logprobs)"),
            (".exp().clamp(max=clip_max)", ".exp()"),
            (".nan_to_num(nan=0.0).exp()", ".exp()"),
            ("loss, flat = torch.maximum(", "loss, flat = torch.minimum("),
            (
                "loss, flat = torch.maximum(plain, clipped), clipped >",
                "loss, flat = torch.maximum(plain, clipped), clipped >=",
            ),
            (
                "loss, flat = torch.maximum(plain, clipped), clipped >",
                "loss, flat = torch.maximum(plain, clipped), clipped !=",
            ),
            ("torch.exp(logprobs - old_logprobs)", "torch.exp(old_logprobs - logprobs)"),
            ("torch.exp(logprobs - old_logprobs)", "1 + logprobs - old_logprobs"),
            ("ratio.clamp(1.0 - cliprange, 1.0 + high)", "ratio.clamp(max=1.0 + high)"),
            ("ratio.clamp(1.0 - cliprange, 1.0 + high)", "ratio.clamp(min=1.0 - cliprange)"),
            ("cliprange if cliprange_high is None else cliprange_high", "cliprange"),
            ("torch.where(advantages < 0, -adv", "torch.where(advantages > 0, -adv"),
            ("torch.minimum(loss, limit)", "loss"),
            ("flat | (loss > limit)", "flat"),
            ("plain = -advantages", "plain = advantages"),
            ("0.5 * torch.maximum(", "torch.maximum("),
            ("0.5 * torch.maximum(", "0.5 * torch.minimum("),
            (
                "return 0.5 * torch.maximum(plain, clipped), clipped >",
                "return 0.5 * torch.maximum(plain, clipped), clipped >=",
            ),
            ("old_values - cliprange_value, old_values +", "-cliprange_value, 0 +"),
            ("old_values - cliprange_value, old_values +", "returns - cliprange_value, returns +"),
            ("(near - returns) ** 2", "(near - old_values) ** 2"),
        ],
    ),
    (
        "ppo_trainer/metrics.py",
        f"{TRAINER} -m 'not slow' -k 'metrics or number or sums or moved_by'",
        [
            ("penalty = -kl_coef * kl", "penalty = kl_coef * kl"),
            ('estimator="k3"', 'estimator="k1"'),
            ("rollout.scores + penalty", "rollout.scores - penalty"),
            ("-torch.where(mask, rollout.logprobs", "torch.where(mask, rollout.logprobs"),
            ("1 - unexplained / variance", "unexplained / variance"),
            (
                "torch.where(variance > 0, 1 - unexplained / variance, 0.0)",
                "1 - unexplained / variance",
            ),
            ("masked_moments(returns - values, mask)", "masked_moments(values, mask)"),
            ("0.5 * log_ratio**2", "log_ratio**2"),
            ("0.5 * log_ratio**2", "-log_ratio"),
            ('"val/ratio": log_ratio.exp()', '"val/ratio": log_ratio'),
            ('in ("loss/policy", "loss/value")', 'in ("loss/policy",)'),
            ('in ("loss/policy", "loss/value")', 'in ("loss/value",)'),
        ],
    ),
    (
        "ppo_trainer/micro_batch.py",
        f"{TRAINER} ppo_trainer/test_ptx.py -m 'not slow'",
        [
            (", args.temperature)", ")"),
            ("(logprobs, rollout.logprobs[mask],", "(logprobs, logprobs.detach(),"),
            ("(values, rollout.values[mask],", "(values, values.detach(),"),
            ("(values, rollout.values[mask],", "(values, returns[mask],"),
            ("one * completion.shape[1])", "one * (completion.shape[1] - 1))"),
            ('"policy/entropy": entropies', '"policy/entropy": -logprobs.detach()'),
            ("cliprange_value=args.cliprange_value)", "cliprange_value=args.cliprange)"),
            ("        cliprange=args.cliprange,", "        cliprange=0.2,"),
            ("cliprange_high=args.cliprange_high", "cliprange_high=None"),
            ("dual_clip=args.dual_clip", "dual_clip=None"),
            ("loss = -logprobs", "loss = logprobs"),
            (" * len(ids) / len(rows)", ""),
            ("backward(args.ptx_coef * loss)", "backward(loss)"),
        ],
    ),
    (
        "ppo_trainer/trainer.py",
        f"{TRAINER} ppo_trainer/test_ptx.py ppo_trainer/test_ema.py -m 'not slow'",
        [
            ("+ self.args.vf_coef * sums", "+ sums"),
            ("backward(loss * weight)", "backward(loss)"),
            ("self.args.max_grad_norm or math.inf", "math.inf"),
            ("rollout.mask, shift_mean=False)", "rollout.mask)"),
            ("return self.whiten(advantages, rollout.mask), returns", "return advantages, returns"),
            ("gamma=args.gamma, **lams", "gamma=args.lam, **lams"),
            ('"lam": args.lam,', '"lam": args.gamma,'),
            ('sums["loss/policy"] * (not still)', 'sums["loss/policy"]'),
            ("            self.policy.zero_grad()", "            pass"),
            ("kl_coef=self.kl_coef)\n        if", "kl_coef=self.args.kl_coef)\n        if"),
            ("ptx_rows_per_episode * len(rollout.scores)", "ptx_rows_per_episode"),
            ("            self.average.update()\n", "            pass\n"),
            ("torch.randperm(self.local_batch_size)", "torch.arange(self.local_batch_size)"),
            ("if p not in shared]", "if p in shared]"),
            ("scores=without_eos(scores, rollout.ended, self.args)", "scores=scores"),
            (
                "step(episodes, advantages[part], returns[part])",
                "step(episodes, advantages, returns)",
            ),
        ],
    ),
    (
        "ppo_trainer/trainer.py",
        f"{TRAINER} -k 'ends_early or beta_'",
        [
            ("> (self.args.target_kl or math.inf)", "> math.inf"),
            ('metrics["objective/kl"], **given', 'metrics["objective/kl_k3"], **given'),
            ('"target": target', '"target": 1.0'),
        ],
    ),
    (
        "ppo_trainer/rollout_scores.py",
        "rewards/test_reward_faults.py -k judge",
        [("for s in part if not math.isnan(s)]", "for s in part]")],
    ),
    (
        "ppo_trainer/exploitation.py",
        "ppo_trainer/test_exploitation.py",
        [
            ("[*series[begin : begin + apart], *series[last - apart + 1 :]]", "series"),
            ("FALSE_ALARMS / len(series) ** 2", "FALSE_ALARMS"),
            ("> z * error", "> z * error**2"),
            ("score[last] < max(score)", "score[last] < min(score)"),
            ("judge[last] >= judge[last - WINDOW] or", ""),
        ],
    ),
    (
        "rewards/combined.py",
        "rewards/test_ensemble.py",
        [("(lowest - s) / beta", "(s - lowest) / beta"), ("lowest - beta", "lowest + beta")],
    ),
    (
        "reward_trainer/evaluation.py",
        "reward_trainer/test_reward_evaluation.py -k dissent",
        [("part.accuracy(-part.margins)", "part.accuracy(part.margins)"), ("< 0)", "> 0)")],
    ),
    (
        "ppo_trainer/rollouts.py",
        f"ppo_trainer/test_rollouts.py test_reward_shift.py rewards/test_reward_faults.py {TRAINER}"
        " -k 'test_rollouts or skipped or values_predict or given_reference'",
        [
            ("back = order.argsort()", "back = order"),
            ("queue[:batch_size], queue[batch_size:]", "queue[:batch_size], []"),
            ("torch.randperm(num_prompts, generator=generator)", "torch.arange(num_prompts)"),
            ("self.completion_lengths * self.scored", "self.completion_lengths"),
            (".float() - shift_of(self.model)", ".float()"),
            ("ref_policy or model.policy", "model.policy"),
            ("rtol=0, atol=SAME)", "rtol=0, atol=9.0)"),
            ("known = by_policy and _says_again", "known = not by_policy or _says_again"),
            ("rollout.logprobs[mask], state_values", "0 * rollout.logprobs[mask], state_values"),
        ],
    ),
    (
        "ppo_trainer/rollout_scores.py",
        f"rewards/test_reward_faults.py {TRAINER} -k 'skip or fixed or judge or seen or penalty'",
        [
            (
                "scores - args.missing_eos_penalty * ~ended",
                "scores - args.missing_eos_penalty * ended",
            ),
            ("scores - args.missing_eos_penalty", "scores + args.missing_eos_penalty"),
            ("ended | scores.isnan()", "ended"),
            ("ended | scores.isnan(), scores, args", "~ended, scores, args"),
            ("    function.merge_states(reward)", "    (lambda reward: None)(reward)"),
        ],
    ),
    (
        "ppo_trainer/ptx.py",
        "ppo_trainer/test_ptx.py -k 'stream or pass or rows_go or loss_is'",
        [
            ('record["text"] + self.tokenizer.eos_token', 'record["text"]'),
            ("seed=self.seed + self.passes", "seed=self.seed"),
            ("self.left[count * self.length :]", "[]"),
            (
                'self.passes, self.left = state["passes"], [*state["left"]]',
                "self.passes, self.left = 0, []",
            ),
            ('        self.stream.load_state_dict(state["stream"])\n', ""),
        ],
    ),
    (
        "ppo_trainer/ema.py",
        "ppo_trainer/test_ema.py",
        [
            ("1 - self.decay", "self.decay"),
            ("            self._put(trained)\n", "            pass\n"),
            ("w.detach().float().clone()", "w.detach().clone()"),
        ],
    ),
    (
        "ppo_trainer/iteration_trainer.py",
        RESUME,
        [
            ("        self._load_callback_state()\n", ""),
            ("        self._load_optimizer_and_scheduler(str(checkpoint))\n", ""),
            ("        self._load_rng_state(str(checkpoint))\n", ""),
        ],
    ),
    (
        "ppo_trainer/iteration_trainer.py",
        f"{TRAINER} ppo_trainer/test_ppo_run.py -k 'rate or checkpoint or long or callbacks'",
        [
            ("            scheduler.step()\n", ""),
            ('"params": own, "lr": learning_rate}', '"params": own}'),
            ("state.global_step / self.iterations_per_epoch", "state.global_step"),
            ("        self.lr_scheduler.step()\n", ""),
        ],
    ),
    (
        "ppo_trainer/run_state.py",
        RESUME,
        [
            ('        trainer.pretraining.load_state(progress["ptx"])\n', "        pass\n"),
            ("        trainer.average.load(checkpoint / EMA)\n", "        pass\n"),
            ('        trainer.kl_coef = progress["kl_coef"]', "        pass"),
            ('    load_states(trainer.reward, progress["reward"])\n', ""),
            ("    load_weights(trainer.value_model, checkpoint / VALUE)\n", ""),
        ],
    ),
    (
        "logprobs.py",
        "test_logprobs.py",
        [
            ("else logits / temperature", "else logits * temperature"),
            ("else logits / temperature", "else logits"),
            ("return -torch.linalg.vecdot", "return torch.linalg.vecdot"),
            ("vecdot(log_probs.exp(), log_probs)", "vecdot(log_probs, log_probs)"),
            ("    logits = logits.float()\n", ""),
        ],
    ),
    (
        "generation/logits.py",
        "ppo_trainer/test_rollouts.py ppo_trainer/test_ptx.py -m 'not slow'",
        [
            ("right_padded_mask(lengths - 1, width) &", "right_padded_mask(lengths, width) &"),
            (
                "~right_padded_mask(prompt_lengths - 1, width)",
                "~right_padded_mask(prompt_lengths, width)",
            ),
            ("prompt_ids.shape[1] - prompt_lengths)[", "0 * prompt_lengths)["),
            ("values[:, -sequences.states.shape[1] :]", "values[:, : sequences.states.shape[1]]"),
        ],
    ),
    (
        "generation/token_sampling.py",
        "generation/test_token_sampling.py generation/test_sampling.py",
        [
            ("scores, temperature=self.temperature", "scores, temperature=1 / self.temperature"),
            ("scores, temperature=self.temperature", "scores, temperature=1.0"),
            ("token_logprobs(log_probs, token.squeeze(1))", "log_probs.amax(dim=1)"),
            ("new, torch.stack(drawing", "new, 0 * torch.stack(drawing"),
            ("torch.rand_like(below[:, :1])", "torch.rand_like(below[:1, :1])"),
            ("drawn, right=True).clamp(", "drawn, right=True).sub(1).clamp(min=0, "),
            ("input_ids.shape[1] - self.width\n", "input_ids.shape[1]\n"),
            ("self.lengths.clamp(max=count)", "torch.full_like(self.lengths, count)"),
            ("            ended = ended | (stop.lengths < NEVER)\n", "            pass\n"),
            (" | (stopped[rows] <= length)", ""),
            ("            stopped[rows] = stop.lengths\n", "            pass\n"),
            ("        cache.batch_select_indices(left)\n", ""),
            ("tensor[:, :-1] for name", "tensor for name"),
            ("[mask, torch.ones_like(new", "[mask, torch.zeros_like(new"),
        ],
    ),
    (
        "generation/sampling.py",
        "generation/test_sampling.py",
        [
            ("torch.minimum(lengths, stopped)", "lengths"),
            ("ended | (stopped < NEVER)", "ended"),
            ("ids[: length - end])", "ids[:length])"),
            ("ends = [min((t.index(s)", "ends = [max((t.index(s)"),
            ("completions[rows] = drawn", "completions[start : start + len(rows)] = drawn"),
        ],
    ),
    (
        "generation/sampler.py",
        "generation/test_sampling.py generation/test_vllm.py -m 'not slow'",
        [
            ("[tokenizer.eos_token_id, *own]", "[tokenizer.eos_token_id]"),
            ("stopped or len(row) < shape[1])", "stopped)"),
            ("row[-1] in stops or any(", "any("),
            (" or any(string in text for string in strings)", ""),
            ("math.nan if p is None else p", "0.0 if p is None else p"),
            ("for prompt in prompts for _ in range(copies)]", "for prompt in prompts]"),
        ],
    ),
    (
        "padding.py",
        "test_padding.py test_batching.py",
        [
            (">= width - lengths", "> width - lengths"),
            ("< lengths.unsqueeze(1)", "<= lengths.unsqueeze(1)"),
            ("cumsum(dim=1) - 1", "cumsum(dim=1)"),
            ("- 1).masked_fill(~mask, 0)", "- 1)"),
            ("device=values.device) + columns", "device=values.device) - columns"),
            ("first_eos + 1", "first_eos"),
            (">= FULL * len(batch)", "<= FULL * len(batch)"),
            ("len(batch) <= batch_size and", "len(batch) < batch_size and"),
            ("        if short := len(drawn) % batch_size:", "        if short := 0:"),
            ("first = rng.randrange(len(drawn) - short + 1)", "first = len(drawn) - short"),
            ("        rng.shuffle(cuts)\n", ""),
            ("seed=self.seed + self.epoch", "seed=self.seed"),
        ],
    ),
    (
        "data/ties.py",
        "reward_trainer/test_reward_losses.py",
        [
            ("(rank < other)", "(rank > other)"),
            ('0.5 if ties == "half"', '1.0 if ties == "half"'),
            ('0.5 if ties == "half"', '0.5 if ties == "drop"'),
        ],
    ),
    (
        "reward_trainer/losses.py",
        "reward_trainer/test_reward_losses.py",
        [
            ("(ranks > 0).unsqueeze(2) & (ranks > 0).unsqueeze(1)", "(ranks > 0).unsqueeze(1)"),
            ("(there & others) *", "there *"),
            ("table / pairs.clamp(min=1) /", "table / pairs /"),
            ("table / pairs.clamp(min=1) /", "table /"),
            ("/ (pairs > 0).sum().clamp(min=1)", "/ len(ranks)"),
            ("/ (pairs > 0).sum().clamp(min=1)", "/ (pairs > 0).sum()"),
            ("else share * weights.view(-1, 1, 1)", "else share"),
            ("share * weights.view(-1, 1, 1)", "share * weights.view(-1, 1, 1) / weights.sum()"),
            ("logsigmoid(chosen - rejected)", "logsigmoid(rejected - chosen)"),
            ("center * (chosen + rejected)", "center * (chosen - rejected)"),
            ("losses = center *", "losses = -center *"),
            ("(weights * losses).sum()", "(weights * losses).mean()"),
        ],
    ),
    (
        "reward_trainer/prefix.py",
        "reward_trainer/test_prefix.py",
        [
            ("key_place <= query_place", "key_place < query_place"),
            ("((key == 0) | (key == query))", "(key == query)"),
            ("((key == 0) | (key == query))", "((key == 0) | (key <= query))"),
            ("< lengths.unsqueeze(1) - 1\n", "< lengths.unsqueeze(1)\n"),
            ("    before = before - before[first]\n", ""),
            ('"amin"', '"amax"'),
            ("placed(position, 0)", "placed(columns, 0)"),
            ("is_own = position >= prefix", "is_own = position > prefix"),
            ("return works[0] < works[1]", "return works[0] > works[1]"),
            ("mask.tril(prefix)", "mask.tril(prefix - 1)"),
            ("mask.tril(prefix)", "mask.tril(prefix + 1)"),
            ("[row[:size] for row", "[row[-size:] for row"),
            ("rows.device) - first\n", "rows.device)\n"),
        ],
    ),
    (
        "rewards/score_position.py",
        "rewards/test_score_position.py",
        [
            ("counts & (input_ids != pad_token_id)", "counts"),
            ("(columns * counts).amax(dim=1)", "counts.sum(dim=1) - 1"),
            ("(columns * counts).amax(dim=1)", "(columns * counts).amax(dim=1) - 1"),
            ("logits[chosen] = output", "logits[: len(chosen)] = output"),
        ],
    ),
    (
        "reward_trainer/trainer.py",
        "reward_trainer/test_reward_trainer.py -k 'average_over or trls_own or logged'",
        [
            ('inputs.get("weight"), ties=self.ties', "None, ties=self.ties"),
            ("self.args.center_rewards_coefficient or 0.0", "0.0"),
            ("weights / weights.mean()", "weights"),
            (
                "table.unsqueeze(2), table.unsqueeze(1), weights",
                "table.unsqueeze(1), table.unsqueeze(2), weights",
            ),
        ],
    ),
    (
        "reward_trainer/trainer.py",
        "reward_trainer/test_reward_trainer.py -k whatever_the_batch",
        [
            ("wins(0, margins", "wins(margins, 0"),
            ('metrics["accuracy"] += ', 'metrics["accuracy"] = '),
            ('["mean_reward"] += given.tolist()', '["mean_reward"] += [given.mean().item()]'),
            ('min(metrics["min_reward"] + [given', "min([given"),
            ("pair_weights(ranks) > 0, scores", "pair_weights(ranks) >= 0, scores"),
            ("[name].pop()  # TRL's", "[name]  # TRL's"),
        ],
    ),
    (
        "reward_trainer/trainer.py",
        "test_processes.py::test_two_processes_evaluate_a_reward_model_as_one_does",
        [("self.accelerator.gather_for_metrics(rows)", "self.accelerator.gather(rows)")],
    ),
    (
        "reward_trainer/evaluation.py",
        "reward_trainer/test_reward_evaluation.py",
        [
            ("_mean(part.expected(), part.weights)", "part.expected().mean().item()"),
            ("weights=pairs.weights * (expected", "weights=(expected"),
            ("off.abs().sum() / pairs.weights.sum()", "off.abs().sum() / len(bins)"),
            ("torch.sigmoid(self.margins.abs())", "torch.sigmoid(self.margins)"),
            ("differences * pairs.margins.sign()", "differences"),
            ("noise[pairs.winners] - noise[pairs.losers]", "noise[pairs.winners]"),
            ("place += len(one.ranks)", "place += 1"),
            ("drawn, n=20)[-1]", "drawn, n=20)[0]"),
            ("size // LEAST_PAIRS)) // size", "size // LEAST_PAIRS + 1)) // size"),
            ("2 * end - 1 for end", "end for end"),
            ("both.unsqueeze(1)).sign()", "both.unsqueeze(1))"),
            (
                "self.prompts, self.weights)\n\n    def above",
                "self.prompts, None)\n\n    def above",
            ),
            ("softplus(-pairs.margins)", "softplus(pairs.margins)"),
            ('wins(0, differences, ties="half")', "wins(0, differences)"),
            (
                "margin, longer = scores[better] - scores[worse], lengths[better] - lengths[worse]",
                "margin, longer = scores[worse] - scores[better], lengths[better] - lengths[worse]",
            ),
            ("one.ranks[loser] - one.ranks[winner]", "one.ranks[winner] - one.ranks[loser]"),
            ("score == max(given)]", "score == min(given)]"),
            ("float(r == 1) for r", "float(r <= 2) for r"),
            ("labeled if max(one.ranks) > 1):", "labeled):"),
            ("share_interval(right, prompts, weights)", "share_interval(right, prompts)"),
            ("_mean(chance, weights)", "chance.mean().item()"),
            ("one.labeler is not None and max(one.ranks) > 1:", "max(one.ranks) > 1:"),
        ],
    ),
    (
        "reward_trainer/labelers.py",
        "reward_trainer/test_reward_evaluation.py",
        [
            ("2) if first != second else ()", "2)"),
            ("float(sign > 0)", "float(sign < 0)"),
            ("for sign in signs if sign)", "for sign in signs)"),
            ("len(rankings) < 2", "len(rankings) < 1"),
            ("for name in names:", "for name in names[:1]:"),
        ],
    ),
    (
        "data/pairs.py",
        "data/test_pairs.py",
        [
            ('reach = 1 if which == "adjacent"', 'reach = 2 if which == "adjacent"'),
            ("ranks[i] <= ranks[j] else", "ranks[i] >= ranks[j] else"),
            ("and ranks[chosen] != 1:", "and ranks[rejected] != 1:"),
            ("seed))[:max_pairs]", "seed))[:max_pairs + 1]"),
            ("sorted(compared, key=lambda pair: _lot(ranking, pair, seed))", "sorted(compared)"),
            ("        texts.sort()\n", "        pass\n"),
            ("return prompt.strip()", "return prompt"),
            ('"content": (one["content"] or "").strip()', '"content": one["content"]'),
            ("tested = set(prompts[:wanted])", "tested = set(prompts[wanted:])"),
            (
                "ranking.scores[chosen] - ranking.scores[rejected]",
                "ranking.scores[rejected] - ranking.scores[chosen]",
            ),
        ],
    ),
    (
        "data/orders.py",
        "data/test_rankings.py",
        [
            ("[-score for score in numbers]", "[score for score in numbers]"),
            ("enumerate(sorted(set(values)), start=1)", "enumerate(sorted(set(values)), start=0)"),
            ("float(len(known) - 1 - known", "float(known"),
        ],
    ),
    (
        "rewards/combined.py",
        "rewards/test_combined.py",
        [
            ("[w * s for w, s", "[s for w, s"),
            ("min(self.high, max(self.low, s))", "max(self.low, s)"),
            ("squares / (count - 1)", "squares / count"),
            ("sum(part.seen * part.mean for", "sum(part.mean for"),
            ("part.squares + part.seen * (part.mean - mean) ** 2", "part.squares"),
            ("(s - mean) / std", "s / std"),
            ("        self.own = Moments()\n", ""),
            ("len(text) - self.free", "len(text)"),
            ("[-self.per_character", "[self.per_character"),
        ],
    ),
    (
        "rewards/reward_model.py",
        "rewards/test_load_rewards.py test_reward_shift.py -k 'long_texts or on_average'",
        [
            ("score - self.shift for", "score for"),
            ("score + self.shift for", "score for"),
            ("row[-context:]", "row[:context]"),
        ],
    ),
    (
        "evaluation/statistics.py",
        "evaluation/test_win_rate.py evaluation/test_best_of_n.py evaluation/test_fluency.py",
        [
            ('wins(*both, ties="half")', "wins(*both)"),
            ("share_interval(won, None", "share_interval(1 - won, None"),
            ("- torch.tensor(baseline_lengths)", "+ torch.tensor(baseline_lengths)"),
            ("torch.tanh(longer / spread)", "longer / spread"),
            ("+ penalty @ weights", "- penalty @ weights"),
            ("variance.unsqueeze(1) * inputs) + penalty", "variance.unsqueeze(1) * inputs)"),
            ("torch.sigmoid(weights[0])", "torch.sigmoid(weights[1])"),
            ("range((most - 1).bit_length())", "range(most.bit_length())"),
            ("return math.log(n) - (n - 1) / n", "return math.log(n) - (n - 1)"),
            ("math.comb(count, n) / all_subsets", "math.comb(count, n)"),
            ("scores.contiguous(), right=False", "scores.contiguous(), right=True"),
            ("/ (up_to - below)", ""),
            ("1 - len(set(found)) / len(found)", "len(set(found)) / len(found)"),
        ],
    ),
    (
        "intervals.py",
        "test_intervals.py reward_trainer/test_reward_evaluation.py",
        [
            ("ddof=1", "ddof=0"),
            ("t_quantile(len(values) - 1) *", "t_quantile(len(values)) *"),
            ("weights * (values - p)", "values - p"),
            ("max(variance, drawn)", "drawn"),
            ("max(variance, drawn)", "variance"),
            ("    if p in (0, 1):", "    if p == 1:"),
            ("n = _effective(sizes) / few", "n = _effective(weights) / few"),
            ("drawn) / few", "drawn)"),
            ("+ independent) / (len(sizes) + 1)", ") / (len(sizes) + 1)"),
            ("z2 = Z_95**2 / n", "z2 = Z_95 / n"),
            ("p * (1 - p) + z2 / 4", "p * (1 - p)"),
            ("0.95 * below[-1]", "0.975 * below[-1]"),
            ("** (freedom - 1)", "**freedom"),
            ("* count / (count - 1)", "* (count - 1) / count"),
        ],
    ),
    (
        "ppo_trainer/trainer.py",
        TWO,
        [
            ("self.accelerator.num_processes / tokens", "1 / tokens"),
            ("[mine::every]", "[::every]"),
            ("self.accelerator.gather((values, mask))", "(values, mask)"),
            ('"episodes": self.batch_size', '"episodes": self.local_batch_size'),
            ("yield batch[first::stride]", "yield batch[::stride]"),
            ('self.accelerator.reduce(rollout.mask.sum(), "sum")', "rollout.mask.sum()"),
        ],
    ),
    (
        "ppo_trainer/metrics.py",
        TWO,
        [
            ('accelerator.reduce(mean * count, "sum") / total', "mean"),
            (
                "accelerator.gather((rollout.values, returns, rollout.mask))",
                "(rollout.values, returns, rollout.mask)",
            ),
        ],
    ),
    (
        "models/precision.py",
        "models/test_precision.py",
        [
            ("isinstance(m, nn.Embedding)", "isinstance(m, nn.GELU)"),
            (" and weight not in shared", ""),
            ("head.weight is not bare", "head.weight is bare"),
            ("    compute_in_float32(head)\n", ""),
        ],
    ),
    (
        "scalar_head.py",
        "models/test_precision.py",
        [("enabled=False", "enabled=True")],
    ),
    (
        "ppo_trainer/roles.py",
        "models/test_precision.py",
        [("if dtype is MIXED.get(accelerator.mixed_precision):", "if dtype:")],
    ),
    (
        "ppo_trainer/advantages.py",
        TWO,
        [("moments or masked_moments(values, mask)", "masked_moments(values, mask)")],
    ),
]


def mutated(source: str, old: str, new: str, file: str) -> str:
    """The source with the old text, which must occur once, replaced."""
    if source.count(old) != 1:
        raise SystemExit(f"{file} has {old!r} {source.count(old)} times, not once: mend the list.")
    return source.replace(old, new)


def run(tree: Path, arguments: list[str], log: Path) -> int:
    """pytest's exit code in a forked process; 1 if it took longer than LIMIT."""
    pid = os.fork()
    if not pid:
        os.setsid()
        os.chdir(tree)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.path.insert(0, str(tree))
        os.environ["PYTHONPATH"] = str(tree)
        import pytest

        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments]))
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return 1


def main(words: list[str]) -> int:
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True  # a file that changes within a second keeps its time stamp
    chosen = [m for m in MUTATIONS if not words or any(word in m[0] for word in words)]
    for file, _, changes in chosen:
        source = (ROOT / "trl_instruct" / file).read_text(encoding="utf-8")
        for old, new in changes:
            mutated(source, old, new, file)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = str(Path(folder) / "datasets")
        tree, log = Path(folder) / "project", Path(folder) / "log"
        ignored = shutil.ignore_patterns("__pycache__")
        for name in ("trl_instruct", "tests", "recipes"):
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", tree)
        for library in LIBRARIES:
            importlib.import_module(library)
        survivors, total, begun = [], 0, time.monotonic()
        for file, tests, changes in chosen:
            path = tree / "trl_instruct" / file
            first, *others = shlex.split(tests)
            named = [f"tests/{name}" if ".py" in name else name for name in (first, *others)]
            arguments = [*named, f"trl_instruct/{file}"] if "::" not in tests else named
            if run(tree, arguments, log):
                raise SystemExit(f"{tests} fails without a mutation:\n{log.read_text()[-3000:]}")
            source = path.read_text(encoding="utf-8")
            for old, new in changes:
                started = time.monotonic()
                path.write_text(mutated(source, old, new, file), encoding="utf-8")
                code = run(tree, arguments, log)
                if code not in (0, 1):
                    raise SystemExit(
                        f"{file}: {new!r}: pytest ended with {code}:\n{log.read_text()}"
                    )
                total += 1
                change = f"{file}: {old.strip()!r} -> {new.strip()!r}"
                if not code:
                    survivors.append(change)
                seconds = time.monotonic() - started
                print(
                    "survived" if not code else "killed  ", f"{seconds:5.1f} s ", change, flush=True
                )
            path.write_text(source, encoding="utf-8")
    print(f"\n{total - len(survivors)} of {total} killed, {time.monotonic() - begun:.0f} s")
    for change in survivors:
        print("survived:", change)
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
