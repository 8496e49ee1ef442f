"""Words that vLLM, a checkpoint's config.json and several files here must agree on. This file imports nothing."""

QUANTIZATION = "svf"
"""The name of the quantization method: in vLLM, and in the config.json of a factored checkpoint."""
FORMAT = 1
"""The version of the factored checkpoint's layout; another one is refused."""
FACTS = "t2kernels"
"""The directory in a factored checkpoint that holds its factors and their manifest."""
GROUP = "vllm.general_plugins"
"""The entry-point group under which vLLM finds `register`."""
