"""Shared fixtures: tiny Hugging Face folders of five architectures with random weights, and ragged rows of tokens."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PretrainedConfig, PreTrainedTokenizerFast

from rlhf_lab.data.tokenise import join, pad
from rlhf_lab.types import Sequences

ARCHITECTURES = ("llama", "qwen2", "gpt_neox", "gpt2", "opt")
MAX_POSITIONS = 96
CORPUS = [
    "User: how do i bake bread ?\n\nAssistant: first mix flour and water , then wait and bake .",
    "User: is it safe to mix bleach and acid ?\n\nAssistant: no , never do that . open a window and walk away .",
    "USER: tell me a joke ASSISTANT: why did the bread rise ? it had a reason .",
] * 4
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# architecture -> (bos, eos, pad, whether the tokenizer writes the bos itself); GPT-2 style has no pad of its own
SPECIAL_TOKENS = {
    "llama": ("<s>", "</s>", "<pad>", True),
    "qwen2": (None, "<|im_end|>", "<|endoftext|>", False),
    "gpt_neox": ("<|endoftext|>", "<|endoftext|>", "<|padding|>", False),
    "gpt2": ("<|endoftext|>", "<|endoftext|>", None, False),
    "opt": ("</s>", "</s>", "<pad>", True),
}


def train_tokenizer(architecture: str, merges: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 256 bytes, the special tokens of `architecture` and `merges` merges."""
    bos, eos, padding, writes_bos = SPECIAL_TOKENS[architecture]
    special = list(dict.fromkeys(t for t in (bos, eos, padding, "<|im_start|>") if t is not None))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=256 + len(special) + merges,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if writes_bos and bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=padding)
    if architecture == "qwen2":
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def small_config(architecture: str, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """Two layers, width 32, weights large enough that no two logits nearly tie."""
    shared = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    trunk = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": 0.25,
    }
    match architecture:
        case "llama":
            return transformers.LlamaConfig(**shared, **trunk, num_key_value_heads=2, tie_word_embeddings=True)
        case "qwen2":
            return transformers.Qwen2Config(**shared, **trunk, num_key_value_heads=2, tie_word_embeddings=False)
        case "gpt_neox":
            return transformers.GPTNeoXConfig(**shared, **trunk)
        case "gpt2":
            return transformers.GPT2Config(
                **shared, n_embd=32, n_layer=2, n_head=4, n_positions=MAX_POSITIONS, initializer_range=0.25
            )
        case _:
            return transformers.OPTConfig(
                **shared,
                hidden_size=32,
                word_embed_proj_dim=16,  # narrower embeddings than layers, as in opt-350m
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=MAX_POSITIONS,
                init_std=0.25,
            )


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Each architecture in turn."""
    return request.param


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """architecture -> folder of a causal language model with random weights and its tokenizer; made once."""

    @functools.cache
    def make(architecture: str) -> str:
        folder: Path = tmp_path_factory.mktemp(f"policy_{architecture}")
        tokenizer = train_tokenizer(architecture, merges=40)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(small_config(architecture, tokenizer))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def scorer_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """(architecture, seed=0, merges=90) -> folder of a one-label classifier.

    Its tokenizer has more merges than the policy's 40, unless that is asked for.
    """

    @functools.cache
    def make(architecture: str, seed: int = 0, merges: int = 90) -> str:
        folder: Path = tmp_path_factory.mktemp(f"scorer_{architecture}")
        tokenizer = train_tokenizer(architecture, merges)
        config = small_config(architecture, tokenizer)
        config.num_labels = 1
        torch.manual_seed(100 + seed)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        torch.nn.init.normal_(model.score.weight)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def write_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """(architecture, merges) -> a fresh tokenizer."""
    return train_tokenizer


@pytest.fixture(scope="session")
def ragged() -> Callable[..., tuple[Sequences, list[list[int]], list[list[int]]]]:
    """(vocabulary, rows, seed=0, fill=0) -> sequences of unequal lengths, and the prompts and responses they hold.

    Every id is drawn, pad and EOS included, so that code which infers masks from ids fails.
    """

    def make(
        vocabulary: int, rows: int, seed: int = 0, fill: int = 0
    ) -> tuple[Sequences, list[list[int]], list[list[int]]]:
        source = torch.Generator().manual_seed(seed)

        def draw(longest: int) -> list[list[int]]:
            lengths = torch.randint(1, longest + 1, (rows,), generator=source).tolist()
            return [torch.randint(0, vocabulary, (n,), generator=source).tolist() for n in lengths]

        prompts, responses = draw(7), draw(9)
        for row in responses[::2]:
            row[-1] = fill  # a pad id that is real
        return join(*pad(prompts, fill, "left"), *pad(responses, fill, "right")), prompts, responses

    return make
