"""GPT-2 under Hugging Face's names: the models, the attention registry, generation."""

from model.neighbours import require

require("kernels")  # before anything imports it

from model.attention import attention_backends, register_attention
from model.config import GPT2Config
from model.gpt2 import GPT2, GPT2LMHeadModel, GPT2Model
from model.heads import (
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
)

__all__ = [
    "GPT2",
    "GPT2Config",
    "GPT2DoubleHeadsModel",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2LMHeadModel",
    "GPT2Model",
    "attention_backends",
    "register_attention",
]
