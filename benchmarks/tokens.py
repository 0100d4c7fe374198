"""A BLT against a token model of equal FLOPs per byte: bytes per second on the same machine.

    pip install onnxruntime-genai transformers
    python benchmarks/tokens.py --folder DIR                 # shape M, float32, int8 and int4, batch 1 and 8
    python benchmarks/tokens.py --folder DIR --shape S --precisions fp32 --batches 1

The token model is a Llama with the dim and number of layers (`llama_of`) whose FLOPs per byte are closest to those of
the BLT with its entropy model. onnxruntime-genai's model builder makes its graph, and its generator runs it: past and
present share a buffer, and the output layer runs for the last position of a prompt only. Vocabulary and bytes per token
are those published for the tokenizers of Llama 3 (128,256; 4.4) or Llama 2 (32,000; 3.7). The output layer counts.

All weights are random. Speed does not depend on their values, but quality does, so this script does not compare the
quality of text. The BLT reads English text in patches of about 4.5 bytes, for which its threshold is chosen. The token
model reads random tokens, as many as the text has bytes divided by bytes per token. Both choose the likeliest id.

Each engine runs in a separate process, one at a time. Every round runs all of them; the table has medians over the
rounds. The floor is the read bandwidth, measured between the rounds, divided by the weight bytes that one byte reads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from blt.bench import Forced, Text, at_patch_size, batch_run, bench_text, run, with_changes
from blt.bench.machine import MemoryReader, available_cores
from blt.model import TransformerConfig
from blt_runtime.engine.batch import SHARE, SLICE

MEAN_PATCH, CONTEXT = 4.5, 2048
TOKENIZERS = {"llama3": (128_256, 4.4), "llama2": (32_000, 3.7)}
"""Vocabulary and bytes per token, from the BLT paper (section 4.2; arXiv 2412.09871)."""
BLOCKS = {"int8": 128, "int4": 32}
"""Weights that share a scale, as in `blt export`, so that a weight has the same number of bits in both models."""
HEAD, STEPS, ASPECT = 64, (128, 64), (32, 128)
MAX_TOKENS, WARM_UP = 1024, 8
FIRST_TOKEN = 4  # below are special ones


@dataclass(frozen=True)
class Llama:
    """A token model: Llama's block with as many key heads as heads, and separate input and output embeddings."""

    dim: int
    layers: int
    vocabulary: int

    @property
    def stack(self) -> TransformerConfig:
        return TransformerConfig(dim=self.dim, n_layers=self.layers, n_heads=self.dim // HEAD)

    def weights_read(self) -> int:
        """Weights that one token reads: all matrices, and one row of the embedding."""
        return self.layers * self.stack.layer_params() + self.dim * (self.vocabulary + 2)

    def flops_per_byte(self, bytes_per_token: float, context: int = CONTEXT) -> float:
        """Forward FLOPs of one byte in a row of `context` bytes: 2 per weight of the blocks and of the output layer,
        and attention over the mean number of earlier tokens."""
        stack = self.stack
        attention = stack.attention_flops(stack.visible_keys(max(1, round(context / bytes_per_token))))
        return (2.0 * (stack.matmul_params() + self.vocabulary * self.dim) + attention) / bytes_per_token


def llama_of(flops_per_byte: float, vocabulary: int, bytes_per_token: float) -> Llama:
    """The Llama with the closest FLOPs per byte, among those 32 to 128 times as wide as deep.

    Its dim is a multiple of 128, or of 64 if no multiple of 128 is within 1 %. Raises ValueError if none is within
    5 %, because the output layer is too large.
    """

    def error(model: Llama) -> float:
        return abs(model.flops_per_byte(bytes_per_token) / flops_per_byte - 1)

    for step in STEPS:
        widest = int(flops_per_byte * bytes_per_token / (2 * vocabulary))  # the output layer alone
        shapes = [
            Llama(dim, layers, vocabulary)
            for dim in range(step, widest, step)
            for layers in range(-(-dim // ASPECT[1]), dim // ASPECT[0] + 1)
        ]
        best = min(shapes, key=error, default=None)
        if best and error(best) < 0.01:
            return best
    if best is None or error(best) > 0.05:
        raise ValueError(f"no Llama of {vocabulary:,} tokens has about {flops_per_byte / 1e6:.1f} MFLOPs per byte")
    return best


def blt_flops(shape: str) -> float:
    """Forward FLOPs per byte of a shape, entropy model included."""
    from generation import configs

    blt, entropy = configs(shape)
    return float(blt.flops_per_byte(MEAN_PATCH, CONTEXT) + entropy.flops_per_byte(CONTEXT))


def share_of_floor(bytes_per_s: float, weight_bytes: float, bandwidth: float) -> float:
    """Share of the speed that the read bandwidth allows if each byte of text reads `weight_bytes`."""
    return bytes_per_s * weight_bytes / bandwidth


# --- building: existing models in the folder are kept -------------------------------------------------------


def build_blt(a: argparse.Namespace, precision: str) -> None:
    from generation import CAPACITY, make_checkpoint

    from blt_export import export

    folder = bundle_of(a, precision)
    if not folder.exists():
        export(make_checkpoint(a.shape), folder, capacity=CAPACITY, precision=precision, check=False)


def build_llama(a: argparse.Namespace, precision: str) -> None:
    """A random checkpoint in Hugging Face's format, then onnxruntime-genai's model builder."""
    source, folder = llama_folder(a, "hf"), llama_folder(a, precision)
    if (folder / "genai_config.json").exists():
        return
    if not (source / "tokenizer.json").exists():
        save_llama(llama_for(a), source)
    genai_builder(source, folder, precision)


def genai_builder(source: Path, folder: Path, precision: str) -> None:
    """onnxruntime-genai's graph of a Llama in Hugging Face's format."""
    options = ["prune_lm_head=true", "hf_token=false"]
    if precision in BLOCKS:
        options += [f"block_size={BLOCKS[precision]}"]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(folder)]
    command += ["-p", precision, "-e", "cpu", "-c", str(folder / "cache"), "--extra_options", *options]
    subprocess.run(command, check=True, stdout=sys.stderr)


def save_llama(model: Llama, folder: Path) -> None:
    """Random weights, float32."""
    import torch

    torch.manual_seed(0)
    save_with_tokenizer(empty_llama(model.stack, model.vocabulary, MAX_TOKENS), folder)


def empty_llama(stack: TransformerConfig, vocabulary: int, positions: int) -> Any:
    """transformers' Llama of this shape, with its own initial weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=stack.dim,
            intermediate_size=stack.hidden_dim,
            num_hidden_layers=stack.n_layers,
            num_attention_heads=stack.n_heads,
            num_key_value_heads=stack.kv_heads,
            max_position_embeddings=positions,
            rms_norm_eps=stack.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": stack.rope_theta},
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def save_with_tokenizer(llama: Any, folder: Path) -> None:
    """Saves a Llama with a tokenizer of one word: onnxruntime-genai's builder needs a file, and nothing here reads
    it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    llama.save_pretrained(folder)
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(folder)


def bundle_of(a: argparse.Namespace, precision: str) -> Path:
    return Path(a.folder) / f"blt-{a.shape}-{precision}"


def llama_folder(a: argparse.Namespace, what: str) -> Path:
    return Path(a.folder) / f"llama-{a.shape}-{a.tokenizer}-{what}"


def llama_for(a: argparse.Namespace) -> Llama:
    return llama_of(blt_flops(a.shape), *TOKENIZERS[a.tokenizer])


# --- engines: each runs in a separate process ---------------------------------------------------------------------


def run_blt(a: argparse.Namespace, precision: str, batch: int) -> dict[str, float]:
    from blt.bench.weight_bytes import bundle_weight_bytes
    from blt_runtime import Bundle, Model

    size, folder = a.prompt_bytes + a.new_bytes, bundle_of(a, precision)
    data = bench_text(batch * size)
    texts = [Text.of(data[i : i + size], a.prompt_bytes, a.new_bytes) for i in range(0, len(data), size)]
    opened = Model.open(folder, threads=a.threads, verify="sizes")
    model = at_patch_size(
        opened, texts, MEAN_PATCH, by_rises=batch > 1
    )  # different texts with about the same patch sizes
    per_call = bundle_weight_bytes(Bundle.open(folder, "sizes"), 1)
    if batch == 1:
        return one_stream(model, texts[0], per_call)
    return batched_streams(
        Model.open(folder, threads=a.threads, verify="sizes", batched=True), model.spec, texts, per_call
    )


def one_stream(model: Any, text: Any, per_call: dict[str, float]) -> dict[str, float]:
    warm = Text(text.prompt, text.new[:WARM_UP])
    run(model.stream(), warm, Forced(warm.new.tolist(), 0.0))
    done = run(model.stream(), text, Forced(text.new.tolist(), 0.0))
    return {
        "bytes_per_s": done.bytes_per_s,
        "first_byte_s": done.first_byte_s,
        "weight_bytes": per_call["total"] - per_call["latent"] * (1 - 1 / done.mean_patch),
        "mean_patch": done.mean_patch,
    }


def batched_streams(model: Any, spec: Any, texts: list[Text], per_call: dict[str, float]) -> dict[str, float]:
    """All texts in one batch on a scheduler, measured while all of them are generated."""
    found = batch_run(with_changes(model, spec=spec), texts, temperature=0.0, share=SHARE, slice=SLICE)
    per_round = sum(per_call[name] for name in ("entropy", "encoder", "decoder"))
    read = found.done.rounds * per_round + found.done.latent_calls * per_call["latent"]
    return {
        "bytes_per_s": found.bytes_per_s,
        "first_byte_s": max(found.first_bytes_s),
        "weight_bytes": read / len(found.gaps_s) + per_call.get("hash tables", 0.0),
        "mean_patch": found.mean_patch,
    }


def run_llama(a: argparse.Namespace, precision: str, batch: int) -> dict[str, float]:
    from blt.bench.weight_bytes import graph_weight_bytes

    vocabulary, bytes_per_token = TOKENIZERS[a.tokenizer]
    folder = llama_folder(a, precision)
    found = generate_tokens(
        folder, vocabulary=vocabulary, bytes_per_token=bytes_per_token, prompt_bytes=a.prompt_bytes,
        new_bytes=a.new_bytes, batch=batch, threads=a.threads,
    )  # fmt: skip
    return {**found, "weight_bytes": graph_weight_bytes(folder / "model.onnx") / (bytes_per_token * batch)}


def generate_tokens(
    folder: Path,
    *,
    vocabulary: int,
    bytes_per_token: float,
    prompt_bytes: int,
    new_bytes: int,
    batch: int,
    threads: int,
) -> dict[str, float]:
    """Bytes/s and the time of the first token of onnxruntime-genai, on `batch` prompts of random tokens."""
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    options = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    model, random = og.Model(config), np.random.default_rng(0)
    prompt_BT = random.integers(FIRST_TOKEN, vocabulary, (batch, round(prompt_bytes / bytes_per_token)))
    generate(og, model, prompt_BT, WARM_UP)
    first_byte_s, gaps_s = generate(og, model, prompt_BT, round(new_bytes / bytes_per_token))
    return {"bytes_per_s": batch * bytes_per_token * len(gaps_s) / sum(gaps_s), "first_byte_s": first_byte_s}


def generate(og: Any, model: Any, prompt_BT: np.ndarray, new: int) -> tuple[float, list[float]]:
    """Seconds of the prompt and the first token, then of each further token of all rows."""
    params = og.GeneratorParams(model)
    params.set_search_options(batch_size=len(prompt_BT), max_length=MAX_TOKENS, do_sample=False)
    generator = og.Generator(model, params)
    stamps = [time.perf_counter()]
    generator.append_tokens(prompt_BT.astype(np.int32))
    for _ in range(new):
        if generator.is_done():
            raise SystemExit("the random model ended its text: take another seed")
        generator.generate_next_token()
        generator.get_next_tokens()
        stamps.append(time.perf_counter())
    gaps_s = np.diff(stamps).tolist()
    return gaps_s[0], gaps_s[1:]


# --- the run -----------------------------------------------------------------------------------------------

ENGINES = {"blt": (build_blt, run_blt), "llama": (build_llama, run_llama)}


def child(a: argparse.Namespace, *what: object, script: str = __file__) -> Any:
    """Runs the script again for one step and parses its last line, JSON."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(a.threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, script, *sys.argv[1:], "--child", ",".join(map(str, what))]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        sys.exit(f"benchmark child {what} failed with {result.returncode}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def run_child(a: argparse.Namespace) -> None:
    step, engine, precision, batch = a.child.split(",")
    build, measured = ENGINES[engine]
    print(json.dumps(build(a, precision) if step == "build" else measured(a, precision, int(batch))))


def measure(a: argparse.Namespace, cases: list[tuple[str, str, int]]) -> dict[str, Any]:
    """Runs all cases in each round and measures the read bandwidth between the rounds."""
    runs: dict[tuple[str, str, int], list[dict[str, float]]] = {case: [] for case in cases}
    reader = MemoryReader(a.threads)
    reader.sample()
    for turn in range(a.repeat):
        for case in cases:
            runs[case].append(child(a, "run", *case))
            print(f"round {turn + 1}, {case}: {runs[case][-1]['bytes_per_s']:.1f} bytes/s", file=sys.stderr)
        reader.sample()
    reader.close()
    rows = []
    for (engine, precision, batch), results in runs.items():
        row = {name: statistics.median(result[name] for result in results) for name in results[0]}
        share = share_of_floor(row["bytes_per_s"], row["weight_bytes"], reader.best.bytes_per_s)
        rows.append({"engine": engine, "precision": precision, "batch": batch, **row, "share_of_floor": share})
    return {"read_bandwidth": asdict(reader.best), "rows": rows, "load_average": os.getloadavg()}


def report(a: argparse.Namespace, found: dict[str, Any]) -> None:
    bandwidth, model = found["read_bandwidth"]["bytes_per_s"], llama_for(a)
    vocabulary, bytes_per_token = TOKENIZERS[a.tokenizer]
    print(f"BLT shape {a.shape}: {blt_flops(a.shape) / 1e6:.1f} MFLOPs per byte, patches of {MEAN_PATCH} bytes")
    print(f"Llama: {model.flops_per_byte(bytes_per_token) / 1e6:.1f} MFLOPs per byte; dim {model.dim}, ", end="")
    print(f"{model.layers} layers, vocabulary {vocabulary:,}, {bytes_per_token} bytes per token")
    print(f"{a.threads} threads, {a.prompt_bytes} bytes of prompt, {a.new_bytes} new; medians of {a.repeat}; ", end="")
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s, load average {found['load_average'][0]:.1f}\n")
    print("| precision | batch | engine | weights per byte | floor, bytes/s | bytes/s | of floor | first byte |")
    print("|---" * 8 + "|")
    order = {(r["precision"], r["batch"], r["engine"]): r for r in found["rows"]}
    for (precision, batch, engine), r in order.items():
        cells = [precision, batch, engine, f"{r['weight_bytes'] / 1e6:.0f} MB", f"{bandwidth / r['weight_bytes']:.1f}"]
        cells += [f"{r['bytes_per_s']:.1f}", f"{r['share_of_floor']:.0%}", f"{1e3 * r['first_byte_s']:.0f} ms"]
        print("| " + " | ".join(map(str, cells)) + " |")
    print()
    for (precision, batch, engine), r in order.items():
        other = order.get((precision, batch, "llama"))
        if engine == "blt" and other:
            print(f"{precision}, batch {batch}: BLT over Llama {r['bytes_per_s'] / other['bytes_per_s']:.2f} times")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="for both models, kept and reused (about 10 GB for M)")
    parser.add_argument("--shape", choices=("S", "M"), default="M")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="llama3")
    parser.add_argument("--engines", default="blt,llama")
    add_arguments(parser, precisions="fp32,int8,int4")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def add_arguments(parser: argparse.ArgumentParser, precisions: str) -> None:
    """What is run, and how often. precisions: the default."""
    parser.add_argument("--precisions", default=precisions)
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--prompt-bytes", type=int, default=512)
    parser.add_argument("--new-bytes", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)


def main() -> None:
    a = parse()
    engines, precisions = a.engines.split(","), a.precisions.split(",")
    if "llama" in engines and find_spec("onnxruntime_genai") is None:
        sys.exit("onnxruntime-genai is missing: pip install onnxruntime-genai transformers, or run with --engines blt")
    if a.child:
        run_child(a)
        return
    for engine in engines:
        for precision in precisions:
            child(a, "build", engine, precision, 1)
    cases = [(e, p, int(b)) for p in precisions for b in a.batches.split(",") for e in engines]
    found = measure(a, cases)
    if a.json:
        a.json.write_text(json.dumps({"settings": {**vars(a), "json": str(a.json)}, **found}, indent=1))
    report(a, found)


if __name__ == "__main__":
    main()
