// The demo: a bundle runs in this page with onnxruntime-web, and its text is drawn as it is generated.
//
// The bundle is read from `bundle/` beside this page, from `?bundle=PATH` of the same origin, or from a chosen or
// dropped folder. build.mjs puts the page, the modules, onnxruntime-web and a bundle into one folder.

import { Model } from "./blt/blt.js";
import { $, Counts, connect, number, showError, showState, stopString, thresholdOf } from "./controls.js";
import { Drawing } from "./drawing.js";

const LIBRARY = "ort/ort.wasm.min.mjs";
let ort = null;
let model = null;
let threshold = null;
let drawing = null;
let opening = null;
let running = null;

// --- the bundle ----------------------------------------------------------------------------------------------

async function library() {
  try {
    return await import(`./${LIBRARY}`);
  } catch {
    throw new Error(`${LIBRARY} is missing beside this page: run npm ci --prefix runtime/js --ignore-scripts, then ` +
      "node runtime/js/demo/build.mjs BUNDLE OUT");
  }
}

/** Opens a bundle in place of the present one, which stays if that fails. */
async function open(from, name) {
  running?.abort();
  opening?.abort();
  const { signal } = (opening = new AbortController());
  $("progress").hidden = false;
  $("progress").value = 0;
  showError("");
  showState(`opening ${name}…`, true);
  try {
    ort ??= await library();
    const progress = (done, total) => ($("progress").value = done / total);
    const opened = await Model.open(from, { ort, progress, signal });
    if (signal.aborted) return;
    model = opened;
    describe(name);
  } catch (error) {
    if (!signal.aborted) showError(error.message);
  } finally {
    if (!signal.aborted) {
      showState(model ? "ready" : "choose a bundle", !model);
      $("stop-button").disabled = true;
      $("progress").hidden = true;
    }
  }
}

function describe(name) {
  const { files, precision, spec } = model.manifest, bytes = Object.values(files).reduce((sum, file) => sum + file.bytes, 0);
  $("model").textContent = `${name}: ${(bytes / 1e6).toFixed(1)} MB, ${precision}, in this browser`;
  $("max_tokens").max = String(spec.capacity_bytes);
  threshold = thresholdOf(spec.patch_rule);
}

function openDefault() {
  const path = new URLSearchParams(location.search).get("bundle") ?? "bundle/", url = new URL(path, location.href);
  if (url.origin !== location.origin) return showError("?bundle= names a folder of this site only");
  return open(url, url.pathname.split("/").filter(Boolean).at(-1) ?? "bundle");
}

/** The files of what was dropped: of a folder, or single ones. */
async function dropped(transfer) {
  const items = [...transfer.items].filter(({ kind }) => kind === "file");
  const parts = items.map((item) => item.webkitGetAsEntry?.() ?? item.getAsFile()); // both only before the first await
  const files = [];
  for (const part of parts) {
    if (!part.isDirectory) files.push(part);
    else for (let batch, reader = part.createReader(); (batch = await called(reader, "readEntries")).length;) files.push(...batch);
  }
  return Promise.all(files.filter((file) => !file.isDirectory).map((file) => (file.isFile ? called(file, "file") : file)));
}
const called = (object, method) => new Promise((done, failed) => object[method](done, failed));

// --- the text ------------------------------------------------------------------------------------------------

function options() {
  return { temperature: number("temperature"), topP: number("top_p"), minP: number("min_p"), topK: number("top_k"),
    seed: number("seed"), stop: stopString() };
}

async function generate() {
  if (running || !model || $("generate").disabled || !$("form").reportValidity()) return;
  const { signal } = (running = new AbortController()), counts = new Counts(), held = [], n = number("max_tokens");
  let generated = 0;
  showState("generating…", true);
  showError("");
  drawing = new Drawing($("text"), $("prompt").value, threshold);
  try {
    const stream = await model.stream();
    await stream.append($("prompt").value, { signal });
    for await (const { id, bytes, entropy, startsPatch } of stream.tokens(n, { ...options(), signal })) {
      if (id !== null) held.push([Number.isNaN(entropy) ? null : entropy, startsPatch]);
      generated += id !== null;
      const told = held.splice(0, bytes.length); // bytes that may begin a stop string are held back
      counts.add(bytes.length, told.filter(([, starts]) => starts).length);
      drawing.add(bytes, told.map(([value]) => value), told.map(([, starts]) => starts));
    }
    showState(generated === n && !held.length ? "done: the length was reached" : "done: the model or a stop string ended the text", false);
  } catch (error) {
    showState(error.name === "AbortError" ? "stopped" : "", false);
    if (error.name !== "AbortError") showError(error.message);
  } finally {
    drawing.end();
    running = null;
  }
}

// --- the controls --------------------------------------------------------------------------------------------

connect({ generate, stop: () => running?.abort(), drawing: () => drawing });
$("folder").disabled = false;
$("folder").addEventListener("change", ({ target: { files } }) => {
  if (files.length) open(Array.from(files), files[0].webkitRelativePath.split("/")[0] || "bundle");
});
for (const [type, over] of [["dragover", true], ["dragleave", false], ["drop", false]])
  document.addEventListener(type, (event) => {
    event.preventDefault();
    document.body.classList.toggle("dropping", over);
  });
document.addEventListener("drop", ({ dataTransfer }) => {
  dropped(dataTransfer).then((files) => open(files, "the dropped bundle"), (error) => showError(error.message));
});
openDefault();
