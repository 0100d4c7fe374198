// The form, the numbers and the messages around the text; for this page and for the demo of runtime/js.

import { SCALE } from "./drawing.js";

export const $ = (id) => document.getElementById(id);
const numbers = new Intl.NumberFormat("en", { maximumFractionDigits: 2 });

/** The number in a field; undefined if it is empty. */
export const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
export const stopString = () => $("stop").value.replaceAll("\\n", "\n") || undefined;

/** Counts what a text has so far. `first`: ms until its first byte. */
export class Counts {
  bytes = 0;
  patches = 0;
  first = null;
  started = performance.now();

  add(bytes, patches) {
    if (bytes) this.first ??= performance.now() - this.started;
    this.bytes += bytes;
    this.patches += patches;
    this.#show();
  }

  #show() {
    const { bytes, patches, first } = this, seconds = (performance.now() - this.started - (first ?? 0)) / 1000;
    $("bytes").textContent = numbers.format(bytes);
    $("speed").textContent = bytes > 1 && seconds > 0.05 ? Math.round((bytes - 1) / seconds).toLocaleString("en") : "–";
    $("first").textContent = first === null ? "–" : `${Math.round(first)} ms`;
    $("patch").textContent = patches ? numbers.format(bytes / patches) : "–";
  }
}

export function showState(text, busy) {
  $("status").textContent = text;
  $("generate").disabled = busy;
  $("stop-button").disabled = !busy;
}

export function showError(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

/** The threshold above which a byte begins a patch, or null where no single one does; shown in the legend. */
export function thresholdOf({ scheme, monotonic, threshold } = {}) {
  const found = scheme === "entropy" && !monotonic ? threshold : null;
  $("threshold-key").hidden = found === null;
  if (found !== null) $("threshold").textContent = `${numbers.format(found)} nats`;
  return found;
}

/** Connects the controls. `drawing` returns the drawing that is shown, or null. */
export function connect({ generate, stop, drawing }) {
  $("scale").textContent = String(SCALE);
  for (const output of document.querySelectorAll("output")) {
    const input = $(output.htmlFor.value), update = () => (output.textContent = Number(input.value).toFixed(2));
    input.addEventListener("input", update);
    update();
  }
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  $("stop-button").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
    if (event.key === "Escape") stop();
  });
  $("text").addEventListener("pointerover", (event) => {
    const cell = event.target.closest(".cell");
    if (cell && drawing()) $("detail").textContent = drawing().detail(Number(cell.dataset.at));
  });
}
