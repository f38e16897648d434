// The metadata of an ONNX file, which ONNX Runtime for JavaScript does not hand out.
//
// A model is a protobuf message; metadata_props is its field 14, repeated, each with a key (field 1) and a value
// (field 2), both strings. Fields of other numbers are stepped over.

// The fields of a protobuf message: yields [number, bytes] of those with bytes, as strings and messages have.
function* fields(bytes) {
    let at = 0;
    const varint = () => {
        let value = 0, factor = 1, byte;
        do {
            if (at >= bytes.length) throw new Error("this is not an ONNX file, or it is cut off");
            byte = bytes[at++];
            value += (byte & 127) * factor;
            factor *= 128;
        } while (byte & 128);
        return value;
    };
    while (at < bytes.length) {
        const tag = varint(), number = Math.floor(tag / 8), kind = tag % 8;
        if (kind === 0) varint();
        else if (kind === 1) at += 8;
        else if (kind === 5) at += 4;
        else if (kind === 2) {
            const length = varint();
            if (at + length > bytes.length) throw new Error("this is not an ONNX file, or it is cut off");
            yield [number, bytes.subarray(at, at += length)];
        } else throw new Error("this is not an ONNX file");
    }
}

// Metadata of a model as {key: value}; `bytes` is the whole file, a Uint8Array.
export function readMetadata(bytes) {
    const found = {}, text = new TextDecoder();
    for (const [number, entry] of fields(bytes)) {
        if (number !== 14) continue;
        const pair = Object.fromEntries(fields(entry));
        found[text.decode(pair[1])] = text.decode(pair[2] ?? new Uint8Array());
    }
    return found;
}
