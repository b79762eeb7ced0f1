// The errors that nsm.js raises on purpose; the names are those of Python's. A message says what was given, what was
// expected, and what to do.

/** Root of the tree; never raised itself. */
export class NsmError extends Error {
  /** @param {string} message @param {ErrorOptions} [options] */
  constructor(message, options) {
    super(message, options);
    this.name = new.target.name;
  }
}

/** An argument or an input is not what the call accepts. */
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

/** The bundle was written in another format version. */
export class BundleVersionError extends BundleError {}
