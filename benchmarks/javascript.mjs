// What benchmarks/javascript.py runs, in node and in a browser: seconds of opening, of reading and of writing.
//
//     node javascript.mjs -       reads {module, library, bundle, prompts, bytes, runs} from standard input

export async function measure({ Model }, options, { bundle, prompts, bytes, runs }) {
  const began = performance.now(), model = await Model.open(bundle, options), opened = performance.now() - began;
  const found = { opening: [opened / 1e3], texts: [], reading: prompts.map(() => []), writing: prompts.map(() => []) };
  for (let run = 0; run < runs; run++)
    for (const [i, prompt] of prompts.entries()) {
      const stream = await model.stream(), start = performance.now(), text = [];
      await stream.append(prompt);
      const read = performance.now();
      for await (const { id } of stream.tokens(bytes, { temperature: 0.8, seed: 1, stopAtEos: false })) text.push(id);
      const written = performance.now();
      found.texts[i] = text;
      found.reading[i].push((read - start) / 1e3);
      found.writing[i].push((written - read) / 1e3);
    }
  return found;
}

if (globalThis.process?.argv[2]) {
  const { readFileSync } = await import("node:fs"), { pathToFileURL } = await import("node:url");
  const { module, library, ...job } = JSON.parse(readFileSync(0, "utf8"));
  const [blt, ort] = await Promise.all([module, library].map((path) => import(pathToFileURL(path))));
  console.log(JSON.stringify(await measure(blt, { ort, threads: 1 }, job)));
}
