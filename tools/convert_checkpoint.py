"""Convert checkpoints between Hugging Face and Megatron: `python tools/convert_checkpoint.py --help`."""

from spikingbrain_train.conversion.command_line import convert_checkpoint

if __name__ == "__main__":
    convert_checkpoint()
