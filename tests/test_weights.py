"""benchmarks/weights.py: a GGUF file with packed weights becomes a plain folder."""

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "weights.py"
WIDTH, HIDDEN, LAYERS = 32, 64, 1
SHAPES = {
    "token_embd": (300, WIDTH),
    "blk.0.attn_q": (WIDTH, WIDTH),
    "blk.0.attn_k": (WIDTH, WIDTH),
    "blk.0.attn_v": (WIDTH, WIDTH),
    "blk.0.attn_output": (WIDTH, WIDTH),
    "blk.0.ffn_gate": (HIDDEN, WIDTH),
    "blk.0.ffn_up": (HIDDEN, WIDTH),
    "blk.0.ffn_down": (WIDTH, HIDDEN),
}
TEMPLATE = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"


@pytest.fixture(scope="module")
def weights():
    spec = importlib.util.spec_from_file_location("weights", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def packed(tmp_path_factory, tokenizer):
    """A Llama of one layer in 4 bits, and what its matrices are once unpacked."""
    path = tmp_path_factory.mktemp("packed") / "tiny.Q4_1.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(300)
    letters = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)[:256]
    words = [*letters, "<end>", "ab", *(f"<{number}>" for number in range(258, 300))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * 256 + [3, 1] + [3] * 42)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(256)
    writer.add_chat_template(TEMPLATE)
    draws, unpacked = np.random.default_rng(0), {}
    for name, shape in SHAPES.items():
        kind = gguf.GGMLQuantizationType.Q4_1
        data = gguf.quants.quantize(draws.normal(size=shape).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
        unpacked[name] = torch.from_numpy(gguf.quants.dequantize(data, kind))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, unpacked


@pytest.mark.slow
def test_a_plain_folder(weights, packed, tmp_path):
    path, unpacked = packed
    weights.convert(path, tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto")
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    layer = model.model.layers[0]
    for name, found in {
        "token_embd": model.model.embed_tokens,
        "blk.0.attn_v": layer.self_attn.v_proj,
        "blk.0.ffn_down": layer.mlp.down_proj,
    }.items():
        torch.testing.assert_close(found.weight, unpacked[name].bfloat16())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert tokenizer("Bay")["input_ids"] == [ord(letter) - 33 for letter in "Bay"]
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<end>", TEMPLATE)


def test_the_packages_have_hashes(weights):
    """pip refuses a package whose hash differs."""
    lines = [x for x in weights.PACKAGES.read_text().splitlines() if not x.startswith("#")]
    assert len(lines) == len(weights.PLACES) == 3
    assert all("==" in line and len(line.partition("--hash=sha256:")[2]) == 64 for line in lines)
