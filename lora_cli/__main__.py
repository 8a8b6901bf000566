"""`python -m lora_cli`, which is what torchrun and accelerate launch start."""

from lora_cli.cli import main

if __name__ == "__main__":
    main()
