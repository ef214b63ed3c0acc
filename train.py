"""Train one stage of a model: `python train.py --help`. The same as the installed `spikingbrain-train`."""

from spikingbrain_train.commands.programs import train

# dist_checkpointing starts its writers with "spawn", which imports this file again in each of them.
if __name__ == "__main__":
    train()
