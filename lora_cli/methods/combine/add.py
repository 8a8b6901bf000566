"""add: W = W0 + ΔW. arXiv:2106.09685"""

from lora_cli.adapter.layer import Adapted

make = Adapted
