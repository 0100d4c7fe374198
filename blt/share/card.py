"""The model card, README.md of a repository: metadata in YAML, then what is known about the model in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import yaml

from blt.data.quantities import amount, count
from blt.share.facts import CONTEXT, Facts, Score, Speed
from blt_runtime.errors import UsageError

FILE = "README.md"
MARK = "<!-- written by blt push -->"
"""In a card that nobody has edited: the next upload replaces it."""
MOST_ROWS = 20
"""Most groups and shards that a table lists."""
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")


def check_license(text: str) -> str:
    """The identifier of a licence, such as `apache-2.0`. Raises UsageError for anything else."""
    if not _LICENSE.fullmatch(text):
        raise UsageError(f"--license {text}: give the identifier that the hub uses, such as apache-2.0 or mit")
    return text.lower()


def render(name: str, facts: Facts, license: str | None = None) -> str:
    """The text of the card of the repository `name`.

    Example:
        text = card.render("owner/name", facts, license="apache-2.0")
    """
    title = name.split("/")[-1]
    sections = (
        ("Use", _use(name, facts)),
        ("Model", _model(facts)),
        ("Evaluation", _evaluation(facts.scores)),
        ("Speed", _speed(facts.speed)),
        ("Training data", _data(facts)),
        ("Licence", [f"`{license}`" if license else "No licence was given."]),
    )
    metadata = yaml.safe_dump(_metadata(title, facts, license), sort_keys=False, allow_unicode=True)
    intro = (
        "A Byte Latent Transformer: a language model over raw bytes, without a tokenizer. A small entropy model or "
        "another rule cuts the bytes into patches, and the large latent transformer runs once per patch."
    )
    body = "\n\n".join("\n".join((f"## {heading}", "", *lines)) for heading, lines in sections)
    return f"---\n{metadata}---\n\n{MARK}\n# {title}\n\n{intro}\n\n{body}\n"


def _metadata(title: str, facts: Facts, license: str | None) -> dict[str, Any]:
    tags = ["blt", "byte-latent-transformer", "byte-level", *(["onnx"] if facts.bundle is not None else [])]
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": score.text, "type": "text"},
            "metrics": [
                {
                    "type": "bits_per_byte",
                    "name": f"bits per byte ({score.subject})",
                    "value": round(score.bits_per_byte, 4),
                }
            ],
        }
        for score in facts.scores
    ]
    return {
        **({"license": license} if license else {}),
        "library_name": "blt-lm",
        "pipeline_tag": "text-generation",
        "tags": tags,
        **({"model-index": [{"name": title, "results": results}]} if results else {}),
    }


def _use(name: str, facts: Facts) -> Iterator[str]:
    extra = "cpu" if facts.bundle is not None else "train"
    yield from ("```", f"pip install 'blt-lm[{extra},hub]'", f'blt generate {name} "Once upon a time"', "```", "")
    yield "```python"
    if facts.bundle is not None:
        yield from (
            "from huggingface_hub import snapshot_download",
            "",
            "from blt_runtime import Model",
            "",
            f'folder = snapshot_download("{name}", allow_patterns="onnx/*")',
            'model = Model.open(f"{folder}/onnx")',
        )
    else:
        yield from ("from blt.generate.torch_backend import open_model", "", f'model = open_model("{name}")')
    yield from (
        'for text in model.generate_text("Once upon a time", 200):',
        '    print(text, end="", flush=True)',
        "```",
    )
    if facts.checkpoint == "hf":
        yield from ("", "The weights are in the format of `BltForCausalLM` of transformers.")
    if facts.lost:
        yield from ("", f"That format does not keep every setting: {', '.join(facts.lost)}.")
    if facts.checkpoint == "native":
        yield from ("", "The checkpoint is `model.pt`: transformers cannot represent this model.")
    yield from ("", "`tokenizer.json` maps bytes to ids (byte + 4) for programs that need a tokenizer.")


def _model(facts: Facts) -> Iterator[str]:
    rule = ", ".join(f"{key} {value}" for key, value in facts.rule.to_dict().items() if value not in (None, False))
    rows = {"patch rule": rule, "mean patch": "not measured"}
    if facts.patch_size is not None:
        rows["mean patch"] = f"{facts.patch_size:.2f} bytes"
    if (costs := facts.costs) is not None:
        rows["parameters"] = count(sum(costs.parameters.values()))
        rows |= {f"parameters, {part}": count(n) for part, n in costs.parameters.items()}
        size = f"patches of {costs.patch_size:.3g} bytes, rows of {CONTEXT:,} bytes"
        rows["FLOPs per byte"] = f"{count(costs.flops_per_byte)} ({size})"
    if (bundle := facts.bundle) is not None:
        size = amount(sum(entry.bytes for entry in bundle.files.values()))
        rows["bundle"] = f"{bundle.precision}, {size}, ONNX Runtime {bundle.min_onnxruntime} or newer"
        rows["capacity of the bundle"] = f"{bundle.spec.capacity_bytes:,} bytes"
    return _table(("", ""), rows.items())


def _evaluation(scores: tuple[Score, ...]) -> Iterator[str]:
    if not scores:
        return iter(["Bits per byte were not measured."])
    rows = (
        (s.subject, s.text, "unknown" if s.bytes is None else f"{s.bytes:,}", f"{s.bits_per_byte:.4f}") for s in scores
    )
    return _table(("model", "text", "bytes", "bits per byte"), rows)


def _speed(speed: Speed | None) -> list[str]:
    if speed is None:
        return ["Not measured."]
    patch = "" if speed.patch_size is None else f", mean patch {speed.patch_size:.2f} bytes"
    first = f"{1000 * speed.first_byte_s:,.1f} ms to the first byte after a prompt of {speed.prompt_bytes:,} bytes"
    machine = f"{speed.precision} on {speed.backend}, {speed.threads} threads, {_cell(speed.cpu)}"
    return [f"{speed.bytes_per_s:,.1f} bytes/s of one stream, {first}{patch}: {machine} (`blt bench latency`)."]


def _data(facts: Facts) -> Iterator[str]:
    if facts.trained_bytes is not None:
        yield from (f"The run was trained on {facts.trained_bytes:,} bytes (repetitions counted).", "")
    if facts.data is None:
        yield "The data was not recorded."
        return
    splits: Mapping[str, Any] = facts.data["splits"]
    rows = ((name, f"{s['bytes']:,}", f"{s['documents']:,}") for name, s in splits.items())
    yield from _table(("split", "bytes", "documents"), rows)
    yield ""
    groups = {(split, group): c["bytes"] for split, s in splits.items() for group, c in s["groups"].items()}
    largest = sorted(groups.items(), key=lambda item: -item[1])
    yield from _table(("split", "group", "bytes"), ((*key, f"{n:,}") for key, n in largest[:MOST_ROWS]))
    yield from _omitted(len(groups), "groups")
    shards = [(split, shard) for split, s in splits.items() for shard in s["shards"]]
    yield ""
    listed = ((split, s["name"], f"`{s['sha256']}`") for split, s in shards[:MOST_ROWS])
    yield from _table(("split", "shard", "sha256"), listed)
    yield from _omitted(len(shards), "shards")


def _omitted(total: int, what: str) -> list[str]:
    return ["", f"{total - MOST_ROWS:,} more {what} are not listed."] if total > MOST_ROWS else []


def _table(heading: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(heading)} |"
    yield f"|{'---|' * len(heading)}"
    for row in rows:
        yield f"| {' | '.join(_cell(str(value)) for value in row)} |"


def _cell(text: str) -> str:
    """A value that cannot end its cell or begin HTML: names of groups are names of somebody's files."""
    return re.sub(r"[|<>\[\]]", lambda found: f"&#{ord(found[0])};", " ".join(text.split()))
