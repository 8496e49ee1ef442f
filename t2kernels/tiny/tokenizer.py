"""The tiny model's tokenizer: one token a character, a Hugging Face fast tokenizer."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
PAD, BOS, EOS = 0, 1, 2
VOCABULARY: dict[str, int] = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}


def encode(text: str) -> list[int]:
    """The ids of printable ASCII text without special tokens: as the tokenizer gives them, but faster."""
    return [VOCABULARY[character] for character in text]


def build() -> PreTrainedTokenizerFast:
    """The tokenizer: newline and printable ASCII, anything else is <unk>.

    It puts <s> in front, pads on the left and keeps all white space.
    """
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
