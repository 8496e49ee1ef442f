"""`python -m t2kernels` is the command `t2`."""

from .cli import app

app(prog_name="t2")
