"""``python -m genfast`` is the ``genfast`` command."""

from genfast.cli import app

app(prog_name="genfast")
