"""What vLLM is told and given, with a stand-in for TRL's class: no vLLM is needed.

`test_with_vllm.py` runs the real one.
"""

import inspect
import json
import sys
import weakref
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from trl.generation import vllm_generation

from trl_instruct.configs import CandidatesConfig, PPOConfig
from trl_instruct.errors import InputError
from trl_instruct.generation.engines import VLLMSampler
from trl_instruct.generation.sampler import SamplerError
from trl_instruct.generation.token_sampling import Sampling
from trl_instruct.ppo_trainer.losses import importance_weights
from trl_instruct.ppo_trainer.metrics import iteration_metrics
from trl_instruct.ppo_trainer.micro_batch import ppo_sums

REAL = vllm_generation.VLLMGeneration


def lora(**more):
    return LoraConfig(target_modules="all-linear", init_lora_weights=False, **more)


class LLM:
    """vLLM's engine; its model's folder is gone once it is made."""

    def __init__(self, **options):
        self.options = options
        self.config = json.loads((Path(options["model"]) / "config.json").read_text())
        self.calls = []

    def collective_rpc(self, method, kwargs):
        self.calls.append((method, dict(kwargs["weights_iterator"])))

    def reset_prefix_cache(self):
        self.calls.append("cache")


class Client:
    """TRL's client of a vLLM server that has died."""

    def update_named_params(self, metadata, params):
        raise ConnectionError(f"refused after {next(iter(params))[0]}")

    def generate(self, prompts, **given):
        raise ConnectionError(f"no answer to {len(prompts)}")


class Engine:
    """TRL's VLLMGeneration as far as the sampler uses it."""

    def __init__(self, model, accelerator, processing_class, **given):
        inspect.signature(REAL.__init__).bind(self, model, accelerator, processing_class, **given)
        self.given, self.mode, self.answers = given, given["mode"], []
        self.llm = vllm_generation.LLM(model=model.name_or_path, seed=0, logprobs_mode="processed")
        self.vllm_client, self.met = Client(), []

    def sync_weights(self):
        self.sent = dict(self._iter_named_params())
        if self.mode == "server" and self.met is not None:
            parts = iter(self.sent.items())
            self.vllm_client.update_named_params([], parts)
            self.met.append(("weights", [*parts]))

    def generate(self, prompts, images, num_generations):
        if self.mode == "server":
            found = self.vllm_client.generate(prompts=prompts, features=None)
            self.met.append(("prompts", found["completion_ids"]))
            return prompts, found["completion_ids"], found["logprobs"], None
        if not self.answers:
            raise RuntimeError("EngineCore died")
        self.asked, self.seed = prompts, torch.initial_seed()
        drawn = [self.answers.pop(0) for _ in prompts]
        return prompts, drawn, [[[None if i == 9 else -0.5] for i in ids] for ids in drawn], None


@pytest.fixture
def begun(monkeypatch, tokenizer):
    """begun(policy, **PPOConfig options): a sampler over the stand-in."""
    monkeypatch.setattr(vllm_generation, "VLLMGeneration", Engine)
    monkeypatch.setattr(vllm_generation, "LLM", LLM, raising=False)

    def begin(policy, **options):
        given = {"use_vllm": True, "report_to": "none", "use_cpu": True, "bf16": False}
        sampler = VLLMSampler(PPOConfig(**given | options))
        sampler.begin(policy, tokenizer, Accelerator(cpu=True))
        return sampler

    return begin


@pytest.mark.parametrize("there", [True, False])
def test_a_process_group_of_others_outlives_the_engine(
    begun, policy, tokenizer, monkeypatch, there
):
    """vLLM ends torch's group with its engine: not if accelerate had made it before."""
    sampler, ended = begun(policy), []
    state = ModuleType("parallel_state")
    state.destroy_distributed_environment = lambda: ended.append(True)
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", state)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: there)
    sampler.begin(policy, tokenizer, sampler.processes)
    state.destroy_distributed_environment()
    assert bool(ended) is not there


def test_trls_class_is_as_the_sampler_uses_it():
    """On both ends of the TRL range: its arguments, and the method that gives the weights."""
    known = inspect.signature(REAL.__init__).parameters
    assert {"gpu_memory_utilization", "server_base_url", "trust_remote_code"} <= known.keys()
    source = inspect.getsource(REAL)
    assert "self._iter_named_params()" in source and " LLM(" in source
    for name in ("vllm_client.update_named_params(", "vllm_client.generate("):
        assert f"self.{name}" in source
    for name in ("temperature", "max_completion_length", "generation_kwargs"):
        assert f"self.{name}" in inspect.getsource(REAL.generate)
    assert list(inspect.signature(REAL.generate).parameters)[1:4] == [
        *("prompts", "images", "num_generations")
    ]


def test_what_the_engine_is_told(begun, make_policy):
    policy = make_policy(tie_word_embeddings=True, dtype="float32")
    sampler = begun(policy, vllm_max_model_length=50, vllm_gpu_memory_utilization=0.5)
    llm = sampler.engine.llm
    assert llm.options["dtype"] is torch.float32 and llm.options["load_format"] == "dummy"
    assert llm.options["logprobs_mode"] == "processed"  # TRL's own are kept
    assert llm.config["tie_word_embeddings"] is False and policy.config.tie_word_embeddings
    assert not Path(llm.options["model"]).exists()
    own = {"max_model_length": 50, "gpu_memory_utilization": 0.5, "tensor_parallel_size": 1}
    own |= {"mode": "colocate", "model_impl": "vllm", "enable_sleep_mode": False}
    assert own.items() <= sampler.engine.given.items()


def test_a_server_gets_the_weights_as_trl_sends_them(begun, policy):
    address = {"server_base_url": "http://a:1", "server_timeout": 2.0, "group_port": 3}
    sampler = begun(policy, vllm_mode="server", **{f"vllm_{k}": v for k, v in address.items()})
    assert (address | {"mode": "server"}).items() <= sampler.engine.given.items()
    sampler.engine.met = None
    sampler.follow()
    assert sampler.engine.sent.keys() == policy.state_dict().keys()


@pytest.mark.parametrize(
    ("call", "told", "met"),
    [
        (lambda one: one.follow(), "did not take the new weights .ConnectionError: refused", []),
        (
            lambda one: one.draw([[20]] * 2, Sampling(4)),
            "failed .ConnectionError: no answer",
            [[0]] * 2,
        ),
    ],
)
def test_a_server_that_fails_lets_the_processes_meet(begun, policy, call, told, met):
    """The collectives of TRL's class are done, its weights gathered, before the error is raised."""
    sampler = begun(policy, vllm_mode="server")
    with pytest.raises(SamplerError, match=told):
        call(sampler)
    assert [found for _, found in sampler.engine.met] == [met]


def test_the_engine_is_freed_with_its_sampler(begun, policy):
    sampler = begun(policy)
    engine = weakref.ref(sampler.engine)
    del sampler
    assert engine() is None


def test_it_gets_every_weight_and_the_head_if_it_is_tied(begun, make_policy):
    policy = make_policy(tie_word_embeddings=True)
    sampler = begun(policy)
    sampler.follow()
    (method, sent), cache = sampler.engine.llm.calls
    assert (method, cache) == ("reload_weights", "cache")
    assert sent.keys() == policy.state_dict().keys()
    torch.testing.assert_close(sent["lm_head.weight"], sent["model.embed_tokens.weight"])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_is_merged_out_of_place(begun, make_policy, kind):
    """As peft's own merge, and the base is not touched."""
    torch.manual_seed(0)
    policy = get_peft_model(make_policy(kind), lora())
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    sent = dict(begun(policy).weights())
    for name, weight in policy.state_dict().items():
        assert torch.equal(weight, before[name])
    merged = policy.merge_and_unload()
    assert sent.keys() == merged.state_dict().keys()
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(sent[name], weight)


def test_a_head_that_an_adapter_trains_whole(begun, make_policy):
    policy = get_peft_model(make_policy(), LoraConfig(modules_to_save=["lm_head"]))
    head = policy.get_base_model().lm_head.modules_to_save["default"].weight
    head.data.fill_(3.0)
    sent = dict(begun(policy).weights())
    assert sent["lm_head.weight"].eq(3.0).all()
    assert not [name for name in sent if "modules" in name or "base" in name]


def test_completions_and_why_they_ended(begun, policy):
    policy.generation_config.eos_token_id = [256, 7]
    sampler = begun(policy)
    sampler.engine.answers = [[1, 2, 3, 4], [5, 256], [9, 1, 2, 7], [1, 97]]
    seen = []
    torch.manual_seed(1)
    how = Sampling(4, temperature=0.5, stop_strings=["a"])
    drawn = sampler.draw([[20], [21, 22]], how, copies=2, progress=seen.append)
    assert drawn.completion_ids.tolist() == [
        *([1, 2, 3, 4], [5, 256, 256, 256], [9, 1, 2, 7], [1, 97, 256, 256])
    ]
    assert drawn.completion_lengths.tolist() == [4, 2, 4, 2]
    assert drawn.ended.tolist() == [False, True, True, True]
    own = [[-0.5] * 4, [-0.5, -0.5, 0, 0], [torch.nan, -0.5, -0.5, -0.5], [-0.5, -0.5, 0, 0]]
    torch.testing.assert_close(drawn.logprobs, torch.tensor(own), equal_nan=True)
    engine = sampler.engine
    assert engine.asked == [[20], [20], [21, 22], [21, 22]] and seen == [4]
    assert (engine.temperature, engine.max_completion_length) == (0.5, 4)
    assert engine.generation_kwargs == {
        **{"stop_token_ids": [256, 7], "ignore_eos": True, "stop": ["a"]}
    }


def test_the_seed_follows_the_run_and_leaves_its_numbers_alone(begun, policy):
    sampler = begun(policy)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        sampler.engine.answers = [[1], [1]]
        sampler.draw([[20]], Sampling(4))
        first = sampler.engine.seed
        sampler.draw([[20]], Sampling(4))
        found.append((first, sampler.engine.seed, torch.rand(1).item()))
    assert found[0] == found[1] != found[2] and found[0][0] != found[0][1]


def test_policies_that_it_cannot_be_given(begun, policy, make_policy):
    for how in (
        lora(use_dora=True),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ):
        with pytest.raises(InputError, match="use_vllm with this adapter"):
            begun(get_peft_model(make_policy(), how))
    policy.lm_head.weight = torch.nn.Parameter(torch.ones(3, dtype=torch.int8), False)
    with pytest.raises(InputError, match="in full precision only"):
        begun(policy)


def test_engines_that_fail(begun, policy, monkeypatch, tokenizer):
    sampler = begun(policy)
    with pytest.raises(SamplerError, match=r"vLLM failed \(RuntimeError: EngineCore died\)\. Lea"):
        sampler.draw([[20]], Sampling(4))
    for name in ("vllm_mode", "vllm_tensor_parallel_size"):
        given = {name: {"vllm_mode": "server"}.get(name, 2), "use_vllm": True, "report_to": "none"}
        with pytest.raises(InputError, match="are for ppo"):
            VLLMSampler(CandidatesConfig(**given)).begin(policy, tokenizer)
    monkeypatch.setattr(vllm_generation, "LLM", None)
    with pytest.raises(SamplerError, match="vLLM did not start"):
        begun(policy)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"vllm_mode": "server"}, "vllm_mode is not an option here: use_vllm is not set"),
        ({"vllm_importance_sampling_clip_max": 2.0}, "the policy draws without bf16"),
        ({"use_vllm": True, "vllm_server_timeout": 1.0}, "vllm_mode is not server"),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_tensor_parallel_size": 2},
            "tell it to the server",
        ),
        ({"use_vllm": True, "rollout_batch_size": 8}, "vLLM makes its batches itself"),
        ({"use_vllm": True, "vllm_gpu_memory_utilization": 0.0}, "it must be above 0"),
    ],
)
def test_options_that_the_sampler_would_ignore(options, told):
    with pytest.raises(InputError, match=told):
        PPOConfig(report_to="none", **options)
    if "clip_max" in str(options):  # under mixed precision the policy rounds otherwise as it draws
        PPOConfig(report_to="none", use_cpu=True, bf16=True, **options)


# ---- the update stays sound ----------------------------------------------------------------------


def test_weights_of_tokens_that_another_program_drew():
    """p = 0.2 where 0.4 drew: half; p = 0.9 where 0.1 drew: 9, cut to 3."""
    own, drawn = torch.tensor([0.2, 0.9, 0.5]).log(), torch.tensor([0.4, 0.1, 0.5]).log()
    weights = importance_weights(own, drawn, clip_max=3.0)
    torch.testing.assert_close(weights, torch.tensor([0.5, 3.0, 1.0]))
    drawn[1] = torch.nan
    torch.testing.assert_close(
        importance_weights(own, drawn, clip_max=3.0), torch.tensor([0.5, 1.0, 1.0])
    )


@pytest.mark.parametrize(("correct", "factor"), [(True, 2.0), (False, 1.0)])
def test_the_policy_loss_is_weighted_by_token(make_trainer, begun, policy, correct, factor):
    """Sampled twice as often as the policy would: each token counts half."""
    options = {"use_vllm": True, "vllm_importance_sampling_correction": correct}
    trainer = make_trainer(sampler=begun(policy), **options)
    trainer.sampler.engine.answers = [[20 + i, 30 + i, 256] for i in range(4)] * 2
    rollout = trainer.score(trainer.sample([0, 1, 2, 3]), [0, 1, 2, 3])
    rollout = rollout._replace(sampler_logprobs=rollout.logprobs + torch.tensor(2.0).log())
    advantages = torch.randn(rollout.mask.shape, generator=torch.Generator().manual_seed(0))
    given = rollout, advantages, rollout.values
    sums = ppo_sums(trainer.model, *given, args=trainer.args)
    plain = -(advantages * rollout.mask).sum()  # the ratio is 1
    torch.testing.assert_close(sums["loss/policy"].detach(), plain / factor)
    measured = iteration_metrics(trainer.accelerator, rollout, *[rollout.values] * 2, kl_coef=0.0)
    assert measured["sampling/logprob_diff"] == pytest.approx(torch.tensor(2.0).log().item())


def test_without_a_samplers_log_probabilities_nothing_is_weighted(make_trainer):
    trainer = make_trainer()
    rollout = trainer.score(trainer.sample([0, 1]), [0, 1])
    assert rollout.sampler_logprobs is None
    measured = iteration_metrics(trainer.accelerator, rollout, *[rollout.values] * 2, kl_coef=0.0)
    assert not [name for name in measured if name.startswith("sampling/")]


def test_a_completion_that_vllm_would_cut_is_refused():
    sampler = VLLMSampler(PPOConfig(report_to="none", use_vllm=True, vllm_max_model_length=8))
    sampler.engine = None
    with pytest.raises(SamplerError, match="vllm_max_model_length is 8, .* may take 9 tokens"):
        sampler.generate([[1, 2, 3], [1, 2, 3, 4, 5]], Sampling(4), 0)
