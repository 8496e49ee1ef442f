import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter. The variable must be set before Triton is imported, and
# processes that tests start see it too.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def poison():
    """torch.empty returns NaN, so that memory that a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def large_vocabulary():
    """(model, tokenizer) with a vocabulary of 50,000 words, for faults that a small one hides. Patch copies only."""
    from tests.helpers.large_vocabulary import build_model, build_tokenizer

    return build_model(), build_tokenizer()
