"""The command line: `nsm` and `nsm-export`. `app` declares the commands; one module runs each."""

from nsm.export.cli.app import export_main, main

__all__ = [
    "export_main",
    "main",
]
