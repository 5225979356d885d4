"""Small models with random weights, one for each architecture, with the tiny model's tokenizer."""
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from sftlab.models import tiny_path

VOCABULARY = 4096
SIZES = dict(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
TOKENS = dict(bos_token_id=None, eos_token_id=0, pad_token_id=0)
LLAMA_LIKE = SIZES | TOKENS | dict(intermediate_size=64, num_key_value_heads=1,
                                   max_position_embeddings=512)
GEMMA3 = dict(
    text_config=LLAMA_LIKE | dict(head_dim=16, sliding_window=32),
    vision_config=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=64, image_size=28, patch_size=14),
    mm_tokens_per_image=4, image_token_index=3, boi_token_index=4, eoi_token_index=5)

# architecture -> the name of its configuration, and what it says
ARCHITECTURES = dict(
    llama=("LlamaConfig", LLAMA_LIKE),
    qwen2=("Qwen2Config", LLAMA_LIKE),
    qwen3=("Qwen3Config", LLAMA_LIKE | dict(head_dim=16)),
    gemma=("GemmaConfig", LLAMA_LIKE | dict(head_dim=16)),
    gemma3=("Gemma3Config", GEMMA3),
    gpt2=("GPT2Config", TOKENS | dict(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2,
                                      n_positions=512)),
    neox=("GPTNeoXConfig", SIZES | TOKENS | dict(intermediate_size=64,
                                                 max_position_embeddings=512)),
    opt=("OPTConfig", SIZES | TOKENS | dict(ffn_dim=64, word_embed_proj_dim=32,
                                            max_position_embeddings=512)),
    bloom=("BloomConfig", TOKENS | dict(vocab_size=VOCABULARY, hidden_size=32, n_layer=2,
                                        n_head=2)),
    mixtral=("MixtralConfig", LLAMA_LIKE | dict(num_local_experts=2)),
    mamba=("MambaConfig", TOKENS | dict(vocab_size=VOCABULARY, hidden_size=32,
                                        num_hidden_layers=2)),
)


def config(name, **more):
    "The configuration of a small model."
    kind, settings = ARCHITECTURES[name]
    return getattr(transformers, kind)(**settings | more)


def save_small(name, folder, **more):
    "Write a small model with its tokenizer to a folder, and give the folder's path as a string."
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(name, **more))
    return save(model, folder)


def save(model, folder):
    "Write a model, with the tiny model's tokenizer."
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_path()).save_pretrained(folder)
    return str(folder)
