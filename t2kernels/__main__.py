"""`python -m t2kernels`: the same as `t2`."""

from t2kernels.cli import app

app(prog_name="t2")
