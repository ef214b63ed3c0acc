"""Write a Megatron checkpoint as a Hugging Face folder: `python tools/export.py --help`."""

from spikingbrain_train.conversion.command_line import export

if __name__ == "__main__":
    export()
