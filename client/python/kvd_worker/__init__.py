"""A worker that runs a real language model with its whole KV cache in kvd. `python3 -m kvd_worker --help`."""
from .cache import DirectCache, KvdCache, LocalCache
from .generate import Conversation, Sampler, generate, loss
from .model import Model

__all__ = ["Conversation", "DirectCache", "KvdCache", "LocalCache", "Model", "Sampler", "generate", "loss"]
