"""Tasks from datasets of the Hugging Face hub. One file per dataset, which declares its tasks; this table lists them all."""

from . import arc, competition_math, gsm8k, python_code, textvqa
from .source import Dataset

TASKS: dict[str, Dataset] = {
    **gsm8k.TASKS,
    **competition_math.TASKS,
    **python_code.TASKS,
    **arc.TASKS,
    **textvqa.TASKS,
}
