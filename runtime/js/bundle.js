/** The bundle of `blt export`: its files from a folder, a URL or a list of `File`, its manifest, and the errors. */

const FORMAT = "blt-bundle", VERSION = 5;
const LARGEST_MANIFEST = 16 << 20;
export const MANIFEST = "manifest.json";
export const isNode = typeof process === "object" && Boolean(process.versions?.node);

// ---- errors: one line each, what is wrong and what to do

/** Base of all errors of this module. */
export class BltError extends Error {
  constructor(message, options) {
    super(String(message).replace(/[\p{Cc}\p{Zl}\p{Zp}]/gu, " ").slice(0, 4000), options);
    this.name = new.target.title;
  }
  static title = "BltError";
}
/** A bad argument, or two calls on one stream at the same time. */
export class UsageError extends BltError { static title = "UsageError"; }
/** Text or ids that cannot be used. */
export class InputError extends BltError { static title = "InputError"; }
/** A bundle with a missing, changed or contradictory file. */
export class BundleError extends BltError { static title = "BundleError"; }
/** The stream cannot hold more bytes or patches; it is unchanged. */
export class CapacityError extends BltError { static title = "CapacityError"; }
/** ONNX Runtime is missing, too old, or cannot run a graph. */
export class BackendError extends BltError { static title = "BackendError"; }
/** A signal stopped the call; the stream is unchanged. Its `name` is "AbortError", as for other calls with a signal. */
export class Cancelled extends BltError { static title = "AbortError"; }

export const shown = (value) => (typeof value === "string" ? JSON.stringify(value) : String(value)).slice(0, 60);
export const firstLine = (error) => String(error?.message ?? error).trim().split("\n")[0].slice(0, 300);
export const isWhole = (value, least = 0, most = Number.MAX_SAFE_INTEGER) =>
  Number.isSafeInteger(value) && value >= least && value <= most;

export function checkSignal(signal) {
  if (signal?.aborted) throw new Cancelled("the call was stopped by its signal", { cause: signal.reason });
}

// ---- a bundle's files: from a folder (node), a URL, or a list of `File`

/** `read(name, size)` gets the bytes of a file; `check(name, size)` finds a wrong size without reading, if it can. */
export async function source(from) {
  if (from instanceof URL ? from.protocol === "file:" : isNode && typeof from === "string" && !/^https?:/.test(from))
    return folder(from);
  if (typeof from === "string" || from instanceof URL) return site(from);
  if (from && typeof from === "object" && typeof from[Symbol.iterator] === "function") return fileList(from);
  throw new UsageError(`open takes a folder, a URL or a list of files, not ${shown(from)}`);
}

export const wrongSize = (name, found, size) =>
  new BundleError(`${name} has ${found} bytes instead of ${size}: copy or export the bundle again`);

async function folder(from) {
  const library = "node:"; // not written out, so that bundlers for browsers leave it alone
  const [fs, paths, urls] = await Promise.all(["fs/promises", "path", "url"].map((name) => import(library + name)));
  const base = from instanceof URL ? urls.fileURLToPath(from) : from;
  const real = await fs.realpath(base).catch(() => {
    throw new BundleError(`${base} is not a bundle: there is no such folder`);
  });
  const hub = real.split(paths.sep).lastIndexOf("snapshots");
  const blobs = hub < 0 ? null : [...real.split(paths.sep).slice(0, hub), "blobs"].join(paths.sep);
  async function check(name, size) {
    const path = paths.join(real, name);
    const [info, target] = await Promise.all([fs.stat(path), fs.realpath(path)]).catch((cause) => {
      throw new BundleError(`${name} is missing in ${base}: copy or export the bundle again`, { cause });
    });
    if (target !== path && paths.dirname(target) !== blobs)
      throw new BundleError(`${name} in ${base} is a link out of the bundle: replace it by the file`);
    if (!info.isFile()) throw new BundleError(`${name} in ${base} is not a plain file`);
    if (size !== undefined && info.size !== size) throw wrongSize(name, info.size, size);
    return info.size;
  }
  async function read(name) {
    const out = new Uint8Array(await check(name)), file = await fs.open(paths.join(real, name));
    try {
      for (let at = 0, got = 1; at < out.length && got; at += got)
        got = (await file.read(out, at, Math.min(out.length - at, 2 ** 30), at)).bytesRead;
    } finally {
      await file.close();
    }
    return out;
  }
  return { check, read };
}

function site(from) {
  const base = new URL(from, globalThis.document?.baseURI);
  if (!base.pathname.endsWith("/")) base.pathname += "/";
  async function read(name, size = LARGEST_MANIFEST) {
    const url = new URL(encodeURIComponent(name), base);
    const response = await fetch(url).catch((cause) => {
      throw new BundleError(`cannot fetch ${url}: ${firstLine(cause)}`, { cause });
    });
    if (!response.ok) throw new BundleError(`cannot fetch ${url}: the server answers ${response.status}`);
    const parts = [];
    let length = 0;
    for (const reader = response.body.getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) return joined(parts, length);
      parts.push(value);
      length += value.length;
      if (length > size) {
        await reader.cancel();
        throw new BundleError(`${url} has more than ${size} bytes: copy or export the bundle again`);
      }
    }
  }
  return { check: async () => {}, read };
}

function fileList(from) {
  const files = new Map(), listed = Array.from(from);
  for (const file of listed) {
    if (!(file instanceof Blob)) throw new UsageError(`a list of files holds ${shown(file)}`);
    if ((file.webkitRelativePath ?? "").split("/").length <= 2) files.set(file.name, file); // not those of sub-folders
  }
  async function check(name, size) {
    const file = files.get(name);
    if (!file) throw new BundleError(`${name} is missing in the list of files: choose the whole folder of the bundle`);
    if (size !== undefined && file.size !== size) throw wrongSize(name, file.size, size);
    return file.size;
  }
  return { check, read: async (name) => (await check(name), new Uint8Array(await files.get(name).arrayBuffer())) };
}

function joined(parts, length) {
  const out = new Uint8Array(length);
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}

// ---- manifest.json

/** The checked manifest. Throws BundleError for another format, a newer version, and whatever contradicts itself. */
export function readManifest(bytes) {
  let manifest;
  try {
    manifest = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch (cause) {
    throw new BundleError(`${MANIFEST} is not valid JSON (${firstLine(cause)}): export the bundle again`, { cause });
  }
  const demand = (holds, what) => {
    if (!holds) throw new BundleError(`${MANIFEST}: ${what}: export the bundle again`);
  };
  const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
  demand(isObject(manifest) && manifest.format === FORMAT, `it is not of the format ${FORMAT}`);
  demand(isWhole(manifest.version, 1), "it has no valid version number");
  if (manifest.version > VERSION)
    throw new BundleError(`the bundle has format version ${manifest.version}, this module reads versions up to ` +
      `${VERSION}: upgrade blt-runtime`);
  const { files, graphs, spec } = manifest, tables = tablesOf(manifest);
  demand([files, graphs, spec].every(isObject), "'files', 'graphs' or 'spec' is missing");
  for (const [name, entry] of Object.entries(files)) {
    demand(!/[/\\:\0]/.test(name) && !["", ".", "..", MANIFEST].includes(name),
      `${shown(name)} is not a plain file name in the bundle`);
    demand(isWhole(entry?.bytes) && typeof entry.sha256 === "string", `the size or sha256 of ${name} is missing`);
  }
  for (const ref of [...Object.values(graphs), ...Object.values(tables)])
    demand(typeof ref?.file === "string" && Object.hasOwn(files, ref.file), "it uses a file that it does not list");
  checkSpec(spec, graphs, demand);
  demand(Object.keys(tables).join() === Object.keys(hashesOf(spec)).join(),
    "hash tables must be named exactly when 'spec' has a hash");
  return manifest;
}

const named = (pairs) => Object.fromEntries(Object.entries(pairs).filter(([, value]) => value));
/** The hash tables of each graph that has some: their files, and what the spec says of them. */
export const tablesOf = ({ hash_tables: encoder, entropy_tables: entropy }) => named({ encoder, entropy });
export const hashesOf = ({ hash: encoder, entropy_hash: entropy }) => named({ encoder, entropy });

function checkSpec(spec, graphs, demand) {
  for (const name of ["vocab_size", "chunk", "capacity_bytes", "capacity_patches", "encoder_window", "decoder_window"])
    demand(isWhole(spec[name], 1), `spec.${name} must be a whole number of at least 1`);
  const rule = spec.patch_rule ?? {}, number = (value) => value == null || Number.isFinite(value);
  demand(["entropy", "space", "static", "byte", "bpe"].includes(rule.scheme), "its patch scheme is unknown");
  demand(rule.scheme !== "entropy" || Number.isFinite(rule.threshold), "the patch rule has no threshold");
  demand(number(rule.threshold_add), "threshold_add is not a number");
  demand(!rule.monotonic || rule.threshold_add == null, "choose monotonic or threshold_add, not both");
  demand(rule.scheme !== "static" || isWhole(rule.patch_size, 1), "patch_size must be at least 1");
  demand(rule.max_patch_length == null || isWhole(rule.max_patch_length, 1), "max_patch_length must be at least 1");
  demand(["float32", "bfloat16"].includes(rule.entropy_dtype ??= "float32"), "its entropy_dtype is unknown");
  for (const name of ["encoder", "latent", "decoder", ...(rule.scheme === "entropy" ? ["entropy"] : [])]) {
    const graph = spec.graphs?.[name], cache = graph?.cache;
    demand(graph && graphs[name], `the graph ${name} is missing`);
    demand(Array.isArray(graph.inputs) && Array.isArray(graph.outputs) && graph.aliases, `${name} lacks its tensors`);
    const tensors = new Map([...graph.inputs, ...graph.outputs].map((tensor) => [tensor?.name, tensor]));
    for (const pair of Object.entries(graph.aliases))
      demand(pair.every((alias) => tensors.get(alias)?.shape?.length === 4 && tensors.get(alias).dtype === "float32" &&
        tensors.get(alias).shape.slice(1).every((size) => isWhole(size, 1))), `${name} has a cache of unknown shape`);
    demand(!cache || (["ring", "window", "linear"].includes(cache.kind) && isWhole(cache.capacity, 1) &&
      (cache.window === null ? cache.kind === "linear" : isWhole(cache.window, 1, cache.capacity) ||
      cache.kind === "linear")), `the cache of ${name} has impossible sizes`);
  }
  for (const hash of Object.values(hashesOf(spec))) {
    demand(Array.isArray(hash.sizes) && hash.sizes.length && hash.sizes.every((size) => isWhole(size, 1, 1024)) &&
      isWhole(hash.functions, 1, 11) && isWhole(hash.rows, 1) && isWhole(hash.dim, 2), "its hash is impossible");
    demand(["float32", "float16", "bfloat16", "int8"].includes(hash.dtype ??= "float32"),
      "its tables' type is unknown");
  }
}

export async function checkContent(name, bytes, sha256) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  if (Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") !== sha256)
    throw new BundleError(`${name} was changed (its sha256 differs): copy or export the bundle again`);
}

