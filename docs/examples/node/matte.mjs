// Mattes a clip with a model that vmq compiled: raw RGB frames of the model's size in, raw 8-bit alpha out.
//
//     node matte.mjs rvm_w4a4.onnx < talk.rgb > alpha.gray

import { readFileSync } from "node:fs";
import ort from "onnxruntime-node";
import { readMetadata } from "./metadata.mjs";

const path = process.argv[2];
const session = await ort.InferenceSession.create(path);
const metadata = readMetadata(readFileSync(path));
const pairs = JSON.parse(metadata["vmq.states"]);                                // {"r1i": "r1o", ...}
const grids = JSON.parse(metadata["vmq.quantized_states"] ?? "{}");              // of states that are uint8
const norm = JSON.parse(metadata["vmq.normalization"] ?? '{"mean":[0],"std":[1]}');   // one number, or three
const [mean, std] = [norm.mean, norm.std].map(numbers => Float32Array.from([0, 1, 2], c => numbers[c % numbers.length]));

// The frame is the input [1,3,H,W] that is no state, alpha the output [1,1,H,W] that is none.
const frame = session.inputMetadata.find(i => !(i.name in pairs) && i.shape.length === 4 && i.shape[1] === 3);
const [, , height, width] = frame.shape;
const alpha = session.outputMetadata.find(o => !Object.values(pairs).includes(o.name)
    && o.shape.join() === [1, 1, height, width].join());

// Before the first frame every state is zero; other inputs (a downsample ratio that is bound already) are ignored.
const feeds = {};
for (const { name, shape } of session.inputMetadata) feeds[name] = first(name, shape);

const size = 3 * height * width;
let buffered = Buffer.alloc(0);
for await (const chunk of process.stdin) {
    buffered = Buffer.concat([buffered, chunk]);
    for (; buffered.length >= size; buffered = buffered.subarray(size)) {
        process.stdout.write(await matte(buffered.subarray(0, size)));
    }
}

async function matte(rgb) {
    const planes = new Float32Array(size), round = Math.fround;                  // HWC -> CHW, in float32 as elsewhere
    for (let pixel = 0, area = height * width; pixel < area; pixel++) {
        for (let c = 0; c < 3; c++) {
            planes[c * area + pixel] = round(round(rgb[3 * pixel + c] / 255) - mean[c]) / std[c];
        }
    }
    feeds[frame.name] = new ort.Tensor("float32", planes, frame.shape);
    const outputs = await session.run(feeds);
    for (const [state, source] of Object.entries(pairs)) feeds[state] = outputs[source];
    return Uint8Array.from(outputs[alpha.name].data, a => Math.floor(a * 255 + 0.5));
}

function first(name, shape) {
    const count = shape.reduce((a, b) => a * b, 1), grid = grids[name];
    return grid ? new ort.Tensor("uint8", new Uint8Array(count).fill(grid.zero_point), shape)
        : new ort.Tensor("float32", new Float32Array(count), shape);
}
