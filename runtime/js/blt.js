/**
 * blt-runtime: runs a bundle of `blt export` with ONNX Runtime's JavaScript API, in node and in browsers.
 *
 *   const model = await Model.open("bundle");
 *   for await (const text of model.generateText("Once upon a time", 200)) process.stdout.write(text);
 *
 * The entropy model, the encoder and the decoder run once per byte, the latent transformer once per complete patch.
 * Calls are cut, hashes summed and entropies compared as in the Python package `blt_runtime`. Types are in blt.d.ts.
 */

import { BackendError, BundleError, CapacityError, InputError, MANIFEST, UsageError, checkContent, checkSignal,
  firstLine, hashesOf, isNode, isWhole, readManifest, shown, source, tablesOf, wrongSize } from "./bundle.js";
import { BOS, EOS, HashEmbedding, NEWLINE, OFFSET, PatchState, Random, StopMatcher, checkOptions, sampler, seedOf,
  toBytes } from "./text.js";

export { BackendError, BltError, BundleError, Cancelled, CapacityError, InputError, UsageError } from "./bundle.js";

const HASH_WHOLE_BUNDLE = 2 ** 30, GATHER_BYTES = 16 << 20;
const SLOTS = 64; // of a cache of free length at first; it is doubled when it is full
const WEB_CHUNK = 64; // tokens of a call with WebAssembly, whose attention is slower with more
const SLICE = 12; // ms between two pauses

// ---- one graph with its caches

/** Cuts positions start..end into calls [a, b] of at most `limit` tokens that the cache and the documents allow. */
function* cut(start, end, cache, limit, documents) {
  if (cache) limit = Math.min(limit, cache.kind === "ring" ? cache.capacity - cache.window + 1 : cache.capacity);
  for (let stop; start < end; start = stop) {
    stop = Math.min(end, start + limit);
    if (cache?.kind === "ring") stop = Math.min(stop, (Math.floor(start / cache.capacity) + 1) * cache.capacity);
    if (documents) for (let t = start + 1; t < stop; t++) if (documents[t] !== documents[start]) stop = t;
    yield [start, stop];
  }
}

class Graph {
  constructor(model, name) {
    Object.assign(this, model.graphs[name], { ort: model.ort, name, inPlace: model.inPlace });
    this.#allocate(this.free ? Math.min(SLOTS, this.spec.cache.capacity) : this.spec.cache?.capacity);
  }
  #allocate(slots, used = 0) {
    const before = this.caches;
    this.caches = {};
    for (const input of Object.values(this.spec.aliases)) {
      const [, heads, , size] = this.spec.inputs.find((tensor) => tensor.name === input).shape;
      const data = new Float32Array(heads * slots * size);
      for (let h = 0; used && h < heads; h++) {
        const from = h * this.slots * size;
        data.set(before[input].data.subarray(from, from + used * size), h * slots * size);
      }
      this.caches[input] = new this.ort.Tensor("float32", data, [1, heads, slots, size]);
    }
    this.slots = slots;
  }
  /** Runs the graph; `entries`: of the cache after the call, in its document. Returns the output `wanted`. */
  async run(feeds, wanted, entries) {
    const needed = this.free ? Math.min(entries, this.spec.cache.capacity) : 0;
    let slots = this.slots;
    while (slots < needed) slots *= 2;
    if (needed > this.slots) this.#allocate(Math.min(slots, this.spec.cache.capacity), this.slots);
    const inputs = { ...this.caches }, fetches = { [wanted]: null };
    for (const [name, [data, dims]] of Object.entries(feeds))
      inputs[name] = new this.ort.Tensor(data instanceof Float32Array ? "float32" : "int64", data, dims);
    for (const [output, input] of Object.entries(this.spec.aliases))
      fetches[output] = this.inPlace ? this.caches[input] : null;
    const found = await this.session.run(inputs, fetches).catch((cause) => {
      throw new BackendError(`the graph ${this.name} failed: ${firstLine(cause)}`, { cause });
    });
    if (!this.inPlace) {
      for (const [output, input] of Object.entries(this.spec.aliases)) this.caches[input] = found[output];
      await pause();
    }
    return found[wanted];
  }
  /** A function that puts the caches back as they are now. */
  keep() {
    const { slots } = this, caches = Object.entries(this.caches).map(([name, { data, dims }]) =>
      [name, this.inPlace ? new this.ort.Tensor("float32", data.slice(), dims) : this.caches[name]]);
    return () => Object.assign(this, { slots, caches: Object.fromEntries(caches) });
  }
}

/** WebAssembly keeps the page's thread. A pause lets the page draw, and lets a signal arrive. */
async function pause() {
  if (performance.now() - paused < SLICE) return;
  await new Promise((done) => {
    if (globalThis.setImmediate) return setImmediate(done);
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = () => (port1.close(), done());
    port2.postMessage(null);
  });
  paused = performance.now();
}
let paused = 0;

// ---- one text

const int64 = (values, ...dims) => [BigInt64Array.from(values, BigInt), dims];
const range = (start, end) => Array.from({ length: end - start }, (_, i) => start + i);

/** One text with its state; made by `Model.stream`. One call at a time. */
export class Stream {
  #model;
  #spec;
  #graphs;
  #bos;
  #random;
  #busy = false;
  #damaged = false;
  #state;
  constructor(model, bos, random) {
    this.#model = model;
    this.#spec = model.spec;
    this.#bos = bos;
    this.#random = random;
  }

  /** Tokens read, BOS included. */
  get position() { return this.#state.ids.length; }
  get ids() { return this.#state.ids.slice(); }
  /** Entropy in nats of the byte after each token; NaN where the patch rule needs none. */
  get entropies() { return Float32Array.from(this.#state.entropies); }
  /** Lengths of the patches; the last one holds one byte more than was read: the next. */
  get patchLengths() {
    return [...this.#state.starts.slice(1), this.position + 1].map((end, p) => end - this.#state.starts[p]);
  }
  /** Scores of the next id [V]. */
  get logits() {
    if (!this.position) throw new UsageError("the stream is empty: append something first, or open it with bos: true");
    return this.#state.logits;
  }

  /** Begins again, with BOS if the stream was opened with it. */
  async reset() {
    this.#damaged = false;
    await this.#exclusive(async () => {
      const made = Object.keys(this.#model.graphs).map((name) => [name, new Graph(this.#model, name)]);
      this.#graphs = Object.fromEntries(made);
      this.#state = { ids: [], entropies: [], documents: [0], entropyDocuments: [0], starts: [0], patchDocuments: [0],
        rule: new PatchState(this.#spec.patch_rule), pool: new Float32Array(0), base: 0, vectors: [], logits: null };
      if (this.#bos) await this.#read([BOS]);
    });
  }

  /** Appends a string or bytes, all or nothing. */
  async append(text, options) {
    await this.appendIds(Array.from(toBytes(text), (byte) => byte + OFFSET), options);
  }
  async appendIds(ids, { signal } = {}) {
    const listed = Array.from(ids), most = this.#spec.vocab_size - 1;
    if (!listed.every((id) => isWhole(id, 0, most))) throw new InputError(`ids must be whole numbers in 0..${most}`);
    await this.#exclusive(async () => listed.length && this.#read(listed, signal));
  }

  /** Generates up to `n` tokens: {id, bytes, entropy, startsPatch}. `bytes` are those that the token releases. */
  async *tokens(n, given) {
    const options = checkOptions(given), { seed, signal } = options, matcher = new StopMatcher(options.stop);
    if (!isWhole(n)) throw new UsageError(`n must be a whole number from 0 up, not ${shown(n)}`);
    const choose = sampler(options, seed === null ? this.#random : new Random(seed));
    for (let i = 0; i < n && !matcher.stopped; i++) {
      const id = choose(this.logits), { position } = this, { entropies, starts } = this.#state;
      checkSignal(signal);
      if (id === EOS && options.stopAtEos) break;
      const token = { id, entropy: entropies[position - 1], startsPatch: starts.at(-1) === position };
      await this.#exclusive(() => this.#read([id]));
      yield { ...token, bytes: matcher.feed(id < OFFSET ? "" : String.fromCharCode(id - OFFSET)) };
    }
    const rest = matcher.stopped ? [] : matcher.flush();
    if (rest.length) yield { id: null, bytes: rest, entropy: NaN, startsPatch: false };
  }
  /** The bytes of `tokens`. */
  async *generate(n, options) {
    for await (const { bytes } of this.tokens(n, options)) if (bytes.length) yield bytes;
  }
  /** `generate` as text: whole characters; bytes that are no UTF-8 become U+FFFD. */
  async *generateText(n, options) {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    for await (const bytes of this.generate(n, options)) {
      const text = decoder.decode(bytes, { stream: true });
      if (text) yield text;
    }
    const rest = decoder.decode();
    if (rest) yield rest;
  }

  async #exclusive(call) {
    if (this.#busy) throw new UsageError("another call on this stream is running: await it first");
    if (this.#damaged) throw new UsageError("an earlier call on this stream failed half-way: call reset() first");
    this.#busy = true;
    try {
      return await call();
    } finally {
      this.#busy = false;
    }
  }

  /** Reads ids, all or nothing: first the entropy model over all, which finds the patches; then chunk by chunk. */
  async #read(ids, signal) {
    const { capacity_bytes: most, capacity_patches: mostPatches } = this.#spec, start = this.position;
    const { chunk } = this.#model, end = start + ids.length, before = this.#state.starts.length - 1;
    if (end > most)
      throw new CapacityError(`${end} tokens exceed the capacity of ${most}: give a shorter text, or export with a ` +
        "larger --capacity");
    checkSignal(signal);
    const putBack = signal || before + ids.length > mostPatches ? this.#keep() : null;
    try {
      this.#place(ids);
      await this.#entropies(start, end, signal);
      const closes = ids.map((id, i) => this.#state.rule.closes(id, this.#state.entropies[start + i]));
      if (before + closes.filter(Boolean).length > mostPatches)
        throw new CapacityError(`the text needs more than the capacity of ${mostPatches} patches: give a shorter ` +
          "text, or export with a larger --patches");
      for (let a = start, b; a < end; a = b) {
        checkSignal(signal);
        b = Math.min(end, (Math.floor(a / chunk) + 1) * chunk);
        await this.#chunk(a, b, closes.slice(a - start, b - start));
      }
    } catch (error) {
      this.#damaged = !putBack;
      putBack?.();
      throw error;
    }
  }

  #keep() {
    const copy = (value) => value?.copy?.() ?? value?.slice?.() ?? value;
    const state = Object.fromEntries(Object.entries(this.#state).map(([name, value]) => [name, copy(value)]));
    const graphs = Object.values(this.#graphs).map((graph) => graph.keep());
    return () => {
      this.#state = state;
      for (const putBack of graphs) putBack();
    };
  }

  #place(ids) {
    const { ids: held, documents, entropyDocuments } = this.#state, lines = this.#spec.patch_rule.reset_newlines;
    for (const id of ids) {
      const next = held.push(id);
      documents.push(id === EOS ? next : documents.at(-1));
      entropyDocuments.push(id === EOS || (lines && id === NEWLINE) ? next : entropyDocuments.at(-1));
      this.#state.entropies.push(NaN);
    }
  }

  #calls(name, start, end, documents) {
    const { chunk_crosses_documents: crosses, graphs } = this.#spec;
    return cut(start, end, graphs[name].cache, this.#model.chunk, crosses ? null : documents);
  }
  #clock(a, b, documents) {
    return { positions: int64(range(a, b), 1, b - a), doc_start: int64(documents.slice(a, b), 1, b - a) };
  }
  #run(name, a, b, documents, feeds, wanted) {
    return this.#graphs[name].run({ ...feeds, ...this.#clock(a, b, documents) }, wanted, b - documents[b - 1]);
  }

  async #entropies(start, end, signal) {
    if (this.#spec.patch_rule.scheme !== "entropy") return;
    const { entropies, entropyDocuments } = this.#state;
    for (const [a, b] of this.#calls("entropy", start, end, entropyDocuments)) {
      checkSignal(signal);
      const { data } = await this.#run("entropy", a, b, entropyDocuments, this.#bytes("entropy", a, b), "entropy");
      data.forEach((entropy, i) => (entropies[a + i] = entropy));
    }
  }

  /** The encoder over positions a..b, the latent transformer over the patches that end there, the decoder. */
  async #chunk(a, b, closes) {
    const state = this.#state, { documents, starts } = state, before = starts.length - 1;
    for (const [s, e] of this.#calls("encoder", a, b, documents)) await this.#encode(s, e);
    const complete = closes.map((closed, i) => (closed && this.#closePatch(a + i + 1), starts.length - 1));
    const vectors = state.vectors.slice(), first = before - vectors.length;
    for (const [p, q] of this.#latentCalls(before, starts.length - 1)) vectors.push(...(await this.#latent(p, q)));
    for (const [s, e] of this.#calls("decoder", a, b, documents))
      await this.#decode(s, e, complete.slice(s - a, e - a), vectors, first);
    state.vectors = vectors.slice(-this.#spec.decoder_window);
  }

  /** The ids of positions a..b and, if the graph has tables, their hash embeddings. */
  #bytes(graph, a, b) {
    const { ids } = this.#state, hash = this.#model.hashes[graph], feeds = { ids: int64(ids.slice(a, b), 1, b - a) };
    if (hash) {
      const embedded = new Float32Array((b - a) * hash.dim);
      for (let i = 0; i < b - a; i++) hash.embed(ids, a + i, embedded.subarray(i * hash.dim, (i + 1) * hash.dim));
      feeds.hash_embedding = [embedded, [1, b - a, hash.dim]];
    }
    return feeds;
  }

  async #encode(a, b) {
    const state = this.#state, feeds = this.#bytes("encoder", a, b);
    const { data, dims } = await this.#run("encoder", a, b, state.documents, feeds, "byte_states");
    const keep = this.#firstByte(state.starts.length - 1), width = dims[2] * dims[3];
    state.shape = dims.slice(2);
    if ((b - state.base) * width > state.pool.length) {
      const pool = new Float32Array(2 * (b - keep) * width);
      pool.set(state.pool.subarray((keep - state.base) * width, (a - state.base) * width));
      Object.assign(state, { pool, base: keep });
    }
    state.pool.set(data, (a - state.base) * width);
  }
  /** The byte states of positions a..b. */
  #states(a, b) {
    const { pool, base, shape } = this.#state, width = shape[0] * shape[1];
    return pool.subarray((a - base) * width, (b - base) * width);
  }

  #firstByte(patch) {
    return this.#state.starts[Math.max(0, patch - this.#spec.encoder_window + 1)];
  }
  #closePatch(end) {
    const { documents, starts, patchDocuments } = this.#state, patch = starts.length - 1;
    const masked = documents[end] > starts[patch] && this.#spec.latent_document_mask;
    patchDocuments.push(masked ? patch + 1 : patchDocuments[patch]);
    starts.push(end);
  }
  /** Calls of the latent transformer that gather at most GATHER_BYTES of byte states. */
  *#latentCalls(first, end) {
    const { starts, patchDocuments, shape } = this.#state;
    for (const [start, stop] of this.#calls("latent", first, end, patchDocuments)) {
      let a = start, longest = 0;
      for (let p = start; p < stop; p++) {
        const length = starts[p + 1] - this.#firstByte(p);
        longest = Math.max(longest, length);
        if (p > a && longest * (p + 1 - a) * shape[0] * shape[1] * 4 > GATHER_BYTES) {
          yield [a, p];
          [a, longest] = [p, length];
        }
      }
      yield [a, stop];
    }
  }
  /** The vectors of complete patches p..q. */
  async #latent(p, q) {
    const { starts, patchDocuments, shape } = this.#state, n = q - p, base = this.#firstByte(p);
    const firsts = range(p, q).map((patch) => this.#firstByte(patch));
    const lengths = firsts.map((first, i) => starts[p + i + 1] - first), longest = Math.max(...lengths);
    const index = firsts.flatMap((first, i) => range(0, longest).map((l) => (l < lengths[i] ? first - base + l : 0)));
    const feeds = { byte_states: [this.#states(base, starts[q]), [starts[q] - base, ...shape]],
      byte_index: int64(index, 1, n, longest), patch_length: int64(lengths, 1, n) };
    if (this.#spec.encoder_window > 1) feeds.own_start = int64(firsts.map((first, i) => starts[p + i] - first), 1, n);
    const { data } = await this.#run("latent", p, q, patchDocuments, feeds, "patch_kv"), size = data.length / n;
    return range(0, n).map((i) => data.slice(i * size, (i + 1) * size));
  }

  /** The decoder over positions a..b; position a + i reads the last patches before `complete[i]`. */
  async #decode(a, b, complete, vectors, first) {
    const { decoder_window: reads, vocab_size: vocabulary } = this.#spec, n = b - a, { shape } = this.#state;
    const rows = complete.flatMap((end) => range(end - reads, end).map((patch) => (patch < 0 ? -1 : patch - first)));
    const kv = this.#model.kvShape, size = kv.reduce((product, length) => product * length, 1);
    const pool = new Float32Array(Math.max(1, vectors.length) * size);
    vectors.forEach((vector, i) => pool.set(vector, i * size));
    const feeds = { byte_states: [this.#states(a, b), [1, n, ...shape]],
      patch_kv: [pool, [Math.max(1, vectors.length), ...kv]], patch_row: int64(rows, 1, n, reads) };
    const { data } = await this.#run("decoder", a, b, this.#state.documents, feeds, "logits");
    this.#state.logits = data.slice(-vocabulary);
  }
}

// ---- a model

/** A bundle that is ready to run. Streams of one model may run at the same time. */
export class Model {
  /** Opens a bundle: a folder (node), a URL, or the files of a folder that the reader of a page has chosen. */
  static async open(from, { ort, threads, verify = "auto", progress, signal, session } = {}) {
    if (!["auto", "full", "sizes"].includes(verify)) throw new UsageError("verify must be auto, full or sizes");
    if (threads !== undefined && !isWhole(threads, 1)) throw new UsageError("threads must be a whole number from 1 up");
    const files = await source(from);
    await files.check(MANIFEST);
    const manifest = readManifest(await files.read(MANIFEST));
    const model = new Model(manifest, ort ?? (await library()), threads);
    await model.#load(files, { verify, progress, signal, session });
    return model;
  }
  constructor(manifest, ort, threads) {
    this.manifest = manifest;
    this.spec = manifest.spec;
    this.ort = ort.InferenceSession ? ort : ort.default;
    const found = this.ort.env.versions ?? {}, parts = (version) => version.split(".").map(Number);
    const [[major, minor], [needed, least]] = [found.common ?? "0.0", manifest.min_onnxruntime ?? "0.0"].map(parts);
    if (major < needed || (major === needed && minor < least))
      throw new BackendError(`the bundle needs onnxruntime ${manifest.min_onnxruntime} or newer, but ${found.common} ` +
        "is installed: npm install onnxruntime-node@latest (or onnxruntime-web@latest)");
    /** onnxruntime-node updates caches in place; onnxruntime-web copies them into its memory and back. */
    this.inPlace = Boolean(found.node);
    this.chunk = this.inPlace ? this.spec.chunk : Math.min(this.spec.chunk, WEB_CHUNK);
    this.threads = threads;
    if (threads && !this.inPlace) this.ort.env.wasm.numThreads = threads;
    this.kvShape = this.spec.graphs.decoder.inputs.find((tensor) => tensor.name === "patch_kv").shape.slice(1);
  }

  async #load(files, { verify, progress, signal, session }) {
    const { manifest, spec } = this, listed = manifest.files, weights = (name) => name.replace(/\.onnx$/, ".weights");
    const needsEntropy = spec.patch_rule.scheme === "entropy";
    const names = Object.keys(manifest.graphs).filter((name) => name !== "entropy" || needsEntropy);
    const used = names.flatMap((name) => [manifest.graphs[name].file, weights(manifest.graphs[name].file)]);
    const tables = Object.entries(tablesOf(manifest)).filter(([name]) => names.includes(name));
    const all = [...used, ...tables.map(([, { file }]) => file)].filter((name) => name in listed);
    await Promise.all(all.map((name) => files.check(name, listed[name].bytes)));
    const total = all.reduce((sum, name) => sum + listed[name].bytes, 0);
    const hashed = verify === "full" || (verify === "auto" && total <= HASH_WHOLE_BUNDLE);
    let done = 0;
    const read = async (name) => {
      checkSignal(signal);
      const { bytes, sha256 } = listed[name], content = await files.read(name, bytes);
      if (content.length !== bytes) throw wrongSize(name, content.length, bytes);
      if (hashed && globalThis.crypto?.subtle) await checkContent(name, content, sha256);
      progress?.((done += bytes), total);
      return content;
    };
    this.graphs = {};
    for (const name of names) {
      const { file } = manifest.graphs[name], path = weights(file);
      const data = path in listed ? [{ path, data: await read(path) }] : [];
      this.graphs[name] = await this.#session(name, await read(file), { ...session, externalData: data });
    }
    this.hashes = {};
    for (const [name, { file }] of tables)
      this.hashes[name] = new HashEmbedding(hashesOf(spec)[name], await read(file));
  }

  async #session(name, content, options) {
    const spec = this.spec.graphs[name], { file } = this.manifest.graphs[name];
    const precision = this.manifest.precisions?.[name] ?? this.manifest.precision;
    const threads = this.inPlace && this.threads ? { intraOpNumThreads: this.threads, interOpNumThreads: 1 } : {};
    const provider = this.inPlace ? "cpu" : "wasm";
    const session = await this.ort.InferenceSession.create(content, { executionProviders: [provider],
      logSeverityLevel: 3, ...threads, ...options }).catch((cause) => {
      throw new BackendError(`onnxruntime cannot run ${file} (${precision}) on ${provider}: ${firstLine(cause)}; ` +
        "copy the bundle again, or export it with --precision fp32", { cause });
    });
    for (const [found, listed] of [[session.inputNames, spec.inputs], [session.outputNames, spec.outputs]])
      if ([...found].sort().join() !== listed.map((tensor) => tensor.name).sort().join())
        throw new BundleError(`${file} has other inputs or outputs than the manifest lists: export the bundle again`);
    const [cached] = Object.values(spec.aliases), known = session.inputMetadata?.find(({ name }) => name === cached);
    return { session, spec, free: spec.cache?.kind === "linear" && typeof known?.shape?.[2] === "string" };
  }

  /** A new stream that has read BOS, or nothing with `bos: false`. `seed`: of draws that set none. */
  async stream({ bos = true, seed } = {}) {
    const stream = new Stream(this, bos, new Random(seedOf(seed)));
    await stream.reset();
    return stream;
  }
  /** Text that continues `prompt`, up to `n` bytes, in whole characters. */
  async *generateText(prompt, n, options) {
    checkOptions(options);
    const stream = await this.stream();
    await stream.append(prompt, { signal: options?.signal });
    yield* stream.generateText(n, options);
  }
}

async function library() {
  const names = isNode ? ["onnxruntime-node", "onnxruntime-web"] : ["onnxruntime-web"];
  if (isNode) process.env.ORT_DISABLE_TELEMETRY ??= "1"; // read once, when the module is loaded
  for (const name of names) {
    try {
      return await import(/* @vite-ignore */ /* webpackIgnore: true */ name);
    } catch (error) {
      if (isNode && error.code !== "ERR_MODULE_NOT_FOUND") throw new BackendError(`${name}: ${firstLine(error)}`);
    }
  }
  throw new BackendError(`${names[0]} is not installed: npm install ${names[0]}, or pass the module as \`ort\``);
}
