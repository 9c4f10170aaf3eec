"""Tiny random models and a byte-level tokenizer, built in memory: CPU, no download, no cache."""

import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="trl-instruct-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from trl_instruct.configs import PPOConfig
from trl_instruct.console import silence_harmless_warnings
from trl_instruct.generation.logits import completion_logits, join, spread
from trl_instruct.logprobs import logprobs_in_parts
from trl_instruct.padding import right_padded_mask
from trl_instruct.ppo_trainer.trainer import PPOTrainer

CONTEXT = 128
PROMPTS = [f"{'long ' * (row % 3)}prompt {row}: " for row in range(16)]
# A quarter of the vocabulary ends a completion of `make_trainer`'s policy, so lengths differ.
STOPS = [256, *range(64)]
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "gpt_neox": {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT},
    "opt": {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
    },
    # rescale_every: with the default of 6, two layers are never rescaled
    "rwkv": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "context_length": CONTEXT,
        "rescale_every": 1,
    },
    "falcon_h1": {
        **{**LLAMA, "head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
        **{"mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 4},
    },
    "lfm2": {**LLAMA, "layer_types": ["conv", "full_attention"], "block_multiple_of": 1},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def pytest_configure():
    torch.set_num_threads(1)
    silence_harmless_warnings()


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@torch.no_grad()
def completion_logprobs(model, prompt_ids, prompt_lengths, completion_ids, lengths, *, temperature):
    """Log-probability of each completion token, `(B, C)` nats, 0 after the end."""
    logits = completion_logits(model, join(prompt_ids, prompt_lengths, completion_ids, lengths))
    mask = right_padded_mask(lengths, completion_ids.shape[1])
    return spread(logprobs_in_parts(logits, completion_ids[mask], temperature=temperature), mask)


def byte_tokenizer(pad_token="<pad>", chat_template=None):
    """One token per byte, ids 0-255, then <eos> 256 and <pad> 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<eos>", "<pad>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token=pad_token, padding_side="left"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(kind="llama", *, classifier=False, seed=0, **options):
    """A random model of an architecture with the byte tokenizer's 258 tokens, on CPU."""
    torch.manual_seed(seed)
    tokens = {"vocab_size": 258, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": 257}
    config = AutoConfig.for_model(
        kind,
        **{"init_std" if kind == "opt" else "initializer_range": 0.3},
        **{**tokens, **ARCHITECTURES.get(kind, LLAMA), **options},
    )
    if not classifier:
        return AutoModelForCausalLM.from_config(config)
    config.num_labels = len(options.get("id2label", "1"))
    return AutoModelForSequenceClassification.from_config(config)


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level, pad != eos, no chat template."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer():
    """The same with a chat template: `u:hello\\na:hi<eos>\\n`."""
    return byte_tokenizer(chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def eos_padded_tokenizer():
    """The same with pad == eos, as is usual for GPT-2."""
    return byte_tokenizer(pad_token="<eos>")


@pytest.fixture(scope="session")
def make_policy():
    """make_policy(kind="llama", *, seed=0, **config options): a fresh causal language model."""
    return tiny_model


@pytest.fixture(scope="session")
def make_reward_model():
    """make_reward_model(kind="llama", *, seed=0, ...): a fresh scalar sequence classifier."""

    def make(kind="llama", **options):
        return tiny_model(kind, classifier=True, **options)

    return make


@pytest.fixture
def policy():
    """A fresh tiny Llama causal language model."""
    return tiny_model()


@pytest.fixture
def reward_model():
    """A fresh tiny LlamaForSequenceClassification with one label."""
    return tiny_model(classifier=True, seed=1)


@pytest.fixture(scope="session")
def saved_policy(tmp_path_factory, tokenizer):
    """Folder with a tiny Llama policy and its tokenizer."""
    folder = tmp_path_factory.mktemp("policy")
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved_reward_model(tmp_path_factory, tokenizer):
    """Folder with a tiny Llama reward model and its tokenizer."""
    folder = tmp_path_factory.mktemp("reward_model")
    tiny_model(classifier=True, seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def ppo_config(tmp_path):
    """ppo_config(**options): a PPOConfig for quick CPU runs: 8 episodes per iteration, 4 tokens."""

    def make(**options):
        defaults = {
            "output_dir": str(tmp_path / "ppo"),
            "use_cpu": True,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "num_mini_batches": 2,
            "response_length": 4,
            "max_steps": 1,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "disable_tqdm": True,
            "report_to": "none",
        }
        return PPOConfig(**{**defaults, **options})

    return make


def letters(prompts, completions):
    return [text.count("e") + 0.1 * len(text) for text in completions]


@pytest.fixture(scope="session")
def prompts():
    """16 texts, the prompts of `make_trainer`."""
    return PROMPTS


@pytest.fixture
def make_trainer(ppo_config, tokenizer, make_policy, make_reward_model):
    """make_trainer(kind="llama", *, PPOTrainer arguments, **PPOConfig options)."""

    def make(kind="llama", **options):
        policy = make_policy(kind)
        policy.generation_config.eos_token_id = STOPS
        given = {
            "processing_class": tokenizer,
            "model": policy,
            "ref_model": None,
            "reward_model": letters,
            "train_dataset": Dataset.from_dict({"prompt": PROMPTS}),
            "value_model": make_reward_model(kind, seed=1),
            "ptx_dataset": None,
            "callbacks": None,
            "sampler": None,
            "gold": None,
        }
        given = {name: options.pop(name, default) for name, default in given.items()}
        return PPOTrainer(ppo_config(**options), **given)

    return make
