"""The operators: autograd, fake (meta) and autocast rules over ``torch.ops.fastnn.*``, one file an operator."""
