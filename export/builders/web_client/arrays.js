// Arrays as in numpy: flat numbers in row-major order, a shape, and a dtype.

import { BundleError } from "./errors.js";

/** @typedef {Float32Array | Float64Array | BigInt64Array | Int32Array | Int8Array | Uint8Array} Numbers */
/** @typedef {{data: Numbers, shape: number[], dtype: string}} NdArray */
/** @typedef {Record<string, NdArray>} Arrays */

/**
 * The dtypes of states and inputs: numpy's name, the name in .npy files, and the JavaScript array class.
 * A bool is a byte 0 or 1. ONNX Runtime uses numpy's names.
 */
const TABLE = [
  { dtype: "float32", descr: "<f4", type: Float32Array },
  { dtype: "float64", descr: "<f8", type: Float64Array },
  { dtype: "int64", descr: "<i8", type: BigInt64Array },
  { dtype: "int32", descr: "<i4", type: Int32Array },
  { dtype: "int8", descr: "|i1", type: Int8Array },
  { dtype: "uint8", descr: "|u1", type: Uint8Array },
  { dtype: "bool", descr: "|b1", type: Uint8Array },
];

/** @param {string} dtype */
export function isKnown(dtype) {
  return TABLE.some((row) => row.dtype === dtype);
}

/** @param {string} dtype */
export function typeOf(dtype) {
  return find((row) => row.dtype === dtype, dtype).type;
}

/** @param {string} dtype */
export function descrOf(dtype) {
  return find((row) => row.dtype === dtype, dtype).descr;
}

/** @param {string} descr */
export function dtypeOf(descr) {
  return find((row) => row.descr === descr, descr).dtype;
}

/** @param {string} dtype */
export function isFloat(dtype) {
  return dtype.startsWith("float");
}

/** Number of elements of a shape. @param {readonly number[]} shape */
export function sizeOf(shape) {
  return shape.reduce((product, size) => product * size, 1);
}

/** @param {readonly number[]} shape @param {string} dtype @returns {NdArray} */
export function zeros(shape, dtype) {
  return { data: new (typeOf(dtype))(sizeOf(shape)), shape: [...shape], dtype };
}

/** @param {NdArray} array @returns {NdArray} */
export function copyOf(array) {
  return { data: array.data.slice(), shape: [...array.shape], dtype: array.dtype };
}

/** An empty object for keys from files; without a prototype, `__proto__` is an ordinary key. @returns {any} */
export function record() {
  return Object.create(null);
}

/** Whether every number is finite: finite * 0 is 0, NaN and infinity * 0 are NaN. @param {NdArray} array */
export function isFinite_(array) {
  if (!isFloat(array.dtype)) return true;
  let sum = 0;
  const numbers = /** @type {Float32Array} */ (array.data);
  for (let i = 0; i < numbers.length; i++) sum += numbers[i] * 0;
  return sum === 0;
}

/** Whether two arrays have the same bytes. @param {NdArray} a @param {NdArray} b */
export function sameBytes(a, b) {
  const [x, y] = [a, b].map(({ data }) => new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  return x.length === y.length && x.every((value, index) => value === y[index]);
}

/**
 * Returns the part at `index` on `axis`, without that axis.
 * @param {NdArray} array @param {number} axis @param {number} index @returns {NdArray}
 */
export function takeAt(array, axis, index) {
  const shape = array.shape.filter((_, i) => i !== axis);
  const part = zeros(shape, array.dtype);
  eachRun(array, axis, index, (from, to, length) => {
    // @ts-ignore: both are of one type
    part.data.set(array.data.subarray(from, from + length), to);
  });
  return part;
}

/**
 * Writes a part to the place that `takeAt` reads.
 * @param {NdArray} array @param {number} axis @param {number} index @param {NdArray} part
 */
export function putAt(array, axis, index, part) {
  eachRun(array, axis, index, (from, to, length) => {
    // @ts-ignore: both are of one type
    array.data.set(part.data.subarray(to, to + length), from);
  });
}

/**
 * Visits the contiguous runs at `index` on `axis`: (offset in the array, offset in the part, length).
 * @param {NdArray} array @param {number} axis @param {number} index
 * @param {(from: number, to: number, length: number) => void} visit
 */
function eachRun(array, axis, index, visit) {
  const length = sizeOf(array.shape.slice(axis + 1));
  const outer = sizeOf(array.shape.slice(0, axis));
  for (let i = 0; i < outer; i++) visit((i * array.shape[axis] + index) * length, i * length, length);
}

/** @param {(row: typeof TABLE[number]) => boolean} matches @param {string} given */
function find(matches, given) {
  const row = TABLE.find(matches);
  if (row === undefined) {
    const known = TABLE.map(({ dtype }) => dtype).join(", ");
    throw new BundleError(`Unknown dtype ${JSON.stringify(given)}; expected one of: ${known}.`);
  }
  return row;
}
