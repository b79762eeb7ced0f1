"""`python -m nsm.export` is `nsm-export`."""

from nsm.export.cli import export_main

export_main()
