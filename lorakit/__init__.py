"""lorakit: fine-tune Llama-family language models with LoRA, from dataset to merged model.

Importing it does nothing: no torch, no patch, no logging set-up, no change of the environment.
"""

__version__ = "0.1.0"
