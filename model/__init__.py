"""GPT-2 under Hugging Face's names: the models, the attention registry, generation."""

from model.neighbours import require

require("kernels")  # before anything imports it

from model.attention import attention_backends, register_attention
from model.auto import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    absent,
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
from model.outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    GPT2DoubleHeadsModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
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
    "QuestionAnsweringModelOutput",
    "SequenceClassifierOutputWithPast",
    "TextStreamer",
    "TokenClassifierOutput",
    "attention_backends",
    "register_attention",
]


def __getattr__(name):
    raise absent(name)
