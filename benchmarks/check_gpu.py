"""One GPU, checked: rates, sampling, scoring, updates, reward models, whole runs of `ppo`.

make check-gpu                                  # at most 12 minutes on one card
python benchmarks/check_gpu.py --parts rates sampling --minutes 3

The models have Qwen3's shapes (0.6B, 1.7B, 4B) and random weights, made on the spot; prompts and
completions have 512 tokens. Each part prints one line of JSON with its figures, or with the error
that stopped it; a part that would begin after the time is up is left out and says so. Without a GPU
the same parts run on shapes so small that they show nothing but that the script works.

- rates: matrix products and copies of the card.
- sampling: milliseconds a token of each sampler that is there, and the share of that time in which
  the card computed.
- scoring: tokens per second of log-probabilities and values without gradients.
- update: an optimizer step of policy and value, with and without log-probabilities in chunks.
- first_step: |ratio - 1| of the first minibatch in bfloat16, before anything has changed.
- reward_model: a step on K = 4 and 9 responses with each attention: milliseconds and peak.
- ppo_full, ppo_one_base: whole iterations, seconds of each phase, peak beside the printed estimate.
- resume: a run killed between two checkpoints and resumed, beside the same run unbroken.
"""

import argparse
import contextlib
import gc
import io
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, get_peft_model
from ppo import word_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TrainerCallback,
)

from trl_instruct import ppo
from trl_instruct.configs import EvaluateConfig, PPOConfig, RewardConfig
from trl_instruct.errors import InputError
from trl_instruct.generation.engines import begun
from trl_instruct.generation.token_sampling import Sampling
from trl_instruct.ppo_trainer import token_statistics
from trl_instruct.ppo_trainer.rollouts import PolicyAndValue, Rollout, ValueModel, with_logprobs
from trl_instruct.ppo_trainer.trainer import PPOTrainer
from trl_instruct.reward_trainer.trainer import RankingRewardTrainer

SHAPES: dict[str, tuple[int, ...]] = {  # width, MLP, layers, heads, their keys, width of a head
    "tiny": (64, 128, 2, 4, 2, 16),
    "0.6B": (1024, 3072, 28, 16, 8, 128),
    "1.7B": (2048, 6144, 28, 16, 8, 128),
    "4B": (2560, 9728, 36, 32, 8, 128),
}
NAMES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
CLASSIFIER = AutoModelForSequenceClassification
QUIET: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
SAMPLERS: dict[str, dict[str, Any]] = {
    "transformers": {},
    "continuous batching": {"use_transformers_continuous_batching": True},
    "vllm": {"use_vllm": True, "vllm_gpu_memory_utilization": 0.6},
}
# On which kinds of devices log-probabilities are computed in tiles: nowhere, or as in a run.
CHUNKS = {"whole": set(), "chunked": token_statistics.KERNEL_ON}
LORA: dict[str, Any] = {"use_peft": True, "lora_r": 16, "lora_target_modules": "all-linear"}
PHASES = {"sample": "sampling and scoring", "score": "reward", "update": "updates"}


class Setting(NamedTuple):
    """Sizes of what is measured, and where."""

    device: str
    small: str
    middle: str
    large: str
    vocabulary: int
    prompt: int
    completion: int
    episodes: int


GPU = Setting("cuda", "0.6B", "1.7B", "4B", 151_936, 512, 512, 64)
CPU = Setting("cpu", "tiny", "tiny", "tiny", 512, 8, 8, 4)


def words(setting: Setting, count: int, length: int) -> list[str]:
    """Texts of random words, a token each."""
    ids = torch.randint(setting.vocabulary - 2, (count, length)).tolist()
    return [" ".join(f"w{i}" for i in row) for row in ids]


def prompts(setting: Setting, count: int) -> Dataset:
    """Prompts of full length."""
    torch.manual_seed(0)
    texts = words(setting, count, setting.prompt)
    return Dataset.from_dict({"prompt": [f"{text} " for text in texts]})


def config_of(setting: Setting, size: str) -> Any:
    """Qwen3's config in one of the shapes."""
    *sizes, head = SHAPES[size]
    pad = setting.vocabulary - 1
    return AutoConfig.for_model(
        "qwen3",
        **dict(zip(NAMES.split(), sizes, strict=True)),
        **{"head_dim": head, "vocab_size": setting.vocabulary, "tie_word_embeddings": True},
        **{"max_position_embeddings": 2048, "num_labels": 1, "bos_token_id": None},
        **{"eos_token_id": pad - 1, "pad_token_id": pad},
    )


def model_of(setting: Setting, size: str, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """A model with random weights on the device."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        return kind.from_config(config_of(setting, size), **options)


def save_models(setting: Setting, size: str, folder: Path, *, lora: bool) -> None:
    """A policy and a reward model in the folder; with LoRA, an adapter over the policy, bf16."""
    dtype = torch.bfloat16 if lora else torch.float32
    tokenizer = word_tokenizer(setting.vocabulary)
    model_of(setting, size, dtype=dtype).save_pretrained(folder / "policy")
    if lora:
        judge = CLASSIFIER.from_pretrained(folder / "policy", num_labels=1, dtype=dtype)
        form = {"target_modules": "all-linear", "modules_to_save": ["score"]}
        judge = get_peft_model(judge, LoraConfig(task_type="SEQ_CLS", r=LORA["lora_r"], **form))
    else:
        judge = model_of(setting, size, CLASSIFIER, dtype=dtype)
    judge.save_pretrained(folder / "rm")
    for name in ("policy", "rm"):
        tokenizer.save_pretrained(folder / name)


def clock(setting: Setting, work: Callable[[], Any], times: int = 1) -> float:
    """Seconds of one call, after a first that is not timed."""
    work()
    synchronize(setting)
    begun = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(setting)
    return (time.perf_counter() - begun) / times


def synchronize(setting: Setting) -> None:
    """Wait for the card."""
    if setting.device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def peak(setting: Setting) -> Iterator[dict[str, float]]:
    """The peak of what torch allocated inside, GB; nothing without a GPU."""
    found: dict[str, float] = {}
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield found
    if setting.device == "cuda":
        found["peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)


def rates(setting: Setting) -> dict[str, Any]:
    """Matrix products in TFLOP/s, a copy within the card and from the host in GB/s."""
    size = 8192 if setting.device == "cuda" else 64
    found: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(2, size, size, device=setting.device, dtype=dtype)
        seconds = clock(setting, partial(torch.mm, a, b), 10)
        found[f"matmul_{str(dtype)[6:]}_tflops"] = round(2 * size**3 / seconds / 1e12, 3)
    block = torch.zeros(size, size, device=setting.device)
    host = torch.zeros(size, size, pin_memory=setting.device == "cuda")
    seconds = clock(setting, block.clone, 10)
    found["copy_GB_s"] = round(2 * block.nbytes / seconds / 1e9, 1)
    found["from_host_GB_s"] = round(
        host.nbytes / clock(setting, partial(block.copy_, host), 3) / 1e9, 1
    )
    return found


def sampling(setting: Setting) -> dict[str, Any]:
    """Milliseconds a token of each sampler at the large shape, and how busy the card is."""
    policy = model_of(setting, setting.large, dtype=torch.bfloat16).eval()
    tokenizer = word_tokenizer(setting.vocabulary)
    asked = torch.randint(setting.vocabulary - 2, (setting.episodes, setting.prompt)).tolist()
    how = Sampling(response_length=setting.completion // 4, batch_size=setting.episodes)
    found: dict[str, Any] = {"rows": setting.episodes, "tokens": how.response_length}
    for name, options in SAMPLERS.items():
        try:
            on = {"use_cpu": setting.device == "cpu", "report_to": "none"}
            sampler = begun(policy, tokenizer, EvaluateConfig(**on, **options))
            draw = partial(sampler.draw, asked, how)
            seconds = clock(setting, draw)
            found[f"{name}_ms_a_token"] = round(1000 * seconds / how.response_length, 2)
            if setting.device == "cuda":
                kinds = [torch.profiler.ProfilerActivity.CUDA]
                with torch.profiler.profile(activities=kinds) as profile:
                    draw()
                busy = sum(event.self_device_time_total for event in profile.key_averages())
                found[f"{name}_busy"] = round(busy / 1e6 / seconds, 2)
        except (InputError, ImportError) as error:
            found[name] = str(error)
    return found


def make_trainer(setting: Setting, size: str, folder: Path, **options: Any) -> PPOTrainer:
    """A trainer of two full models; the reward counts words."""
    config = PPOConfig(
        str(folder),
        response_length=setting.completion,
        per_device_train_batch_size=max(1, setting.episodes // 16),
        gradient_accumulation_steps=2,
        num_mini_batches=1,
        local_rollout_forward_batch_size=max(1, setting.episodes // 8),
        max_steps=1,
        **QUIET,
        **{"use_cpu": setting.device == "cpu", **options},
    )
    policy, value = model_of(setting, size), model_of(setting, size, CLASSIFIER)
    return PPOTrainer(
        args=config,
        processing_class=word_tokenizer(setting.vocabulary),
        model=policy,
        ref_model=None,
        reward_model=count_words,
        train_dataset=prompts(setting, setting.episodes),
        value_model=value,
    )


def count_words(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that costs nothing."""
    return [float(len(text.split())) for text in completions]


def scoring(setting: Setting) -> dict[str, Any]:
    """Tokens per second of log-probabilities under two policies and of values."""
    policy = model_of(setting, setting.large, dtype=torch.bfloat16).eval()
    value = model_of(setting, setting.large, CLASSIFIER, dtype=torch.bfloat16).eval()
    both = PolicyAndValue(policy, ValueModel(value))
    rollout, size = random_rollout(setting), max(1, setting.episodes // 8)
    work = partial(with_logprobs, rollout, both, policy, temperature=1.0, batch_size=size)
    with peak(setting) as found:
        seconds = clock(setting, work)
    found["tokens_a_second"] = round(float(rollout.lengths.sum()) / seconds)
    return found


def random_rollout(setting: Setting) -> Rollout:
    """Episodes of full length, of tokens drawn at random."""
    rows, device = setting.episodes, setting.device
    torch.manual_seed(0)
    ids = torch.randint(setting.vocabulary - 2, (rows, setting.prompt + setting.completion))
    asked, said = ids.to(device).split([setting.prompt, setting.completion], dim=1)
    lengths = [torch.full((rows,), part.shape[1], device=device) for part in (asked, said)]
    blank = torch.zeros(said.shape, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    return Rollout(asked, lengths[0], said, lengths[1], ended, blank, blank, blank, blank[:, 0])


def update(setting: Setting) -> dict[str, Any]:
    """An optimizer step on two full models of the middle shape, in mixed precision."""
    found: dict[str, Any] = {}
    for name, token_statistics.KERNEL_ON in CHUNKS.items():
        with tempfile.TemporaryDirectory() as folder, peak(setting) as most:
            trainer = make_trainer(setting, setting.middle, Path(folder), bf16=True)
            trainer.begin_training()
            rollout = random_rollout(setting).select(torch.arange(trainer.minibatch_size))
            ones = torch.ones_like(rollout.values)
            seconds = clock(setting, partial(trainer.step, rollout, ones, ones))
        tokens = float(rollout.lengths.sum())
        found[name] = {"ms": round(1000 * seconds), "tokens": tokens, **most}
        del trainer
        free()
    return found


def first_step(setting: Setting) -> dict[str, Any]:
    """How far the ratio of the first minibatch is from 1 in bfloat16: nothing has changed yet."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"bf16": True, "learning_rate": 0.0}
        trainer = make_trainer(setting, setting.small, Path(folder), **options)
        trainer.train()
    (log,) = [log for log in trainer.state.log_history if "val/ratio" in log]
    kept = ("val/ratio", "policy/approxkl", "policy/clipfrac", "objective/kl")
    return {name: log[name] for name in kept}


def reward_model(setting: Setting) -> dict[str, Any]:
    """A training step on a prompt and its K responses: milliseconds and peak of each attention."""
    found: dict[str, Any] = {}
    tokenizer = word_tokenizer(setting.vocabulary)
    for k in (4, 9):
        ranks = torch.randperm(k).add(1).tolist()
        said = words(setting, k, setting.completion - 1)  # and EOS
        record = {"prompt": prompts(setting, 1)["prompt"][0], "responses": said, "ranks": ranks}
        rows = Dataset.from_list([record])
        # FlexAttention has no backward pass on CPU.
        for attention in ("sdpa", "eager", *["flex_attention"] * (setting.device == "cuda")):
            with tempfile.TemporaryDirectory() as folder, peak(setting) as most:
                model = model_of(
                    *(setting, setting.small, CLASSIFIER), attn_implementation=attention
                )
                args = RewardConfig(
                    folder,
                    per_device_train_batch_size=1,
                    max_length=setting.prompt + setting.completion,
                    **{**QUIET, "bf16": setting.device == "cuda"},
                    use_cpu=setting.device == "cpu",
                )
                given: dict[str, Any] = {"args": args, "processing_class": tokenizer}
                trainer = RankingRewardTrainer(model=model, train_dataset=rows, **given)
                (batch,) = list(trainer.get_train_dataloader())
                trainer.model.train()

                def step(trainer: Any = trainer, batch: Any = batch) -> None:
                    with trainer.compute_loss_context_manager():
                        loss = trainer.compute_loss(trainer.model, dict(batch))
                    loss.backward()
                    trainer.model.zero_grad()

                seconds = clock(setting, step, 3)
            found[f"K{k}_{attention}"] = {"ms": round(1000 * seconds), **most}
            del model, trainer, step
            free()
    return found


class Phases(TrainerCallback):
    """Seconds of each phase of the last iteration, and its peak."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.seconds: dict[str, float] = {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.setting.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the phases of every PPOTrainer are timed."""
        with contextlib.ExitStack() as stack:
            for name in PHASES:
                stack.enter_context(
                    mock.patch.object(PPOTrainer, name, self.timed(getattr(PPOTrainer, name), name))
                )
            yield

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, its seconds noted."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            synchronize(self.setting)
            begun = time.perf_counter()
            result = function(*args, **kwargs)
            synchronize(self.setting)
            self.seconds[PHASES[name]] = round(time.perf_counter() - begun, 2)
            return result

        return watched


def whole_ppo(setting: Setting, *, lora: bool) -> dict[str, Any]:
    """Two iterations of `ppo`: phases of the second, peak, and the estimate that was printed."""
    size = setting.large if lora else setting.small
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_models(setting, size, folder, lora=lora)
        free()
        options: dict[str, Any] = {**LORA, "share_base": True, "dtype": "bfloat16"} if lora else {}
        phases, told = Phases(setting), io.StringIO()
        with phases.watching(), peak(setting) as found, contextlib.redirect_stdout(told):
            ppo(
                *(folder / "policy", folder / "rm", prompts(setting, 2 * setting.episodes)),
                folder / "ppo",
                callbacks=[phases],
                **ppo_options(setting, max_steps=2, save_strategy="no"),
                **options,
            )
    estimate = re.search(r"about ([\d,.]+) MB", told.getvalue())
    if estimate:
        found["estimated_GB"] = round(float(estimate[1].replace(",", "")) * 2**20 / 1e9, 3)
    return {"size": size, "episodes": setting.episodes, **phases.seconds, **found}


def ppo_options(setting: Setting, **options: Any) -> dict[str, Any]:
    """Options of a run whose rollout is one batch of two minibatches."""
    steps = 8 if setting.device == "cuda" else 1
    return {
        "max_prompt_length": setting.prompt,
        "response_length": setting.completion,
        "per_device_train_batch_size": setting.episodes // (2 * steps),
        "gradient_accumulation_steps": steps,
        "num_mini_batches": 2,
        "local_rollout_forward_batch_size": max(1, setting.episodes // 8),
        "rollout_batch_size": setting.episodes,
        "use_cpu": setting.device == "cpu",
        **QUIET,
        **options,
    }


def resume(setting: Setting) -> dict[str, Any]:
    """Entropies of three iterations: unbroken; killed after the second checkpoint and resumed."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_models(setting, setting.small, folder, lora=False)
        free()
        command = [sys.executable, __file__, "--resumable", str(folder), "--name"]
        told: Any = {"stdout": sys.stderr}
        subprocess.run([*command, "unbroken"], check=True, **told)
        killed = subprocess.Popen([*command, "killed"], **told)
        while killed.poll() is None and not (folder / "killed.2").exists():
            time.sleep(0.05)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        subprocess.run([*command, "killed"], check=True, **told)
        found = {
            name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
            for name in ("unbroken", "killed")
        }
    return {**found, "equal": found["unbroken"] == found["killed"]}


class Mark(TrainerCallback):
    """Leaves a file after each saved iteration."""

    def __init__(self, path: Path):
        self.path = path

    def on_save(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        self.path.with_suffix(f".{state.global_step}").touch()


def resumable(setting: Setting, folder: Path, name: str) -> None:
    """A run of three iterations with a checkpoint after each; its entropies in a file."""
    result = ppo(
        *(folder / "policy", count_words, prompts(setting, setting.episodes), folder / name),
        callbacks=[Mark(folder / name)],
        resume_from_checkpoint="auto",
        **ppo_options(
            setting, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1
        ),
    )
    state = json.loads((Path(result.path) / "trainer_state.json").read_text(encoding="utf-8"))
    metric = "objective/entropy"
    logged = [log[metric] for log in state["log_history"] if metric in log]
    (folder / f"{name}.json").write_text(json.dumps(logged), encoding="utf-8")


def free() -> None:
    """Give back what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "rates": rates,
    "sampling": sampling,
    "scoring": scoring,
    "update": update,
    "first_step": first_step,
    "reward_model": reward_model,
    "ppo_full": partial(whole_ppo, lora=False),
    "ppo_one_base": partial(whole_ppo, lora=True),
    "resume": resume,
}


def main() -> None:
    """Run the parts, a line of JSON each, until the time is up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--minutes", type=float, default=12.0, help="no part begins after these")
    parser.add_argument("--resumable", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--name", help=argparse.SUPPRESS)
    given = parser.parse_args()
    setting = GPU if torch.cuda.is_available() else CPU
    disable_progress_bars()
    if given.resumable:
        return resumable(setting, given.resumable, given.name)
    begun = time.monotonic()
    card = torch.cuda.get_device_name() if setting is GPU else "no GPU: sizes that show nothing"
    print(json.dumps({"card": card, "torch": torch.__version__}), flush=True)
    for name in given.parts:
        free()
        spent = time.monotonic() - begun
        line: dict[str, Any] = {"part": name}
        if spent > 60 * given.minutes:
            line["left out"] = f"{spent / 60:.0f} minutes were up"
        else:
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    line |= PARTS[name](setting)
            except Exception as error:  # the other parts are worth having
                line["error"] = f"{type(error).__name__}: {error}"
            line["seconds"] = round(time.monotonic() - begun - spent, 1)
        print(json.dumps(line), flush=True)
    return None


if __name__ == "__main__":
    main()
