"""GPT-2 under Hugging Face's names: the model, its attention registry, generation."""

from model.attention import attention_backends, register_attention
from model.config import GPT2Config
from model.gpt2 import GPT2, GPT2LMHeadModel, GPT2Model

__all__ = ["GPT2", "GPT2Config", "GPT2LMHeadModel", "GPT2Model", "attention_backends", "register_attention"]
