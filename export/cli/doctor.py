"""`nsm doctor`: show installed packages, devices, and how to install missing packages."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from nsm.export.analysis import examine, usable
from nsm.export.report import Terminal


def doctor(as_json: bool) -> None:
    """Examine the installation; see `nsm doctor --help`."""
    findings = examine()
    if as_json:
        click.echo(json.dumps({"findings": [asdict(item) for item in findings], "targets": usable()}))
        return
    rows = [[item.name, item.found or "missing", item.purpose, "" if item.found else item.fix] for item in findings]
    Terminal().table(("component", "found", "needed for", "to install"), rows)
