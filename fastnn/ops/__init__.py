"""The operators: autograd, fake (meta) and autocast rules over ``torch.ops.fastnn.*``, one file an operator."""

from fastnn.ops import adam as adam
from fastnn.ops import conv2d as conv2d
from fastnn.ops import cross_entropy as cross_entropy
from fastnn.ops import flops as flops
from fastnn.ops import max_pool2d as max_pool2d
from fastnn.ops import relu as relu
from fastnn.ops import sgd as sgd
