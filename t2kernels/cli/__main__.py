"""`python -m t2kernels.cli` is the command `t2`."""

from . import app

app(prog_name="t2")
