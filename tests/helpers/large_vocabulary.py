"""A random Llama with the vocabulary of a real model: 50,000 words, 8 blocks of width 64. Nothing is downloaded."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 50_000
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token per word: w4, w5, ... w49999; the word's number is its id."""
    words = {**{word: i for i, word in enumerate(SPECIAL)}, **{f"w{i}": i for i in range(len(SPECIAL), VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def build_model() -> LlamaForCausalLM:
    """Random weights, large enough that experts matter. Logits have a deviation of about 2: some tokens are likely."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = 0.25 if module.weight.shape[0] == VOCABULARY else 1.5 / module.weight.shape[1] ** 0.5
                module.weight.normal_(std=std)
    return model
