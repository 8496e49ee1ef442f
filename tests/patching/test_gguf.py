"""A model from a GGUF file has plain weights and is marked as quantised: it must train and be saved all the same."""

from types import SimpleNamespace

import pytest
from transformers.trainer_utils import validate_quantization_for_training
from transformers.utils.quantization_config import GgufConfig, QuantizationMethod

import t2kernels as t2
from tests.helpers.families import build


def test_the_mark_of_a_gguf_file_is_taken_off(tmp_path):
    model = build("llama")
    model.is_quantized, model.quantization_method = True, QuantizationMethod.GGUF
    model.hf_quantizer = SimpleNamespace(is_trainable=False, is_qat_trainable=False)
    model.config.quantization_config = GgufConfig()
    with pytest.raises(ValueError, match="quantized"):
        validate_quantization_for_training(model)
    t2.patch_model(model, rank=4)
    validate_quantization_for_training(model)
    t2.unpatch_model(model).save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


def test_another_mark_stays():
    model = build("llama")
    model.is_quantized, model.quantization_method = True, QuantizationMethod.BITS_AND_BYTES
    t2.patch_model(model, rank=4, form="delta")
    assert (model.is_quantized, model.quantization_method) == (True, QuantizationMethod.BITS_AND_BYTES)
