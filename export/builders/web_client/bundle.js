// A bundle: its manifest, and its files, checked against the recorded sizes and hashes.

import { BundleError, BundleVersionError } from "./errors.js";
import { readNpz } from "./npz.js";

export const FORMAT_VERSION = 2;

/** Reads a file of the bundle by its path. @typedef {(path: string) => Promise<Uint8Array>} Reader */

/** Reads files below the URL of a static file server. @param {string | URL} base @returns {Reader} */
export function fromUrl(base) {
  const root = String(base).endsWith("/") ? String(base) : `${base}/`;
  return async (path) => {
    const response = await fetch(root + path, { cache: "no-cache" });
    if (!response.ok) throw new BundleError(`${root + path} cannot be read: the server answered ${response.status}.`);
    return new Uint8Array(await response.arrayBuffer());
  };
}

/** Refuses a path that leaves the bundle. @param {unknown} path @returns {string} */
export function inside(path) {
  const parts = typeof path === "string" ? path.split("/") : [""];
  if (parts.some((part) => part === "" || part === "." || part === ".." || /[\\:\0?#%]/.test(part))) {
    throw new BundleError(`The manifest names ${JSON.stringify(path)}, which is not a path inside the bundle.`);
  }
  return parts.join("/");
}

export class Bundle {
  /** @param {Reader} read @param {any} manifest */
  constructor(read, manifest) {
    this.manifest = manifest;
    this.spec = manifest.spec;
    this._read = read;
    /** @type {Map<string, {path: string, size: number, sha256: string}>} */
    this._records = new Map();
    const artifacts = /** @type {any[]} */ (manifest.artifacts);
    /** Maximum tokens of a lane between two resets; null if unlimited. @type {number | null} */
    this.capacity = null;
    for (const most of [manifest.spec.capacity, ...artifacts.filter((item) => item.target === "web").map((item) => item.limit)]) {
      if (most === null) continue;
      if (!Number.isSafeInteger(most) || most < 1) {
        throw new BundleError(`The manifest limits a stream to ${JSON.stringify(most)} tokens; expected a number above 0, or null. Export it again.`);
      }
      this.capacity = Math.min(most, this.capacity ?? most);
    }
    for (const record of [...manifest.files, ...artifacts.flatMap((item) => item.files)]) {
      this._records.set(inside(record.path), record);
    }
  }

  /** @param {Reader} read @returns {Promise<Bundle>} */
  static async open(read) {
    let manifest;
    try {
      manifest = JSON.parse(new TextDecoder().decode(await read("manifest.json")));
    } catch (error) {
      throw new BundleError(`manifest.json cannot be read (${error}). Is this a bundle that nsm-export wrote?`, { cause: error });
    }
    if (manifest?.format_version !== FORMAT_VERSION) {
      throw new BundleVersionError(
        `The bundle has format version ${JSON.stringify(manifest?.format_version)}; this client reads version ` +
          `${FORMAT_VERSION}. Export it again, or take the client that belongs to it.`,
      );
    }
    if (!Array.isArray(manifest.files) || !Array.isArray(manifest.artifacts) || !Array.isArray(manifest.spec?.entries)) {
      throw new BundleError("manifest.json lacks files, artifacts or entries. Was it edited by hand? Export it again.");
    }
    return new Bundle(read, manifest);
  }

  /** Reads and checks a file that the manifest lists. @param {string} path */
  async file(path) {
    const record = this._records.get(inside(path));
    if (record === undefined) throw new BundleError(`The manifest does not list ${path}. Export the bundle again.`);
    const bytes = await this._read(path);
    if (bytes.length !== record.size) {
      throw new BundleError(`${path} has ${bytes.length} bytes, recorded are ${record.size}. Copy or export it again.`);
    }
    if ((await sha256(bytes)) !== record.sha256) {
      throw new BundleError(`The content of ${path} does not have the recorded SHA-256. Copy or export it again.`);
    }
    return bytes;
  }

  /** Reads the initial states and checks the spec against them: the file size bounds the allocation. */
  async initial() {
    const { arrays } = await this.arrays("state_init.npz");
    const broken = (/** @type {string} */ what) => new BundleError(`The manifest is invalid: ${what}. Was it edited by hand? Export the bundle again.`);
    const { batch, states, entries } = this.spec;
    if (!Array.isArray(states)) throw broken("it has no states");
    for (const { name, shape, dtype, batch_axis: axis } of states) {
      const value = arrays[name];
      if (value === undefined || String(value.shape) !== String(shape) || value.dtype !== dtype || shape[axis] !== batch) {
        throw broken(`${name} is ${dtype}[${shape}] for ${batch} lanes, and starts from ${value ? `${value.dtype}[${value.shape}]` : "nothing"}`);
      }
    }
    const names = states.map((/** @type {any} */ state) => state.name);
    for (const entry of entries) {
      const unknown = [...entry.reads, ...entry.writes].find((name) => !names.includes(name));
      if (unknown !== undefined) throw broken(`${entry.name} refers to the undefined state ${unknown}`);
    }
    const writes = (/** @type {string} */ name) => entries.find((/** @type {any} */ entry) => entry.name === name)?.writes;
    const unended = ["decode", "commit"].find((name) => !writes(name)?.includes("lane.offset"));
    if (names.includes("lane.offset") && writes("decode") !== undefined && unended !== undefined) {
      throw broken(`it has no entry ${unended} that writes lane.offset, so no chunk can be committed`);
    }
    return arrays;
  }

  /** @param {string} path */
  has(path) {
    return this._records.has(path);
  }

  /** @param {string} path */
  async arrays(path) {
    return readNpz(await this.file(path), path);
  }
}

/** SHA-256 in hexadecimal. @param {Uint8Array} bytes */
export async function sha256(bytes) {
  const digest = await crypto.subtle.digest("SHA-256", /** @type {BufferSource} */ (bytes));
  return [...new Uint8Array(digest)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
