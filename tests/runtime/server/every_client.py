"""Every client that we know of against one server: run by hand, since most of them are large.

    python -m venv clients
    clients/bin/pip install openai langchain-openai llm 'lm-eval[api]' vllm      # vllm is optional
    blt serve BUNDLE --served-model-name demo --port 8000
    clients/bin/python tests/runtime/server/every_client.py http://127.0.0.1:8000 --tokenizer TOKENIZER

TOKENIZER is a folder with the `tokenizer.json` of bytes that `blt push` writes; vLLM's benchmark client needs it. Each
check prints OK, or FAIL and the reason. A client that is not installed is SKIPPED. Exit code 1 if a check failed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Check = Callable[[], object]


class Checks:
    """Runs checks and counts those that failed."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, name: str, module: str, check: Check) -> None:
        if importlib.util.find_spec(module) is None:
            print(f"SKIPPED  {name}: {module} is not installed")
            return
        try:
            print(f"OK       {name}: {str(check())[:150]!r}", flush=True)
        except Exception as error:
            self.failed += 1
            print(f"FAIL     {name}: {type(error).__name__}: {str(error)[:1500]}", flush=True)


def openai_checks(check: Checks, url: str, model: str) -> None:
    def client() -> Any:
        import openai

        return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def completion(**options: Any) -> Any:
        return client().completions.create(model=model, max_tokens=20, temperature=0, **options)

    def chat(**options: Any) -> Any:
        messages = [{"role": "user", "content": "Hi"}]
        return client().chat.completions.create(model=model, messages=messages, max_tokens=10, temperature=0, **options)

    def parsed() -> Any:
        import pydantic

        size = pydantic.create_model("Size", name=(str, pydantic.Field(max_length=9)), size=(bool, ...))
        answer = client().chat.completions.parse(
            model=model, messages=[{"role": "user", "content": "x"}], response_format=size, max_tokens=200
        )
        return answer.choices[0].message.parsed

    def missing() -> str | None:
        import openai

        try:
            client().completions.create(model="another", prompt="x")
        except openai.NotFoundError as error:
            code = error.code
        else:
            code = "accepted"
        assert code == "model_not_found", code
        return code

    check("openai: models", "openai", lambda: [m.id for m in client().models.list()])
    check("openai: completion", "openai", lambda: completion(prompt="The runtime").choices[0].text)
    check("openai: stream", "openai", lambda: [c.choices[0].text for c in completion(prompt="Zoë", stream=True)])
    check("openai: ids", "openai", lambda: completion(prompt=[[69, 70]]).usage)
    check("openai: logprobs", "openai", lambda: completion(prompt="é", logprobs=2, echo=True).choices[0].logprobs)
    check("openai: chat", "openai", lambda: chat(logprobs=True, top_logprobs=2).choices[0].message.content)
    check("openai: chat stream", "openai", lambda: [c.choices[0].delta.content for c in chat(stream=True)])
    check("openai: parsed answer", "openai", parsed)
    check("openai: unknown model", "openai", missing)


def langchain_checks(check: Checks, url: str, model: str) -> None:
    def completion() -> Any:
        return importlib.import_module("langchain_openai").OpenAI(
            model=model, base_url=f"{url}/v1", api_key="none", max_tokens=10, temperature=0
        )

    def chat() -> Any:
        return importlib.import_module("langchain_openai").ChatOpenAI(
            model=model, base_url=f"{url}/v1", api_key="none", max_tokens=200, temperature=0
        )

    def structured() -> Any:
        schema = {"title": "size", "type": "object", "properties": {"big": {"type": "boolean"}}, "required": ["big"]}
        found = (
            chat().with_structured_output({**schema, "additionalProperties": False}, method="json_schema").invoke("hi")
        )
        assert set(found) == {"big"}
        return found

    check("langchain: completion", "langchain_openai", lambda: completion().invoke("The runtime"))
    check("langchain: stream", "langchain_openai", lambda: list(completion().stream("The runtime")))
    check("langchain: chat", "langchain_openai", lambda: chat().invoke("hi").usage_metadata)
    check("langchain: chat stream", "langchain_openai", lambda: [c.content for c in chat().stream("hi")])
    check("langchain: structured", "langchain_openai", structured)


def llm_checks(check: Checks, url: str, model: str) -> None:
    def ask(*options: str) -> str:
        with tempfile.TemporaryDirectory() as folder:
            entries = [
                {"model_id": "served", "model_name": model, "api_base": f"{url}/v1"},
                {"model_id": "served-completion", "model_name": model, "api_base": f"{url}/v1", "completion": True},
            ]
            Path(folder, "extra-openai-models.yaml").write_text(json.dumps(entries))
            return run([sys.executable, "-m", "llm", *options, "-o", "max_tokens", "12"], LLM_USER_PATH=folder)

    check("llm: chat", "llm", lambda: ask("-m", "served", "Hello"))
    check("llm: completion", "llm", lambda: ask("-m", "served-completion", "Hello", "--no-stream"))


TASK = """
task: served
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
"""


def lm_eval_checks(check: Checks, url: str, model: str) -> None:
    def evaluated() -> str:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder, "data.jsonl")
            rows = [{"question": f"{i} and one is", "choices": [f" {i + 1}", " zero"], "answer": 0} for i in range(4)]
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
            Path(folder, "served.yaml").write_text(TASK.replace("DATA", str(data)))
            arguments = f"model={model},base_url={url}/v1/completions,tokenizer_backend=remote,num_concurrent=4"
            command = ["-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
            text = run([sys.executable, *command, "--tasks", "served", "--include_path", folder], HF_HOME=folder)
            assert "|acc" in text.replace(" ", ""), text
            return next(line for line in text.splitlines() if "acc" in line)

    check("lm-eval: local-completions", "lm_eval", evaluated)


def vllm_checks(check: Checks, url: str, model: str, tokenizer: Path | None) -> None:
    def benchmark(endpoint: str, backend: str) -> str:
        assert tokenizer is not None, "give --tokenizer"
        script = (
            "from vllm.benchmarks.serve import add_cli_args, main; import argparse; p = argparse.ArgumentParser(); "
        )
        script += "add_cli_args(p); main(p.parse_args())"
        options = ["--backend", backend, "--base-url", url, "--endpoint", endpoint, "--model", model]
        options += ["--tokenizer", str(tokenizer), "--dataset-name", "random", "--random-input-len", "60"]
        options += ["--random-output-len", "40", "--num-prompts", "20", "--max-concurrency", "8", "--ignore-eos"]
        text = run([sys.executable, "-c", script, *options])
        found = [line for line in text.splitlines() if "Successful requests" in line]
        assert found, text
        assert found[0].split()[-1] == "20", text
        return "; ".join(
            " ".join(line.split()) for line in text.splitlines() if line.startswith(("Succ", "Mean", "Out"))
        )

    check("vllm bench serve: completions", "vllm", lambda: benchmark("/v1/completions", "openai"))
    check("vllm bench serve: chat", "vllm", lambda: benchmark("/v1/chat/completions", "openai-chat"))


def run(command: list[str], **environment: str) -> str:
    """What the command prints on stdout. Raises RuntimeError with its stderr if it fails."""
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {done.stderr[-1200:]}")
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokenizer", type=Path)
    options = parser.parse_args()
    check = Checks()
    for checks in (openai_checks, langchain_checks, llm_checks, lm_eval_checks):
        checks(check, options.url, options.model)
    vllm_checks(check, options.url, options.model, options.tokenizer)
    return int(check.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
