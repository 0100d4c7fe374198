// node features.mjs MODULE BUNDLE SMALL: runs every test and prints {name: null or what failed} as JSON.
// BUNDLE: of the shipped model; SMALL: a bundle with room for 40 bytes and 12 patches. Both have an entropy model.

import assert from "node:assert/strict";
import { createServer } from "node:http";
import { cp, mkdtemp, readFile, readdir, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { pathToFileURL } from "node:url";

const [, , module, bundle, small] = process.argv;
const blt = await import(pathToFileURL(module));
const { BltError, BundleError, Cancelled, CapacityError, InputError, Model, UsageError } = blt;
const tests = {};
const test = (name, run) => (tests[name] = run);
const open = (path = bundle) => Model.open(path, { threads: 1 });
const model = await open();
const greedy = { temperature: 0 };

async function collected(pieces) {
  const found = [];
  for await (const piece of pieces) found.push(piece);
  return found;
}
const bytes = async (stream, n, options) => Buffer.concat(await collected(stream.generate(n, options)));
const text = async (prompt, n, options) => (await collected(model.generateText(prompt, n, options))).join("");
async function continued(prompt, n, options) {
  const stream = await model.stream();
  await stream.append(prompt);
  return bytes(stream, n, options);
}
async function changedCopy(change) {
  const folder = await mkdtemp(join(tmpdir(), "blt-js-"));
  await cp(bundle, folder, { recursive: true });
  await change(folder);
  return folder;
}
const changedManifest = (change) => changedCopy(async (folder) => {
  const manifest = JSON.parse(await readFile(join(folder, "manifest.json"), "utf8"));
  change(manifest);
  await writeFile(join(folder, "manifest.json"), JSON.stringify(manifest));
});
async function refused(folder, what) {
  await assert.rejects(open(folder), (error) => error instanceof BundleError && what.test(error.message));
  await rm(folder, { recursive: true });
}

test("a bundle opens from a list of files", async () => {
  const names = (await readdir(bundle)).sort();
  const files = await Promise.all(names.map(async (name) => new File([await readFile(join(bundle, name))], name)));
  const stream = await (await open(files)).stream();
  await stream.append("The ");
  assert.deepEqual(await bytes(stream, 20, greedy), await continued("The ", 20, greedy));
});

test("a bundle opens from a URL", async () => {
  const server = createServer(async (request, response) => {
    const file = await readFile(join(bundle, basename(request.url))).catch(() => null);
    response.writeHead(file ? 200 : 404).end(file);
  });
  await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
  const url = `http://127.0.0.1:${server.address().port}`;
  try {
    const seen = [];
    const opened = await Model.open(`${url}/bundle`, { threads: 1, progress: (done, total) => seen.push(done / total) });
    assert.equal(seen.at(-1), 1);
    assert.equal((await opened.stream()).position, 1);
  } finally {
    server.closeAllConnections();
    server.close();
  }
  await assert.rejects(open(url), BundleError);
});

test("a folder that is missing is a BundleError", () => assert.rejects(open(join(bundle, "nowhere")), BundleError));

test("a changed file is refused", async () => {
  await refused(await changedCopy(async (folder) => {
    const path = join(folder, "encoder.weights"), content = await readFile(path);
    content[100] ^= 1;
    await writeFile(path, content);
  }), /encoder.weights was changed/);
});

test("a truncated file is refused before anything is read", async () => {
  await refused(await changedCopy((folder) => writeFile(join(folder, "hash_tables.npy"), "x")), /has 1 bytes instead/);
});

test("a missing file is refused", async () => {
  await refused(await changedCopy((folder) => rm(join(folder, "latent.onnx"))), /latent.onnx is missing/);
});

test("a link out of the bundle is refused", async () => {
  await refused(await changedCopy(async (folder) => {
    await rm(join(folder, "latent.weights"));
    await symlink(join(bundle, "latent.weights"), join(folder, "latent.weights"));
  }), /is a link/);
});

test("a manifest of another format or a newer version is refused", async () => {
  await refused(await changedManifest((manifest) => (manifest.format = "other")), /not of the format/);
  await refused(await changedManifest((manifest) => (manifest.version = 99)), /version 99.*upgrade/);
  await refused(await changedCopy((folder) => writeFile(join(folder, "manifest.json"), "{")), /not valid JSON/);
});

test("a manifest that names a file outside the bundle is refused", async () => {
  for (const name of ["../x", "/etc/passwd", "a\\b", "", "..", "c:x"])
    await refused(await changedManifest((manifest) => (manifest.files[name] = { bytes: 1, sha256: "" })), /plain file/);
  await refused(await changedManifest((manifest) => (manifest.graphs.latent.file = "toString")), /does not list/);
});

test("a manifest with impossible values is refused", async () => {
  const changes = [(m) => (m.spec.chunk = 0), (m) => (m.spec.patch_rule.scheme = "x"), (m) => delete m.spec.graphs.latent,
    (m) => (m.spec.hash.rows = -1), (m) => (m.spec.patch_rule.threshold = "1"), (m) => (m.spec.hash.dtype = "x"),
    (m) => (m.spec.graphs.latent.cache.capacity = 0.5), (m) => (m.files = []), (m) => (m.spec = null)];
  for (const change of changes) await refused(await changedManifest(change), /^manifest.json: /);
  await refused(await changedManifest((m) => (m.spec.hash.rows += 1)), /hash tables/);
});

test("what open cannot use is a UsageError", async () => {
  for (const wrong of [7, null, undefined, {}, [1]]) await assert.rejects(Model.open(wrong), UsageError);
  await assert.rejects(Model.open(bundle, { verify: "never" }), UsageError);
});

test("text and its UTF-8 are the same prompt, and lone surrogates are dropped", async () => {
  const [one, two, three] = [await model.stream(), await model.stream(), await model.stream()];
  await one.append("Grüße 🚀");
  await two.append(new TextEncoder().encode("Grüße 🚀"));
  await three.append("Grü\ud83dße 🚀\udc00");
  assert.deepEqual(one.ids, two.ids);
  assert.deepEqual(one.ids, three.ids);
  assert.deepEqual(one.logits, two.logits);
});

test("appending in pieces gives the patches of appending at once", async () => {
  const [one, two] = [await model.stream(), await model.stream()];
  await one.append("for i in range(10):\n    print(i)\n");
  for (const piece of ["for i in ", "range(10):", "\n    print(i)\n"]) await two.append(piece);
  assert.deepEqual(one.patchLengths, two.patchLengths);
  assert.equal(one.patchLengths.reduce((sum, length) => sum + length), one.position + 1);
  one.entropies.forEach((entropy, i) => assert.ok(Math.abs(entropy - two.entropies[i]) < 1e-4));
});

test("a token says which patch it starts and how unsure the entropy model was", async () => {
  const stream = await model.stream(), before = stream.position;
  const tokens = await collected(stream.tokens(60, greedy));
  const starts = stream.patchLengths.reduce((found, length) => [...found, found.at(-1) + length], [0]);
  tokens.forEach(({ startsPatch, entropy, bytes: [byte], id }, i) => {
    assert.equal(startsPatch, starts.includes(before + i));
    assert.equal(entropy, stream.entropies[before + i - 1]);
    assert.equal(byte, id - 4);
  });
  assert.ok(tokens.some(({ startsPatch }) => startsPatch) && tokens.some(({ startsPatch }) => !startsPatch));
});

test("generateText yields whole characters", async () => {
  const pieces = await collected(model.generateText("", 0)), decoder = new TextDecoder();
  assert.deepEqual(pieces, []);
  const options = { temperature: 1.5, seed: 3 };
  assert.equal(await text("日本", 60, options), decoder.decode(await continued("日本", 60, options)));
});

test("a stop string ends the text before it, wherever its bytes are divided", async () => {
  const whole = (await continued("The history of ", 60, greedy)).toString();
  const at = whole.indexOf("str");
  assert.ok(at > 0);
  const cut = (stop) => continued("The history of ", 60, { ...greedy, stop }).then(String);
  assert.equal(await cut("str"), whole.slice(0, at));
  const ends = [at + 1, at - 1, at - 3].map((begin) => whole.slice(begin, at + 4));
  const first = Math.min(...ends.map((end) => whole.indexOf(end)));
  assert.equal(await cut([ends[0], ends[1], new TextEncoder().encode(ends[2])]), whole.slice(0, first));
  assert.equal(await cut("strx"), whole);
  for (const stop of ["", [""], 7, [7]]) await assert.rejects(cut(stop), UsageError);
});

test("a stop string's beginning comes out when the text ends", async () => {
  const whole = (await continued("The history of ", 12, greedy)).toString();
  assert.equal((await continued("The history of ", 12, { ...greedy, stop: `${whole.slice(-4)}?` })).toString(), whole);
});

test("equal seeds draw equal texts", async () => {
  const [one, two, other] = [await text("a", 30, { seed: 5 }), await text("a", 30, { seed: 5n }), await text("a", 30)];
  assert.equal(one, two);
  assert.notEqual(one, other);
  const [first, second] = [await model.stream({ seed: 9 }), await model.stream({ seed: 9 })];
  assert.deepEqual(await bytes(first, 20), await bytes(second, 20));
});

test("topK 1, a tiny topP and minP 1 are greedy", async () => {
  const best = await continued("The ", 20, greedy);
  for (const options of [{ topK: 1 }, { topP: 1e-9 }, { minP: 1 }])
    assert.deepEqual(await continued("The ", 20, { temperature: 2, ...options }), best);
});

test("options out of range and unknown ones are UsageErrors", async () => {
  const wrong = [{ temperature: -1 }, { temperature: NaN }, { temperature: "1" }, { topK: 0 }, { topK: 1.5 }, { topP: 0 },
    { topP: 1.1 }, { minP: -0.1 }, { seed: -1 }, { seed: 0.5 }, { seed: "1" }, { stopAtEos: 1 }, { top_k: 3 }];
  for (const options of wrong) await assert.rejects(text("a", 3, options), UsageError, JSON.stringify(options));
  for (const n of [-1, 1.5, NaN, "3"]) await assert.rejects(text("a", n), UsageError);
});

test("an option that is undefined has its default", async () => {
  const unset = { topK: undefined, topP: undefined, minP: undefined, seed: undefined, stop: undefined, signal: undefined };
  assert.equal(await text("The ", 20, { ...greedy, ...unset }), await text("The ", 20, greedy));
});

test("ids outside the vocabulary are InputErrors, and what is no text a UsageError", async () => {
  const stream = await model.stream();
  for (const ids of [[260], [-1], [1.5], ["1"]]) await assert.rejects(stream.appendIds(ids), InputError);
  for (const wrong of [7, null, [1, 2]]) await assert.rejects(stream.append(wrong), UsageError);
  assert.equal(stream.position, 1);
});

test("a full stream is a CapacityError that changes nothing", async () => {
  const stream = await (await open(small)).stream();
  await stream.append("abc");
  const { logits, ids, patchLengths } = stream, kept = logits.slice();
  await assert.rejects(stream.append("x".repeat(40)), CapacityError);
  await assert.rejects(stream.append("I a b A. A. of I in A. a I O"), (error) => /12 patches/.test(error.message));
  assert.deepEqual([stream.ids, stream.patchLengths, stream.logits], [ids, patchLengths, kept]);
  const other = await (await open(small)).stream();
  await other.append("abc");
  assert.deepEqual(await bytes(stream, 3, greedy), await bytes(other, 3, greedy));
});

test("a signal stops an append, and the stream is as before", async () => {
  const stream = await model.stream(), controller = new AbortController();
  await stream.append("The history of ");
  const { logits, patchLengths } = stream, kept = logits.slice();
  const reading = stream.append("x ".repeat(2000), { signal: controller.signal });
  setTimeout(() => controller.abort(), 20);
  await assert.rejects(reading, (error) => error instanceof Cancelled && error.name === "AbortError");
  assert.deepEqual([stream.patchLengths, stream.logits], [patchLengths, kept]);
  assert.deepEqual(await bytes(stream, 30, greedy), await continued("The history of ", 30, greedy));
});

test("a signal stops a generation", async () => {
  const stream = await model.stream(), controller = new AbortController(), found = [];
  await assert.rejects(async () => {
    for await (const piece of stream.generate(50, { ...greedy, signal: controller.signal })) {
      found.push(piece);
      if (found.length === 5) controller.abort();
    }
  }, Cancelled);
  assert.equal(stream.position, 6);
  await assert.rejects(text("a", 5, { signal: AbortSignal.abort() }), Cancelled);
});

test("two calls on one stream at the same time are a UsageError", async () => {
  const stream = await model.stream(), first = stream.append("one"), second = stream.append("two");
  await assert.rejects(second, UsageError);
  await first;
  assert.equal(stream.position, 4);
});

test("streams of one model run at the same time", async () => {
  const wanted = [await continued("The ", 30, greedy), await continued("def ", 30, greedy)];
  assert.deepEqual(await Promise.all([continued("The ", 30, greedy), continued("def ", 30, greedy)]), wanted);
});

test("reset begins again", async () => {
  const stream = await model.stream();
  await stream.append("something else");
  await stream.reset();
  await stream.append("The ");
  assert.deepEqual(await bytes(stream, 20, greedy), await continued("The ", 20, greedy));
});

test("an empty stream has no logits", async () => {
  const stream = await model.stream({ bos: false });
  assert.throws(() => stream.logits, UsageError);
  await assert.rejects(bytes(stream, 1), UsageError);
});

test("generation ends at an EOS, or reads it", async () => {
  const stream = await model.stream(), told = [];
  Object.defineProperty(stream, "logits", { get: () => Float32Array.from({ length: 260 }, (_, id) => Number(id === 2)) });
  assert.equal((await bytes(stream, 5, greedy)).length, 0);
  assert.equal(stream.position, 1);
  for await (const { id } of stream.tokens(2, { ...greedy, stopAtEos: false })) told.push(id);
  assert.deepEqual(told, [2, 2]);
});

test("an old onnxruntime is a BackendError that says so", async () => {
  const ort = { InferenceSession: {}, env: { versions: { common: "1.20.1" } } };
  await assert.rejects(Model.open(bundle, { ort }), (error) => error instanceof BltError && /1.20.1/.test(error.message));
});

const results = {};
for (const [name, run] of Object.entries(tests)) {
  try {
    await run();
    results[name] = null;
  } catch (error) {
    results[name] = String(error?.stack ?? error);
  }
}
console.log(JSON.stringify(results));
