"""A random token classifier, as LLMLingua-2's weights are one: `python tiny_llmlingua.py FOLDER` in that environment.

The folder's name has to be one that the package knows, see workflow/scripts/llmlingua_compress.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import XLMRobertaConfig, XLMRobertaForTokenClassification, XLMRobertaTokenizerFast

TEXT = (
    "The state of the union is strong , and the harbour board met on Tuesday . Its first report was about the price of "
    "bread , its second about the lamps on the bridge . The third came from a young engineer ."
)


def make(folder: Path) -> None:
    """Writes weights and tokenizer into `folder`."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=96, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    )
    wrapped = XLMRobertaTokenizerFast(tokenizer_object=tokenizer)
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=len(wrapped),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=514,
        num_labels=2,
        initializer_range=0.5,
        pad_token_id=wrapped.pad_token_id,
    )
    XLMRobertaForTokenClassification(config).save_pretrained(folder)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
