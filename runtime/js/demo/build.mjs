// node build.mjs BUNDLE OUT [--force]: writes a folder for any static host: the demo page, a bundle, the modules and
// onnxruntime-web. Nothing is written unless all of them are there; --force replaces an earlier OUT.

import { chmod, cp, mkdir, mkdtemp, readFile, readdir, rename, rm, stat } from "node:fs/promises";
import { basename, dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { BltError, BundleError, MANIFEST, UsageError, readManifest } from "../bundle.js";

const demo = dirname(fileURLToPath(import.meta.url)), js = dirname(demo);
const library = join(js, "node_modules", "onnxruntime-web", "dist");
const server = join(dirname(js), "blt_runtime", "server", "page");
const FILES = [
  [demo, ".", ["index.html", "demo.css", "demo.js"]],
  [server, ".", ["page.css", "drawing.js", "controls.js"]],
  [js, "blt", ["blt.js", "bundle.js", "text.js"]],
  [library, "ort", ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"]],
];

async function build(args) {
  const force = args.includes("--force"), [bundle, out, ...more] = args.filter((arg) => arg !== "--force");
  if (!bundle || !out || more.length || [bundle, out].some((arg) => arg.startsWith("-")))
    throw new UsageError("usage: node build.mjs BUNDLE OUT [--force]");
  const manifest = await readFile(join(bundle, MANIFEST)).catch(() => {
    throw new BundleError(`${bundle} is not a bundle: it has no ${MANIFEST}; write one with blt export MODEL -o ${bundle}`);
  });
  const listed = [MANIFEST, ...Object.keys(readManifest(manifest).files)];
  await stat(library).catch(() => {
    throw new UsageError("onnxruntime-web is not installed: npm ci --prefix runtime/js --ignore-scripts");
  });
  const target = resolve(out);
  const found = await readdir(target).catch((error) => (error.code === "ENOENT" ? [] : Promise.reject(error)));
  if (found.length && !(force && ["demo.js", "blt", "bundle"].every((name) => found.includes(name))))
    throw new UsageError(force ? `${out} holds other files than an earlier build: choose a new folder` :
      `${out} is not empty: choose a new folder, or replace an earlier build with --force`);
  await mkdir(dirname(target), { recursive: true });
  const made = await mkdtemp(join(dirname(target), `.${basename(target)}-`));
  try {
    for (const [from, to, names] of [...FILES, [bundle, "bundle", listed]])
      for (const name of names) await cp(join(from, name), join(made, to, name), { dereference: true });
    await chmod(made, 0o755);
    await rm(target, { recursive: true, force: true });
    await rename(made, target);
  } finally {
    await rm(made, { recursive: true, force: true });
  }
  console.error(`${out}: python -m http.server --directory ${out}, then open http://localhost:8000/`);
}

await build(process.argv.slice(2)).catch((error) => {
  console.error(`build.mjs: ${error instanceof BltError ? error.message : `cannot write: ${error.message}`}`);
  process.exitCode = error instanceof UsageError ? 2 : 1;
});
