// The errors of nsm.js, with the names of the Python classes. A message gives the value, the expectation and the remedy.

/** Base class; never raised itself. */
export class NsmError extends Error {
  /** @param {string} message @param {ErrorOptions} [options] */
  constructor(message, options) {
    super(message, options);
    this.name = new.target.name;
  }
}

/** Invalid argument or input. */
export class InputError extends NsmError {}

/** The snapshot is damaged, or belongs to another model. */
export class SnapshotError extends InputError {}

/** The call does not fit the position of the stream. */
export class StreamError extends InputError {}

/** ONNX Runtime failed while it opened or ran a graph. */
export class RunError extends NsmError {}

/** An output or state became NaN or infinite while a stream ran; the lane can be reset. */
export class NonFiniteError extends RunError {}

/** The bundle is damaged, or requests something forbidden. */
export class BundleError extends NsmError {}

/** The bundle has another format version. */
export class BundleVersionError extends BundleError {}
