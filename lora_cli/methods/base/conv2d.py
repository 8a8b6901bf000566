"""conv2d: torch.nn.Conv2d, a convolution of pictures and spectrograms; not in groups, and not part of `all-linear`."""

from torch import nn

from lora_cli.adapter.convolution import Convolution, is_one_matrix

wraps = nn.Conv2d
fits = is_one_matrix
View = Convolution
