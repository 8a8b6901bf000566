"""conv3d: torch.nn.Conv3d, a convolution of films and volumes; not in groups, and not part of `all-linear`."""

from torch import nn

from lora_cli.adapter.convolution import Convolution, is_one_matrix

wraps = nn.Conv3d
fits = is_one_matrix
View = Convolution
