"""A folder of engines runs unchanged, for its user and its GPU; everything else is one clear line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from blt_runtime import Bundle
from blt_runtime.bundle import engines as stored
from blt_runtime.bundle.bundle import is_bundle
from blt_runtime.bundle.engines import Engines, EnginesFile, Flags, Machine, Plan, Profile, Rows, is_engines
from blt_runtime.bundle.manifest import Parity
from blt_runtime.bundle.spec import resident_spec
from blt_runtime.errors import BackendError, BundleError, UsageError, VersionError
from tests.runtime.bundles import write_bundle

H100 = Machine("10.15.1", "NVIDIA H100", "9.0", "580.1", "13.0")
A100 = replace(H100, gpu="NVIDIA A100", compute_capability="8.0")
OTHER_USER = 4242


def write_engines(folder: Path, rows: int | None = None, **changes: Any) -> EnginesFile:
    """A complete folder, whose plans are arbitrary bytes, signed with this user's key."""
    manifest = write_bundle(folder)
    spec = resident_spec(manifest.spec, cached=True)

    def plan_of(name: str, file: str, streams: int) -> Plan:
        content = f"plan {file.removesuffix('.plan')}".encode()
        (folder / file).write_bytes(content)
        profile: Profile = {"ids": ((streams, 1), (streams, 1), (streams, 32))}
        digest = hashlib.sha256(content).hexdigest()
        return Plan(file, len(content), digest, (profile,), dict(spec.graphs[name].aliases))

    for name in spec.graphs:
        (folder / manifest.graphs[name].file).unlink()
    plans = {name: plan_of(name, f"{name}.plan", 1) for name in spec.graphs}
    if rows is not None:
        changes["rows"] = Rows(rows, {name: plan_of(name, f"{name}.rows.plan", rows) for name in spec.graphs})
    bundle = hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
    parity = (Parity("entropy", 1e-6, 2e-5, 64),)
    file = replace(EnginesFile(bundle, {"blt": "0.1.0"}, H100, Flags(), plans, parity), **changes)
    stored.make_key()
    stored.write(folder, file)
    return file


@pytest.fixture(autouse=True)
def _own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_engines(tmp_path / "engines")
    return tmp_path / "engines"


def fails(folder: Path, kind: type[Exception], text: str, **options: Any) -> None:
    with pytest.raises(kind, match=text) as caught:
        Engines.open(folder, **options)
    assert "\n" not in str(caught.value)


def test_engines_survive_the_disk(folder: Path) -> None:
    engines = Engines.open(folder)
    assert engines.file == write_engines(folder)
    assert engines.spec.resident
    assert engines.plans()["latent"].plan == b"plan latent"
    assert len(engines.bundle.hash_tables()["encoder"]) == 100


def test_the_former_name_of_errors_is_read(folder: Path) -> None:
    """Files of earlier versions do not say how they are measured."""
    wanted = Engines.open(folder).file.parity
    path = folder / "engines.json"
    data = json.loads(path.read_text())
    (row,) = data["parity"]
    row["max_abs_error"] = row.pop("error")
    del row["measure"]
    path.write_text(json.dumps(data))
    assert Engines.read(folder).file.parity == wanted
    assert wanted[0].measure is None


def test_engines_of_batched_streams(tmp_path: Path) -> None:
    file = write_engines(tmp_path / "engines", rows=16)
    engines = Engines.open(tmp_path / "engines")
    assert engines.file == file
    assert engines.check_rows().streams == 16
    assert engines.plans(rows=True)["latent"].plan == b"plan latent.rows"
    assert engines.plans()["latent"].plan == b"plan latent"


def test_a_folder_without_them_names_the_command(folder: Path) -> None:
    with pytest.raises(UsageError) as caught:
        Engines.open(folder).plans(rows=True)
    assert str(caught.value) == (
        f"{folder} holds no engines for batched streams: "
        f"run blt build BUNDLE -o {folder} --force --profiles step,prefill,rows=16"
    )


def test_a_folder_of_the_first_version(folder: Path) -> None:
    """It says nothing of batched streams and of plans without weights."""

    def change(data: dict[str, Any]) -> None:
        data.update(version=1)
        del data["rows"], data["weights"], data["flags"]["strip"]
        for plan in data["plans"].values():
            del plan["graph"]

    edit(folder, change)
    file = Engines.open(folder, trust=True).file
    assert (file.rows, file.weights, file.flags.strip) == (None, (), False)


def test_engines_are_no_bundle(folder: Path, tmp_path: Path) -> None:
    assert is_engines(folder)
    assert not is_bundle(folder)
    with pytest.raises(BundleError, match="holds TensorRT engines: give the bundle"):
        Bundle.open(folder)
    write_bundle(tmp_path / "bundle")
    assert not is_engines(tmp_path / "bundle")
    assert not is_engines(tmp_path / "nothing")


class TestWhoBuiltIt:
    def test_nobody_but_the_user_can_read_the_key(self, folder: Path) -> None:
        key = stored.key_file()
        assert key.stat().st_mode & 0o777 == 0o600
        before = key.read_bytes()
        stored.make_key()
        assert key.read_bytes() == before
        assert [path.name for path in key.parent.iterdir()] == ["engines.key"]

    def test_a_key_that_others_can_read_is_refused(self, folder: Path) -> None:
        stored.key_file().chmod(0o640)
        fails(folder, BackendError, "not a key that only this user can read")

    @pytest.mark.parametrize("made", [False, True])
    def test_engines_of_another_key_are_refused_unless_trusted(self, folder: Path, made: bool) -> None:
        """Also by a user who has never built any."""
        stored.key_file().unlink()
        if made:
            stored.make_key()
        fails(folder, BackendError, "was not built here: run blt build")
        assert Engines.open(folder, trust=True).plans()["encoder"].plan == b"plan encoder"

    def test_a_key_is_written_or_there_is_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
        with pytest.raises(UsageError, match=r"cannot write the key that signs engines, .*: Not a directory"):
            stored.make_key()

    def test_another_owner_is_refused(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if os.geteuid() == 0:
            os.chown(folder / "latent.plan", OTHER_USER, -1)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: OTHER_USER)
        fails(folder, BackendError, "belongs to another user: run blt build", trust=True)

    @pytest.mark.parametrize("name", [".", "latent.plan", "engines.json"])
    @pytest.mark.parametrize("mode", [0o020, 0o002], ids=["group", "world"])
    def test_files_that_others_can_write_are_refused(self, folder: Path, name: str, mode: int) -> None:
        path = folder / name
        path.chmod(path.stat().st_mode | mode)
        fails(folder, BackendError, "other users can write to .*: chmod -R go-w", trust=True)

    def test_links_are_refused(self, folder: Path, tmp_path: Path) -> None:
        (folder / "latent.plan").rename(tmp_path / "latent.plan")
        (folder / "latent.plan").symlink_to(tmp_path / "latent.plan")
        fails(folder, BackendError, "latent.plan in .* is a link", trust=True)

    def test_a_new_folder_is_closed_for_others(self, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            write_engines(tmp_path / "open")
        finally:
            os.umask(before)
        assert Engines.open(tmp_path / "open").file.machine == H100


class TestChanges:
    """No byte may change."""

    @pytest.mark.parametrize("trust", [False, True])
    def test_of_a_plan(self, folder: Path, trust: bool) -> None:
        (folder / "latent.plan").write_bytes(b"plan LATENT")
        engines = Engines.open(folder, trust=trust)
        with pytest.raises(BundleError, match=r"latent.plan was changed .*: run blt build"):
            engines.plans()
        (folder / "latent.plan").write_bytes(b"plan")
        fails(folder, BundleError, "latent.plan has 4 bytes instead of 11: run blt build", trust=trust)
        (folder / "latent.plan").unlink()
        fails(folder, BundleError, "latent.plan is missing", trust=trust)

    @pytest.mark.parametrize("name", ["manifest.json", "hash_tables.npy"])
    def test_of_the_bundle(self, folder: Path, name: str) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-2] ^= 1
        (folder / name).write_bytes(content)
        kind, text = (BundleError, f"{name} was changed") if name[0] == "h" else (BundleError, "manifest.json")
        fails(folder, kind, text, trust=True)
        fails(folder, kind, text)

    def test_of_the_manifest_in_a_value(self, folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(path.read_text().replace('"blt": "0.1.0"', '"blt": "0.1.9"'))
        fails(folder, BundleError, "manifest.json in .* was changed .*: run blt build", trust=True)

    @pytest.mark.parametrize("change", ["plan LATENT.rows", "plan"], ids=["content", "size"])
    def test_of_a_plan_of_batched_streams(self, tmp_path: Path, change: str) -> None:
        folder = tmp_path / "engines"
        write_engines(folder, rows=2)
        (folder / "latent.rows.plan").write_text(change)
        with pytest.raises(BundleError, match=r"latent.rows.plan (was changed|has 4 bytes) .*: run blt build"):
            Engines.open(folder).plans(rows=True)

    @pytest.mark.parametrize(
        ("key", "value"),
        [("machine", {"gpu": "x"}), ("flags", {"hardware": "ampere+"}), ("hmac", "0" * 64), ("hmac", 7)],
    )
    def test_of_what_engines_json_says(self, folder: Path, key: str, value: Any) -> None:
        def change(data: dict[str, Any]) -> None:
            data[key] = {**data[key], **value} if isinstance(value, dict) else value

        edit(folder, change)
        fails(folder, BackendError, "was not built here: run blt build")


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "engines.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


REFUSED: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda d: d.update(format="x"), "is not of the format 'blt-engines'"),
    (lambda d: d.update(version="1"), "no valid version number"),
    (lambda d: d.update(surprise=1), "unknown key 'surprise'"),
    (lambda d: d.pop("parity") and d.pop("machine"), "lacks the key 'machine'"),
    (lambda d: d["plans"]["latent"].update(bytes="1"), r"plans.latent.bytes must be int"),
    (lambda d: d["plans"]["latent"].update(file="../latent.plan"), "names '../latent.plan' instead of latent.plan"),
    (lambda d: d["plans"]["latent"].update(profiles=[{"ids": 3}]), "profiles.*must be a list"),
    (lambda d: d["plans"]["latent"].update(aliases={}), "has other caches of the graph 'latent'"),
    (lambda d: d["plans"].pop("latent"), "has other graphs than manifest.json"),
    (lambda d: d.update(rows={"streams": 2, "plans": {}}), "has other graphs than manifest.json"),
    (lambda d: d.update(rows={"streams": 2, "plans": d["plans"]}), "names 'entropy.plan' instead of entropy.rows.plan"),
    (lambda d: d.update(rows={"streams": "2", "plans": {}}), r"rows.streams must be int"),
    (lambda d: d["flags"].update(strip=True), "does not say whether entropy.plan has weights"),
    (lambda d: d["plans"]["latent"].update(graph="00"), "does not say whether latent.plan has weights"),
    (lambda d: d.update(weights=["../x"]), "names '../x', which is no file of the bundle"),
    (lambda d: d["flags"].update(hardware="any"), "must be 'same' or 'ampere\\+'"),
]


@pytest.mark.parametrize(("change", "text"), REFUSED, ids=range(len(REFUSED)))
def test_engines_json_is_read_strictly(folder: Path, change: Callable[[dict[str, Any]], Any], text: str) -> None:
    edit(folder, change)
    fails(folder, BundleError, text, trust=True)


def test_engines_json_of_a_newer_version(folder: Path) -> None:
    edit(folder, lambda data: data.update(version=3))
    fails(folder, VersionError, "engines have format version 3, .*: upgrade blt-runtime", trust=True)


def test_engines_json_that_is_none(folder: Path) -> None:
    (folder / "engines.json").write_text("{")
    fails(folder, BundleError, "is not valid JSON")


class TestWhereItRuns:
    """Both are named, and the command that helps."""

    @pytest.mark.parametrize("here", [replace(H100, tensorrt="10.16.0"), A100], ids=["version", "gpu"])
    def test_elsewhere_is_refused(self, folder: Path, here: Machine) -> None:
        engines = Engines.open(folder)
        engines.check_machine(replace(H100, driver="590", cuda="13.1"))
        with pytest.raises(BackendError) as caught:
            engines.check_machine(here)
        assert str(caught.value) == f"the engines in {folder} are for {H100}, but here is {here}: " + (
            f"run blt build BUNDLE -o {folder}"
        )

    def test_engines_for_ampere_run_on_ampere_and_later(self, tmp_path: Path) -> None:
        write_engines(tmp_path / "engines", flags=Flags("ampere+"))
        engines = Engines.open(tmp_path / "engines")
        engines.check_machine(A100)
        with pytest.raises(BackendError, match=r"but here is TensorRT 10.15.1 on T4"):
            engines.check_machine(replace(H100, gpu="T4", compute_capability="7.5"))
