"""transformers' names for whoever changes nothing but the import line: Auto classes, outputs, and what is not here."""

from model.config import GPT2Config
from model.gpt2 import GPT2, GPT2Model
from model.heads import GPT2ForQuestionAnswering, GPT2ForSequenceClassification, GPT2ForTokenClassification
from model.outputs import BaseModelOutput, CausalLMOutput, DoubleHeadsOutput, SequenceClassifierOutput


class _Auto:
    """A class that is chosen by a checkpoint's config.json in transformers; here every checkpoint is GPT-2's."""

    chosen = None

    def __init__(self):
        name = type(self).__name__
        raise TypeError(f"{name} makes no objects; {name}.from_pretrained(...) and {name}.from_config(...) do")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **options):
        """As the class `chosen` has it. Raises ValueError where the checkpoint is of another model."""
        return cls.chosen.from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def from_config(cls, config, **options):
        """A model with random weights."""
        return cls.chosen(config, **options)


class AutoModel(_Auto):
    chosen = GPT2Model


class AutoModelForCausalLM(_Auto):
    chosen = GPT2


class AutoModelForSequenceClassification(_Auto):
    chosen = GPT2ForSequenceClassification


class AutoModelForTokenClassification(_Auto):
    chosen = GPT2ForTokenClassification


class AutoModelForQuestionAnswering(_Auto):
    chosen = GPT2ForQuestionAnswering


AutoConfig = GPT2Config
GPT2DoubleHeadsModelOutput = DoubleHeadsOutput
BaseModelOutputWithPastAndCrossAttentions = BaseModelOutput
CausalLMOutputWithCrossAttentions = CausalLMOutput
SequenceClassifierOutputWithPast = SequenceClassifierOutput

# Of TensorFlow and Flax, and what serves instead.
ELSEWHERE = {
    "TFGPT2Model": "GPT2Model",
    "TFGPT2LMHeadModel": "GPT2LMHeadModel",
    "TFGPT2DoubleHeadsModel": "GPT2DoubleHeadsModel",
    "TFGPT2DoubleHeadsModelOutput": "GPT2DoubleHeadsModelOutput",
    "TFGPT2ForSequenceClassification": "GPT2ForSequenceClassification",
    "TFSequenceClassifierOutputWithPast": "SequenceClassifierOutputWithPast",
    "TFGPT2Tokenizer": "GPT2Tokenizer of the package tokenizer",
    "FlaxGPT2Model": "GPT2Model",
    "FlaxGPT2LMHeadModel": "GPT2LMHeadModel",
}


def refuse(name):
    """Raises the ImportError of a class that is not in PyTorch."""
    framework = "Flax" if name.startswith("Flax") else "TensorFlow"
    raise ImportError(
        f"{name} is a class of {framework}; use {ELSEWHERE[name]}. Checkpoints of the Hub that hold safetensors or "
        "PyTorch weights beside their own, as GPT-2's do, load as they are"
    )
