"""Tiny random language models and their tokenizers, written into folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SENTENCES = [
    "What is 12 + 7? The answer is 19.",
    "What is 40 - 15? Subtract the tens, then the ones; the answer is 25.",
    "You are the assistant. Solve the task and give the final answer only.",
    "You are the user proxy. Check what the assistant said and answer the task.",
    "The capital of the country is the city where its government sits.",
    "Plan the steps, write the program, run the tests, and report the result.",
    "A memory of similar tasks that the team has solved before may help here.",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def llama_config(vocab_size: int, tied: bool = True) -> Any:
    """Of a Llama of 2 layers and width 32, with 4 heads, 2 of keys and values."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def save_tokenizer(folder: Path, vocab_size: int, sentences: Sequence[str] = SENTENCES) -> int:
    """Byte-level BPE trained on sentences, ChatML specials first; every text can be encoded and decoded exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sentences, trainer)
    assert sentences is not SENTENCES or bpe.get_vocab_size() == vocab_size
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return int(bpe.get_vocab_size())


def save_model(folder: Path, config: object, seed: int) -> None:
    """Random weights in float32, always the same ones for a seed."""
    import torch
    from transformers import AutoModelForCausalLM

    from latentmem.models.assets import quiet_loading

    torch.set_num_threads(1)
    with torch.random.fork_rng(), quiet_loading():
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
