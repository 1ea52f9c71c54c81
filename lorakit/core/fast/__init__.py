"""lorakit's own way to compute the decoder layers of a Llama: frozen matrices in 8 or 4 bits, LoRA inside the product.

storage   what frozen matrices are kept in
linear    one operator for a frozen matrix with LoRA, its backward pass written by hand
kernels   Triton: what the GPU does for it
loss      of a frozen head, with its gradient
layers    a decoder layer made of it
engine    how a model gets it

Storage and compute are apart: fp8 and 4-bit bases are multiplied as 8-bit floats where the GPU can (compute capability
8.9), everything else in the base's own number type.
"""
