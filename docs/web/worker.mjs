// The network, on a thread of its own: frames come in one by one, the person goes out, states stay here.
//
//     {model: ArrayBuffer, threads}  ->  {ready: {width, height, states, bits, threads}}
//     {reset: true}                      states back to those before the first frame; no answer
//     {frame: ArrayBuffer}           ->  {person: ArrayBuffer, milliseconds}    RGBA in, RGBA out, A is the alpha
//     anything that fails            ->  {error: text}

import * as ort from "./ort/ort.wasm.min.mjs";
import { readMetadata } from "./metadata.mjs";

ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
ort.env.logLevel = "error";

let session, pairs, grids, mean, std, frame, alpha, foreground, feeds;

onmessage = async ({ data }) => {
    try {
        if (data.model) postMessage({ ready: await load(new Uint8Array(data.model), data.threads) });
        else if (data.reset) reset();
        else {
            const started = performance.now(), person = await matte(new Uint8ClampedArray(data.frame));
            postMessage({ person: person.buffer, milliseconds: performance.now() - started }, [person.buffer]);
        }
    } catch (error) {
        postMessage({ error: error.message ?? String(error) });
    }
};

async function load(bytes, threads) {
    const metadata = readMetadata(bytes);
    if (!metadata["vmq.states"]) throw new Error("the file does not say which states it has; compile it with vmq");
    ort.env.wasm.numThreads = threads;
    await session?.release();
    session = undefined;
    const created = await ort.InferenceSession.create(bytes, { graphOptimizationLevel: "all" });
    pairs = JSON.parse(metadata["vmq.states"]);
    grids = JSON.parse(metadata["vmq.quantized_states"] ?? "{}");
    ({ mean, std } = JSON.parse(metadata["vmq.normalization"] ?? '{"mean":[0],"std":[1]}'));
    const sources = Object.values(pairs), is = (shape, like) => shape.join() === like.join();
    frame = created.inputMetadata.find(i => !(i.name in pairs) && i.shape.length === 4 && i.shape[1] === 3);
    if (!frame) throw new Error("the model has no input that takes a picture, [1,3,H,W]");
    const [, , height, width] = frame.shape;
    if (!Number.isInteger(height * width)) throw new Error("the model takes any size; compile it for one: --size 512x288");
    const output = channels => created.outputMetadata.find(o => !sources.includes(o.name)
        && is(o.shape, [1, channels, height, width]))?.name;
    alpha = output(1);
    foreground = output(3);
    if (!alpha) throw new Error(`the model has no alpha, an output [1,1,${height},${width}]`);
    session = created;
    reset();
    const bits = metadata["vmq.options"] ? JSON.parse(metadata["vmq.options"]).bits : "float";
    return { width, height, states: sources.length, bits, threads };
}

// Zeros everywhere, as integers where a state is uint8; inputs that are neither frame nor state are a downsample ratio that is bound already.
function reset() {
    feeds = {};
    for (const { name, shape } of session.inputMetadata) feeds[name] = first(name, shape);
}

function first(name, shape) {
    const count = shape.reduce((a, b) => a * b, 1), grid = grids[name];
    return grid ? new ort.Tensor("uint8", new Uint8Array(count).fill(grid.zero_point), shape)
        : new ort.Tensor("float32", new Float32Array(count), shape);
}

async function matte(rgba) {
    if (!session) throw new Error("there is no model yet");
    const area = frame.shape[2] * frame.shape[3], planes = new Float32Array(3 * area);
    if (rgba.length !== 4 * area) throw new Error(`the model takes ${frame.shape[3]}x${frame.shape[2]} pixels`);
    for (let pixel = 0; pixel < area; pixel++) {
        for (let c = 0; c < 3; c++) {
            planes[c * area + pixel] = (rgba[4 * pixel + c] / 255 - mean[c % mean.length]) / std[c % std.length];
        }
    }
    feeds[frame.name] = new ort.Tensor("float32", planes, frame.shape);
    const outputs = await session.run(feeds);
    for (const [state, source] of Object.entries(pairs)) feeds[state] = outputs[source];
    const opacity = outputs[alpha].data, colours = outputs[foreground]?.data;
    for (let pixel = 0; pixel < area; pixel++) {
        for (let c = 0; colours && c < 3; c++) rgba[4 * pixel + c] = Math.floor(colours[c * area + pixel] * 255 + 0.5);
        rgba[4 * pixel + 3] = Math.floor(opacity[pixel] * 255 + 0.5);
    }
    return rgba;
}
