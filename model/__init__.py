"""GPT-2 under Hugging Face's names: the models, the attention registry, generation."""

from model.neighbours import require

require("kernels")  # before anything imports it

from model import auto
from model.attention import attention_backends, register_attention
from model.auto import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    GPT2DoubleHeadsModelOutput,
    SequenceClassifierOutputWithPast,
)
from model.cache import KVCache
from model.config import GPT2Config
from model.generation.config import GenerationConfig
from model.generation.streaming import TextStreamer
from model.gpt2 import GPT2, GPT2LMHeadModel, GPT2Model
from model.heads import (
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
)

__all__ = [
    "GPT2",
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForQuestionAnswering",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "BaseModelOutputWithPastAndCrossAttentions",
    "CausalLMOutputWithCrossAttentions",
    "GPT2Config",
    "GPT2DoubleHeadsModel",
    "GPT2DoubleHeadsModelOutput",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2LMHeadModel",
    "GPT2Model",
    "GenerationConfig",
    "KVCache",
    "SequenceClassifierOutputWithPast",
    "TextStreamer",
    "attention_backends",
    "register_attention",
]


def __getattr__(name):
    if name in auto.ELSEWHERE:
        auto.refuse(name)
    raise AttributeError(f"module 'model' has no attribute {name!r}")
