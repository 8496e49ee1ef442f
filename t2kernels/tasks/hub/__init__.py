"""Tasks from datasets of the Hugging Face hub.

One file per dataset declares its tasks in `TASKS`. To add a dataset, write such a file and add a line to the table
here.
"""

from . import arc, competition_math, gsm8k, python_code, textvqa
from .source import Dataset

TASKS: dict[str, Dataset] = {
    **gsm8k.TASKS,
    **competition_math.TASKS,
    **python_code.TASKS,
    **arc.TASKS,
    **textvqa.TASKS,
}
