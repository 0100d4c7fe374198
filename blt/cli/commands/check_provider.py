"""`blt check BUNDLE --provider P`: a bundle on a device, against the same bundle on the CPU."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from blt.cli import console, inputs, models, options
from blt_runtime.errors import CheckFailed, UsageError
from blt_runtime.ids import encode

USUAL_BYTES = "64"
GREEDY = 32


def run(
    bundle: Path, how: options.ModelOptions, reference: Path | None, amount: int, text: bytes | None, as_json: bool
) -> None:
    """Compares and prints. Raises CheckFailed, UsageError, and what opening a model raises."""
    from blt.bench import bench_text
    from blt.evaluate import provider_check
    from blt_runtime import Bundle

    if not inputs.is_bundle(bundle):
        raise UsageError(f"--provider needs a bundle: blt export {bundle} -o DIR")
    manifest, started = Bundle.open(bundle, "sizes").manifest, time.monotonic()
    found = manifest.arithmetic()
    precision = max(found, key=provider_check.TOLERANCES.__getitem__)
    if reference is None and "bf16" in found:
        raise UsageError(f"{bundle} is of bf16, which no CPU runs: give its checkpoint, or a bundle, as --reference")
    ids = encode((text or bench_text(amount))[:amount], bos=True)
    room = manifest.spec.capacity_bytes - len(ids)
    if room < 0:
        raise UsageError(f"--bytes {amount:,}: {bundle} has room for {manifest.spec.capacity_bytes - 1:,}")
    with ExitStack() as stack:
        candidate = stack.enter_context(models.open_model(bundle, how))
        on_cpu = replace(how, provider="cpu")
        other = stack.enter_context(models.open_model(reference or bundle, on_cpu, manifest.spec.capacity_bytes))
        if (
            other.spec.vocab_size != candidate.spec.vocab_size
            or other.spec.patch_rule.scheme != candidate.spec.patch_rule.scheme
        ):
            raise UsageError(f"--reference {reference}: another model than {bundle}")
        with console.progress("check", len(ids)) as advance:
            report = provider_check.compare(other, candidate, ids, precision, min(GREEDY, room), advance)
        provider = getattr(candidate.backend, "provider", how.provider)
    seconds = round(time.monotonic() - started, 1)
    if as_json:
        head = {"ok": report.failure is None, "provider": provider, "precision": precision, "reference": reference}
        console.print_json("blt.check-provider/1", {**head, **asdict(report), "seconds": seconds})
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
                "boundaries": f"{report.flips} of {report.positions:,} moved, {report.near} near the threshold",
                "greedy text": f"{report.agreement} of {report.greedy} bytes agree",
            }
        )
    if report.failure is not None:
        raise CheckFailed(f"{bundle} on {provider}: {report.failure}")
