"""One module per backend, with `load(files, spec, device, threads, precision) -> Runtime`.

`nsm.runtimes.targets` names the module of each target. nsm imports it when the target is used, because the module needs
the package of the backend. `BufferedRuntime` is the base class of backends that work in host memory.
"""

from nsm.runtimes.backends.buffered import Bind, BufferedRuntime

__all__ = [
    "Bind",
    "BufferedRuntime",
]
