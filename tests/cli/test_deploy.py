"""What deploys `blt serve` (Dockerfile, systemd unit, docs/deploy.md): options, files, probes and times are those that
exist."""

from __future__ import annotations

import configparser
import inspect
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from blt.cli import models
from blt.cli.commands import serve
from blt_runtime.errors import UsageError
from blt_runtime.server import Settings, create_app, run, workers
from tests.runtime.bundles import write_bundle
from tests.runtime.server.clients import Client, null_model
from tests.runtime.server.servers import served

REPO = Path(__file__).resolve().parents[2]
DOCKERFILE = (REPO / "Dockerfile").read_text()
UNIT = (REPO / "runtime/examples/blt-serve.service").read_text()
DOCS = (REPO / "docs/deploy.md").read_text()
ENDING_SECONDS = run.CLOSING_SECONDS + workers.KILL_SECONDS
"""After the drain, within which all workers are gone."""
DRAIN = inspect.signature(serve.serve).parameters["drain"].default

Call = Callable[..., Any]


def manifest() -> dict[str, Any]:
    (text,) = re.findall(r"^```yaml\n(.*?)^```", DOCS, re.MULTILINE | re.DOTALL)
    pod: dict[str, Any] = yaml.safe_load(text)["spec"]["template"]["spec"]
    return pod


def unit() -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(UNIT)
    return dict(parser["Service"])


def instruction(name: str) -> list[str]:
    """The words of an instruction in the JSON form."""
    (text,) = re.findall(rf"^(?:    )?{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)
    words: list[str] = json.loads(text)
    return words


ENTRYPOINT = instruction("ENTRYPOINT")
(PORT,) = re.findall(r"^ENV .*\bBLT_PORT=(\d+)$", DOCKERFILE, re.MULTILINE)
DOCKER_RUNS = [
    shlex.split(line) for line in DOCS.replace("\\\n", "").splitlines() if line.startswith("docker run")
]  # options of the server follow the image's name
COMMANDS = {
    "Dockerfile": ENTRYPOINT,
    "unit": shlex.split(unit()["ExecStart"]),
    "Kubernetes": [*ENTRYPOINT, *manifest()["containers"][0]["args"]],
    **{f"docker run {at}": [*ENTRYPOINT, *words[words.index("blt") + 1 :]] for at, words in enumerate(DOCKER_RUNS)},
}


@pytest.mark.parametrize("name", COMMANDS)
def test_options_are_those_of_blt_serve(name: str, blt: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command gets as far as the address, with all its values read."""

    def bind(host: str, port: int) -> None:
        raise UsageError(f"it would listen on {host}, port {port}")

    monkeypatch.setattr(run, "bind", bind)
    monkeypatch.setattr(models, "check_batched", lambda *_: None)
    write_bundle(tmp_path / "bundle")
    key = tmp_path / "key"
    key.write_text("secret\n")
    words = [f"@{key}" if word.startswith("@") else word for word in COMMANDS[name]]
    assert words[0].rpartition("/")[2] == "blt"
    assert words[1:3] in (["serve", "/bundle"], ["serve", "/srv/blt/bundle"])
    host = "127.0.0.1" if name == "unit" else "0.0.0.0"
    if name != "unit":
        assert "--port" not in words
        monkeypatch.setenv("BLT_PORT", "8123")
    shown = blt("serve", tmp_path / "bundle", *words[3:])
    assert shown.code == 2
    assert f"it would listen on {host}, port {8000 if name == 'unit' else 8123}\n" in shown.err


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) == 5


def test_a_container_listens_on_all_addresses_as_another_user_than_root() -> None:
    assert ENTRYPOINT[3:5] == ["--host", "0.0.0.0"]
    (user,) = re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)
    assert int(user) > 0
    assert manifest()["securityContext"]["runAsUser"] == int(user)
    assert f"--uid {user} " in DOCKERFILE


def test_the_image_needs_what_the_wheels_are_built_from_and_no_torch() -> None:
    extras = set(re.search(r"blt_lm-\*\.whl\)\[([\w,]+)\]", DOCKERFILE)[1].split(","))  # type: ignore[index]
    assert extras == {"cpu", "serve", "grammar"}
    ignored = (REPO / ".dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    assert {source for line in copied for source in line.split()} == kept
    assert all((REPO / source).exists() for source in kept)
    for folder in (Path(), Path("runtime")):
        project = tomllib.loads((REPO / folder / "pyproject.toml").read_text())
        packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
        named = ["pyproject.toml", project["project"]["readme"], *project["project"]["license-files"], *packages]
        assert {str(folder / name) for name in named} <= kept


def test_the_health_check_passes_while_the_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    program = instruction("CMD")
    assert program[:2] == ["python", "-c"]
    check = compile(program[2], "HEALTHCHECK", "exec")
    with served() as (url, process):
        monkeypatch.setenv("BLT_PORT", url.rpartition(":")[2])
        exec(check, {})
        process.kill()
        process.wait()
        with pytest.raises(OSError, match="refused"):
            exec(check, {})


def test_probes_ask_addresses_that_answer() -> None:
    app = create_app(null_model(), Settings(name="tiny", streams=1))
    client = Client(app)
    container = manifest()["containers"][0]
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/health",
        "liveness": "/health",
        "readiness": "/ready",
    }
    assert {str(probe["port"]) for probe in probes.values()} == {PORT}
    assert f"EXPOSE {PORT}\n" in DOCKERFILE
    assert {client.get(probe["path"]).status_code for probe in probes.values()} == {200}
    app.state.service.scheduler.close()


def test_nothing_is_killed_before_it_has_drained() -> None:
    command = COMMANDS["unit"]
    assert float(command[command.index("--drain") + 1]) == DRAIN
    assert float(unit()["TimeoutStopSec"]) > DRAIN + ENDING_SECONDS
    pod = manifest()
    pause = float(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pause + DRAIN + ENDING_SECONDS
    (stop,) = [words[words.index("--stop-timeout") + 1] for words in DOCKER_RUNS if "--stop-timeout" in words]
    assert float(stop) > DRAIN + ENDING_SECONDS


def test_the_unit_drains_at_sigterm_and_takes_its_exit_code_for_success() -> None:
    found = unit()
    assert found["KillSignal"] == "SIGTERM"
    assert found["KillMode"] == "mixed"  # the parent alone
    assert found["SuccessExitStatus"] == "143"
    assert found["ProtectSystem"] == "strict"
    (credential,) = re.findall(r"@%d/(\S+)", found["ExecStart"])
    assert found["LoadCredential"].split(":")[0] == credential


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    file = tmp_path / "blt-serve.service"
    file.write_text(UNIT.replace("/opt/blt/bin/blt", "/bin/true"))
    verify = ["systemd-analyze", "verify", "--man=no", str(file)]
    done = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert (done.returncode, [line for line in done.stderr.splitlines() if file.name in line]) == (0, [])
