// Runs cases {ids, n, options} on a bundle, each in a stream of its own: the same code in node and in a browser.

export async function drive({ Model }, from, options, cases) {
  const model = await Model.open(from, options);
  const results = [];
  for (const { ids, n, options: chosen } of cases) {
    const stream = await model.stream({ bos: false });
    await stream.appendIds(ids);
    const generated = [];
    const set = { temperature: 0, stopAtEos: false, ...chosen };
    for await (const { id } of stream.tokens(n, set)) if (id !== null) generated.push(id);
    results.push({ ids: generated, patch_lengths: stream.patchLengths, entropies: Array.from(stream.entropies) });
  }
  return results;
}
