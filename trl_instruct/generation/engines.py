"""Samplers that are programs of their own: transformers' continuous batching, and vLLM."""

import copy
import math
import sys
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import GenerationConfig, generation

from trl_instruct.configs import SamplingConfig
from trl_instruct.errors import InputError, needs_extra, summary
from trl_instruct.generation.sampler import Rows, Sampler, SamplerError
from trl_instruct.generation.sampling import TransformersSampler
from trl_instruct.generation.token_sampling import Sampling, caches_rows
from trl_instruct.models.properties import evaluating, unwrapped
from trl_instruct.models.sharding import MIXED
from trl_instruct.types import Model, Tokenizer

PAGE = 256  # tokens


def sampler_of(options: Any = None) -> Sampler:
    """The sampler that a stage's config asks for, or the policy itself; it has not begun."""
    if options is not None and options.use_vllm:
        return VLLMSampler(options)
    paged = options is not None and options.use_transformers_continuous_batching
    return PagedSampler() if paged else TransformersSampler()


def begun(policy: Model, tokenizer: Tokenizer, options: Any = None) -> Sampler:
    """The same, ready to sample from a policy that does not change."""
    sampler = sampler_of(options)
    sampler.begin(policy, tokenizer)
    sampler.follow()
    return sampler


class PagedSampler(Sampler):
    """The policy draws, its cache in pages (`generate_batch`), and says how likely each token was.

    It computes in the precision of the weights: autocast does not reach its thread.
    """

    def begin(
        self, policy: Model, tokenizer: Tokenizer, accelerator: Accelerator | None = None
    ) -> None:
        """As in `Sampler`."""
        self.config: Any = getattr(generation, "ContinuousBatchingConfig", object)
        if not {"return_logprobs", "seed"} <= {*dir(self.config)}:
            raise InputError("use_transformers_continuous_batching needs a newer transformers.")
        if not caches_rows(policy):
            raise InputError(
                "use_transformers_continuous_batching pages keys and values; this policy remembers "
                "something else too (a recurrent state, virtual tokens). Leave it out."
            )
        super().begin(policy, tokenizer, accelerator)

    @torch.no_grad()
    def generate(self, asked: list[list[int]], sampling: Sampling, seed: int) -> tuple[Rows, Any]:
        """As in `Sampler`."""
        if sampling.stop_strings:
            raise SamplerError("Continuous batching stops at no stop_strings. Leave one out.")
        how = GenerationConfig(
            **{"max_new_tokens": sampling.response_length, "temperature": sampling.temperature},
            **{"do_sample": True, "top_k": 0, "top_p": 1.0, "eos_token_id": self.eos_token_ids},
            pad_token_id=self.eos_token_ids[0],
        )
        rows = min(sampling.batch_size, len(asked))
        room = {"max_memory_percent": 0.5}
        if self.policy.device.type == "cpu":  # by itself it would take half of all memory
            longest = max(map(len, asked)) + sampling.response_length
            room = {"num_blocks": rows * (1 + math.ceil(longest / PAGE)), "page_size": PAGE}
        config = self.config(return_logprobs=True, seed=seed, max_requests_per_batch=rows, **room)
        with (
            evaluating(self.policy),
            _failing("generate_batch failed", "use_transformers_continuous_batching"),
        ):
            found = [*self.policy.generate_batch(asked, how, config).values()]
        faults = [one.error for one in found if one.error is not None]
        if faults or len(found) < len(asked):
            raise SamplerError(f"generate_batch failed: {[*faults, 'its thread ended'][0]}.")
        return [one.generated_tokens for one in found], [one.logprobs for one in found]


class VLLMSampler(Sampler):
    """Draws with vLLM. The options, a stage's config, are those of TRL's GRPOConfig."""

    def __init__(self, options: SamplingConfig):
        self.options = options

    def begin(
        self, policy: Model, tokenizer: Tokenizer, accelerator: Accelerator | None = None
    ) -> None:
        """As in `Sampler`."""
        check_policy(policy)
        server, size = self.options.vllm_mode == "server", self.options.vllm_tensor_parallel_size
        if accelerator is None and (server or size > 1):
            raise InputError("vllm_mode server, vllm_tensor_parallel_size are for ppo. Omit them.")
        self.processes = accelerator or Accelerator()
        super().begin(policy, tokenizer, self.processes)
        self.saved = policy.state_dict().keys()  # not the buffers that a config tells
        names = [field.name for field in fields(SamplingConfig) if field.name.startswith("vllm_")]
        given = {name.removeprefix("vllm_"): getattr(self.options, name) for name in names}
        given["trust_remote_code"] = self.options.trust_remote_code
        in_group = torch.distributed.is_initialized()
        with needs_extra("vllm"):
            from trl.generation import vllm_generation
        with (
            tempfile.TemporaryDirectory() as folder,
            _failing("vLLM did not start"),
            _engine_options(vllm_generation, self._write_model(folder)),
        ):
            arguments = policy, self.processes, tokenizer
            self.engine: Any = vllm_generation.VLLMGeneration(*arguments, **given)
        # TRL's merges LoRA in place and out again: the base, which other roles may share, would be
        # rounded each time. The engine does not hold this sampler: it is freed with it.
        me = weakref.proxy(self)
        self.engine._iter_named_params = partial(VLLMSampler.weights, me)
        if self.engine.mode == "colocate" and self.processes.device.type == "cpu":
            # On a CPU vLLM packs its weights; TRL's way of loading finds no place for new ones.
            self.engine.sync_weights = partial(VLLMSampler._reload, me)
        if self.engine.mode == "colocate" and in_group:
            # vLLM ends torch's process group with its engine, even one that was there before.
            state = vars(sys.modules["vllm.distributed.parallel_state"])
            state["destroy_distributed_environment"] = lambda: None
        self.faults: list[Exception] = []  # of the server, until the processes have met
        if server and self.processes.is_main_process:
            client = self.engine.vllm_client
            for name in ("update_named_params", "generate"):
                setattr(client, name, _deferred(getattr(client, name), self.faults))

    def _write_model(self, folder: str) -> dict[str, Any]:
        """A model without weights for the engine, and what VLLMGeneration does not tell it."""
        bare = unwrapped(self.policy)
        config = copy.deepcopy(bare.config)
        config.architectures = [type(bare).__name__]
        # A tied head would keep the old weights when new ones are loaded (vLLM 0.32).
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
        config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        # By itself vLLM computes float32 models in bfloat16: log-probabilities differ by 0.03.
        dtype = MIXED.get(self.processes.mixed_precision, self.policy.dtype)
        return {"model": folder, "dtype": dtype, "load_format": "dummy"}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights by their names in the architecture, LoRA merged out of place."""
        lora = {n: part for n, part in self.policy.named_modules() if isinstance(part, LoraLayer)}
        parameters = self.policy.named_parameters(remove_duplicate=False)  # the head, also if tied
        for name, weight in chain(parameters, self.policy.named_buffers()):
            name = name.replace("_checkpoint_wrapped_module.", "")
            owner, _, kind = name.rpartition(".")
            layer = lora.get(owner.removesuffix(".base_layer"))
            if name not in self.saved or ".lora_" in name or "original_module" in name:
                continue
            data = weight.data
            if layer is not None and kind == "weight":
                known = (*layer.lora_A, *layer.lora_embedding_A)
                active = [adapter for adapter in layer.active_adapters if adapter in known]
                more = (layer.get_delta_weight(adapter).float() for adapter in active)
                data = sum(more, data.float()).to(data)
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            yield name.replace(".modules_to_save.default.", "."), data

    def _reload(self) -> None:
        weights = {"weights_iterator": self.weights()}
        self.engine.llm.collective_rpc("reload_weights", kwargs=weights)
        self.engine.llm.reset_prefix_cache()

    @torch.no_grad()
    def follow(self) -> None:
        """As in `Sampler`."""
        with _failing("vLLM did not take the new weights", deferred=self.faults):
            self.engine.sync_weights()

    @torch.no_grad()
    def generate(self, asked: list[list[int]], sampling: Sampling, seed: int) -> tuple[Rows, Any]:
        """As in `Sampler`. On a server, the draws of a resumed run are others."""
        engine, strings = self.engine, sampling.stop_strings
        most, size = self.options.vllm_max_model_length, self.options.vllm_tensor_parallel_size
        together = size > 1 or self.options.vllm_mode == "server"  # engine.generate gathers
        longest = max(map(len, asked)) + sampling.response_length
        longest = max(gather_object([longest])) if together else longest
        if most is not None and longest > most:  # vLLM would cut completions, and not say so
            raise SamplerError(
                f"vllm_max_model_length is {most}, and a prompt with its completion may take "
                f"{longest} tokens. Raise it, or lower max_prompt_length or response_length."
            )
        engine.temperature, engine.max_completion_length = sampling.temperature, sampling[0]
        engine.generation_kwargs = {"stop_token_ids": self.eos_token_ids, "ignore_eos": True}
        engine.generation_kwargs |= {"stop": [*strings]} if strings else {}
        if size > 1:  # one engine: one seed
            seed = gather_object([seed])[self.processes.process_index // size * size]
        # vLLM seeds itself once. In this process it draws from torch's generator; a seed in the
        # request would draw the same completion for the same prompt.
        torch.manual_seed(seed)
        with _failing("vLLM failed", deferred=self.faults):
            _, rows, logprobs, _ = engine.generate(asked, images=None, num_generations=1)
        return rows, [[best for best, *_ in row] for row in logprobs]


def check_policy(policy: Model) -> None:
    """InputError for a policy whose weights vLLM cannot be given."""
    if not all(weight.is_floating_point() for weight in policy.parameters()):
        told = "with load_in_8bit or load_in_4bit: vLLM takes new weights in full precision only"
        raise InputError(f"use_vllm {told}. Leave one of them out.")
    config = policy.active_peft_config if isinstance(policy, PeftModel) else LoraConfig()
    more = ("use_dora", "lora_bias", "target_parameters", "trainable_token_indices")
    if not isinstance(config, LoraConfig) or any(getattr(config, name, None) for name in more):
        raise InputError(
            f"use_vllm with this adapter ({type(config).__name__}): it is merged for vLLM, which "
            f"can be done for plain LoRA alone. Leave out {', '.join(more)}, or use_vllm."
        )


@contextmanager
def _engine_options(module: Any, options: dict[str, Any]) -> Iterator[None]:
    """Inside, the engine that VLLMGeneration makes gets these options too."""
    engine = getattr(module, "LLM", None)
    module.LLM = lambda **given: engine(**given | options)  # type: ignore[misc]
    try:
        yield
    finally:
        module.LLM = engine


def _deferred(call: Callable[..., Any], faults: list[Exception]) -> Callable[..., Any]:
    """The call; an error in it is kept, so that this process still meets the others."""

    def run(*given: Any, **named: Any) -> Any:
        try:
            return call(*given, **named)
        except Exception as error:
            faults.append(error)
            deque((weight for part in given if isinstance(part, Iterator) for weight in part), 0)
            rows: list[Any] = [[0]] * len(named.get("prompts", ()))
            return {"prompt_ids": rows, "completion_ids": rows, "logprobs": [[[None]]] * len(rows)}

    return run


@contextmanager
def _failing(
    what: str, option: str = "use_vllm", deferred: Sequence[Exception] = ()
) -> Iterator[None]:
    """Turn any error of an engine, one that was deferred too, into a SamplerError."""
    try:
        yield
        for error in deferred:
            raise error
    except Exception as error:
        told = f"{what} ({type(error).__name__}: {summary(error)})"
        raise SamplerError(f"{told}. Leave {option} out to sample without it.") from error
