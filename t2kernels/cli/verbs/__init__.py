"""One file a verb of `t2`."""
