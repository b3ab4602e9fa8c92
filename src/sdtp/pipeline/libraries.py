"""The versions of the libraries that compute and store numbers: what is made once is of these."""

import safetensors
import torch
import transformers

# Another version may compute other numbers, or write the same ones in another order.
LIBRARIES = {module.__name__: module.__version__ for module in (safetensors, torch, transformers)}
