"""`python -m nsm.export` is `nsm-export`."""

from nsm.export.cli import export_main

if __name__ == "__main__":
    export_main()
