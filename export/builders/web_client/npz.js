// Reads and writes .npz files (.zip files of .npy files), byte for byte as numpy's savez does.
// They are uncompressed, and nothing is unpickled.

import { descrOf, dtypeOf, record, sizeOf, typeOf } from "./arrays.js";
import { BundleError } from "./errors.js";

/** @typedef {import("./arrays.js").NdArray} NdArray */
/** @typedef {import("./arrays.js").Arrays} Arrays */

const LOCAL = 0x04034b50;
const CENTRAL = 0x02014b50;
const END = 0x06054b50;
const END_SIZE = 22;
const MAGIC = [0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59]; // \x93NUMPY
const latin1 = new TextDecoder("latin1");

/**
 * Returns all arrays of an .npz by name, and its texts (numpy's scalars of kind U).
 * @param {Uint8Array} bytes @param {string} what for messages
 * @returns {{arrays: Arrays, texts: Record<string, string>}}
 */
export function readNpz(bytes, what) {
  const [arrays, texts] = [record(), record()];
  try {
    for (const [file, content] of entries(bytes)) {
      const name = file.replace(/\.npy$/, "");
      const read = readNpy(content);
      if (typeof read === "string") texts[name] = read;
      else arrays[name] = read;
    }
  } catch (error) {
    throw new BundleError(`${what} cannot be read as an archive of arrays (${error}). Export the bundle again.`, {
      cause: error,
    });
  }
  return { arrays, texts };
}

/** @param {Uint8Array} bytes @returns {Iterable<[string, Uint8Array]>} */
function* entries(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const end = bytes.length - END_SIZE; // numpy writes no comment after the end record
  if (end < 0 || view.getUint32(end, true) !== END) throw new Error("it does not end like a .zip");
  let at = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left > 0; left--) {
    if (view.getUint32(at, true) !== CENTRAL) throw new Error("its directory is damaged");
    const [method, packed, size] = [view.getUint16(at + 10, true), view.getUint32(at + 20, true), view.getUint32(at + 24, true)];
    if (method !== 0 || packed !== size) throw new Error("it is compressed; np.savez writes what can be read here");
    const [nameLength, extra, comment] = [28, 30, 32].map((offset) => view.getUint16(at + offset, true));
    const name = latin1.decode(bytes.subarray(at + 46, at + 46 + nameLength));
    const local = view.getUint32(at + 42, true);
    if (view.getUint32(local, true) !== LOCAL) throw new Error(`${name} is not where it should be`);
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    if (start + size > bytes.length) throw new Error(`${name} is cut off`);
    yield [name, bytes.subarray(start, start + size)];
    at += 46 + nameLength + extra + comment;
  }
}

/** @param {Uint8Array} bytes @returns {NdArray | string} */
function readNpy(bytes) {
  if (!MAGIC.every((value, index) => bytes[index] === value)) throw new Error("an entry is no .npy");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const start = bytes[6] === 1 ? 10 : 12;
  const length = start + (bytes[6] === 1 ? view.getUint16(8, true) : view.getUint32(8, true));
  const header = latin1.decode(bytes.subarray(start, length));
  const found = /^\{'descr': '([^']+)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \}\s*$/.exec(header);
  if (found === null) throw new Error(`an entry has the header ${header.trim()}`);
  const shape = found[3].split(",").filter((part) => part.trim()).map(Number);
  const content = bytes.slice(length); // a copy starts at offset 0, which is aligned for any type
  const text = /^<U(\d+)$/.exec(found[1]);
  if (text !== null) return readText(content, Number(text[1]), shape);
  const dtype = dtypeOf(found[1]);
  const data = new (typeOf(dtype))(content.buffer);
  if (data.length !== sizeOf(shape)) throw new Error(`an entry holds ${data.length} numbers, not [${shape}]`);
  return { data: found[2] === "True" ? fromColumns(data, shape) : data, shape, dtype };
}

/** @param {Uint8Array} content @param {number} length @param {number[]} shape */
function readText(content, length, shape) {
  if (shape.length !== 0 || content.length !== 4 * length) throw new Error("an entry is a list of texts");
  const points = [...new Uint32Array(content.buffer)].filter((point) => point !== 0); // numpy pads with zeros
  return points.map((point) => String.fromCodePoint(point)).join("");
}

/**
 * Converts column-major numbers to row-major; numpy keeps the order of the saved array.
 * @template {import("./arrays.js").Numbers} T @param {T} data @param {number[]} shape @returns {T}
 */
function fromColumns(data, shape) {
  const result = /** @type {T} */ (data.slice());
  const steps = shape.map((_, axis) => sizeOf(shape.slice(0, axis)));
  const index = shape.map(() => 0);
  for (let i = 0; i < data.length; i++) {
    result[i] = data[index.reduce((sum, value, axis) => sum + value * steps[axis], 0)];
    for (let axis = shape.length - 1; axis >= 0 && ++index[axis] === shape[axis]; axis--) index[axis] = 0;
  }
  return result;
}

/**
 * Returns the bytes that `np.savez(file, allow_pickle=False, **items)` writes for these items, in their order.
 * @param {[string, NdArray | string][]} items
 */
export function writeNpz(items) {
  /** @type {Uint8Array[]} */
  const parts = [];
  /** @type {Uint8Array[]} */
  const directory = [];
  let at = 0;
  for (const [key, value] of items) {
    const name = new TextEncoder().encode(`${key}.npy`);
    const content = writeNpy(value);
    const crc = crc32(content);
    const common = [[2, 0], [2, 0], [2, 0], [2, 0x21], [4, crc]]; // flags, stored, 1 January 1980
    const big = 0xffffffff; // numpy always uses 64-bit sizes
    const extra = [[2, 1], [2, 16], [8, content.length], [8, content.length]];
    const sizes = [[2, name.length], [2, 20]];
    const local = join([fields([[4, LOCAL], [2, 45], ...common, [4, big], [4, big], ...sizes]), name, fields(extra), content]);
    const tail = [[2, name.length], [2, 0], [2, 0], [2, 0], [2, 0], [4, 0o600 * 0x10000], [4, at]];
    const sized = [[4, content.length], [4, content.length]];
    directory.push(fields([[4, CENTRAL], [2, 0x32d], [2, 45], ...common, ...sized, ...tail]), name);
    parts.push(local);
    at += local.length;
  }
  const central = join(directory);
  const count = items.length;
  const end = fields([[4, END], [2, 0], [2, 0], [2, count], [2, count], [4, central.length], [4, at], [2, 0]]);
  return join([...parts, central, end]);
}

/** @param {NdArray | string} value */
function writeNpy(value) {
  const text = typeof value === "string";
  const shape = text ? [] : value.shape;
  const descr = text ? `<U${[...value].length}` : descrOf(value.dtype);
  const listed = shape.length === 1 ? `${shape[0]},` : shape.join(", ");
  let header = `{'descr': '${descr}', 'fortran_order': False, 'shape': (${listed}), }`;
  // numpy leaves room for the first axis to grow to 21 digits, then fills up to a multiple of 64.
  if (shape.length) header += " ".repeat(21 - String(shape[0]).length);
  header += " ".repeat(63 - ((10 + header.length) % 64)) + "\n";
  const data = text ? Uint32Array.from([...value], (letter) => letter.codePointAt(0) ?? 0) : value.data;
  const front = new Uint8Array([...MAGIC, 1, 0, header.length & 255, header.length >> 8]);
  return join([front, new TextEncoder().encode(header), new Uint8Array(data.buffer, data.byteOffset, data.byteLength)]);
}

/** Encode little-endian numbers, [bytes, value] each. @param {number[][]} values */
function fields(values) {
  const bytes = new Uint8Array(values.reduce((sum, [width]) => sum + width, 0));
  let at = 0;
  for (const [width, value] of values) {
    for (let i = 0, rest = value; i < width; i++, rest = Math.floor(rest / 256)) bytes[at++] = rest % 256;
  }
  return bytes;
}

/** @param {Uint8Array[]} parts */
export function join(parts) {
  const bytes = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    bytes.set(part, at);
    at += part.length;
  }
  return bytes;
}

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  let value = n;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? 0xedb88320 ^ (value >>> 1) : value >>> 1;
  return value;
});

/** @param {Uint8Array} bytes */
function crc32(bytes) {
  let value = 0xffffffff;
  for (const byte of bytes) value = CRC[(value ^ byte) & 255] ^ (value >>> 8);
  return (value ^ 0xffffffff) >>> 0;
}
