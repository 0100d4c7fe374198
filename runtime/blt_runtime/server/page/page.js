// The page of `blt serve`: one completion at a time, drawn as it streams.

import { $, Counts, connect, number, showError, showState, stopString, thresholdOf } from "./controls.js";
import { Drawing } from "./drawing.js";

let running = null;
let threshold = null;
let drawing = null;

const headers = () => ({ "Content-Type": "application/json", ...($("key").value ? { Authorization: `Bearer ${$("key").value}` } : {}) });

function body() {
  return {
    prompt: $("prompt").value, max_tokens: number("max_tokens"), temperature: number("temperature"), top_p: number("top_p"),
    top_k: number("top_k"), min_p: number("min_p"), seed: number("seed"), stop: stopString(), stream: true,
    stream_options: { include_usage: true }, return_patches: true,
  };
}

/** The events of a stream, as objects. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function refusal(response) {
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not an answer of this server: the status has to do
  }
  if (response.status === 401) $("key-field").hidden = false;
  const after = response.headers.get("retry-after");
  return new Error(response.status === 429 && after ? `${message} (retry in ${after} s)` : message);
}

async function generate() {
  if (running || !$("form").reportValidity()) return;
  running = new AbortController();
  const counts = new Counts();
  showState("generating…", true);
  showError("");
  drawing = new Drawing($("text"), $("prompt").value, threshold);
  let finish = "";
  try {
    const response = await fetch("v1/completions", { method: "POST", headers: headers(), body: JSON.stringify(body()), signal: running.signal });
    if (!response.ok) throw await refusal(response);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const [choice] = event.choices;
      if (!choice) continue;
      finish = choice.finish_reason ?? finish;
      const { bytes, entropies, starts } = choice.patches;
      counts.add(bytes.length, starts.filter(Boolean).length);
      drawing.add(bytes, entropies, starts);
    }
    showState(finish === "length" ? "done: the length was reached" : "done: the model or a stop string ended the text", false);
  } catch (error) {
    if (error.name === "AbortError") showState("stopped", false);
    else {
      showState("", false);
      showError(error instanceof TypeError ? "the server cannot be reached" : error.message);
    }
  } finally {
    drawing.end();
    running = null;
  }
}

async function describe() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) return showError((await refusal(response)).message);
  const [model] = (await response.json()).data;
  $("model").textContent = model.id;
  $("max_tokens").max = String(model.max_model_len);
  threshold = thresholdOf(model.patch_rule);
}

connect({ generate, stop: () => running?.abort(), drawing: () => drawing });
$("key").addEventListener("change", describe);
describe().catch(() => showError("the server cannot be reached"));
