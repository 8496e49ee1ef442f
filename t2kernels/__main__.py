"""`python -m t2kernels`: the same as `t2`."""

from .cli import app

app(prog_name="t2")
