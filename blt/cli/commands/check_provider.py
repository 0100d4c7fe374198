"""`blt check BUNDLE --provider P` and `blt check ENGINES`: a model on a device, against a reference on the CPU."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from blt.cli import console, inputs, models, options
from blt_runtime.errors import CheckFailed, UsageError
from blt_runtime.ids import encode

if TYPE_CHECKING:
    from blt_runtime.bundle.manifest import Manifest

USUAL_BYTES = "64"
GREEDY = 32


def run(
    bundle: Path, how: options.ModelOptions, reference: Path | None, amount: int, text: bytes | None, as_json: bool
) -> None:
    """Compares and prints. Raises CheckFailed, UsageError, and what opening a model raises."""
    from blt.bench import bench_text
    from blt.evaluate import provider_check

    if not inputs.is_bundle(bundle):
        raise UsageError(f"--provider needs a bundle: blt export {bundle} -o DIR")
    started = time.monotonic()
    manifest, found = _computed(bundle)
    precision = max(found, key=provider_check.TOLERANCES.__getitem__)
    if reference is None and "bf16" in found:
        raise UsageError(f"{bundle} is of bf16, which no CPU runs: give its checkpoint, or a bundle, as --reference")
    if reference is None and inputs.is_engines(bundle):
        raise UsageError(
            f"{bundle} holds TensorRT engines: give the bundle that they were built from, or its checkpoint, as "
            "--reference"
        )
    if reference is not None:
        inputs.refuse_engines(reference, "--reference runs on the CPU; give a bundle or a checkpoint")
    ids = encode((text or bench_text(amount))[:amount], bos=True)
    room = manifest.spec.capacity_bytes - len(ids)
    if room < 0:
        raise UsageError(f"--bytes {amount:,}: {bundle} has room for {manifest.spec.capacity_bytes - 1:,}")
    with ExitStack() as stack:
        of_reference = reference is not None and not inputs.is_bundle(reference)
        on_device = replace(how, entropy_model=None, entropy_dtype=None) if of_reference else how
        candidate = stack.enter_context(models.open_model(bundle, on_device))
        on_cpu = replace(how, provider="cpu", trust_engines=False, engine_cache=None)
        other = stack.enter_context(models.open_model(reference or bundle, on_cpu, manifest.spec.capacity_bytes))
        if (
            other.spec.vocab_size != candidate.spec.vocab_size
            or other.spec.patch_rule.scheme != candidate.spec.patch_rule.scheme
        ):
            raise UsageError(f"--reference {reference}: another model than {bundle}")
        with console.progress("check", len(ids)) as advance:
            report = provider_check.compare(other, candidate, ids, precision, min(GREEDY, room), advance)
        provider = "engines" if inputs.is_engines(bundle) else getattr(candidate.backend, "provider", how.provider)
    seconds = round(time.monotonic() - started, 1)
    if as_json:
        head = {"ok": report.failure is None, "provider": provider, "precision": precision, "reference": reference}
        counts = {**asdict(report), "flips": report.flips, "seconds": seconds}
        console.print_json("blt.check-provider/1", {**head, **counts})
    else:
        of = "the bundle on the CPU" if reference is None else str(reference)
        entropies = "no entropy model"
        if report.entropies is not None:
            entropies = f"relative error {report.entropies:.1e}, largest {report.largest:.1e} nats"
        console.print_tree(
            {
                "model": f"{bundle}, {precision} on {provider}, against {of}, {seconds:g} s",
                "logits": f"relative error {report.logits:.1e} (tolerance {report.tolerance:g}), "
                f"{report.compared:,} positions",
                "entropies": entropies,
                "boundaries": f"{report.lost} lost, {report.new} new in {report.positions:,} positions, "
                f"{report.near} near the threshold",
                "greedy text": f"{report.agreement} of {report.greedy} bytes agree",
            }
        )
    if report.failure is not None:
        raise CheckFailed(f"{bundle} on {provider}: {report.failure}")


def _computed(path: Path) -> tuple[Manifest, set[str]]:
    """The manifest of a bundle, or of the bundle that engines were built from, and what its graphs are computed in.
    Raises BundleError."""
    from blt_runtime import Bundle
    from blt_runtime.bundle.engines import Engines

    if not inputs.is_engines(path):
        manifest = Bundle.open(path, "sizes").manifest
        return manifest, manifest.arithmetic()
    engines = Engines.read(path)
    return engines.manifest, engines.manifest.arithmetic() | ({"fp8"} if engines.file.flags.fp8 else set())
